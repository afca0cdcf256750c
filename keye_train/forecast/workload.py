"""What the steps of a run hold: planned from the indexes where they are at hand, else assumed from the budgets."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np

from keye_train.data.cost import training_cost
from keye_train.data.plan import GlobalBatch, Plan, assign
from keye_train.forecast.activations import PackShape
from keye_train.model import keye_config
from keye_train.model.flops import TOWERS, FlopCoefficients
from keye_train.settings import Objective, TrainSettings

PLANNED_BATCHES = 4
"""Global batches that are planned: thousands of packs for a large run."""

ASSUMED_SAMPLE_TOKENS = 1670
ASSUMED_IMAGE_PATCHES = 4096
"""Ours: where no index tells, packs are full of samples of this length, each with such an image where patches allow."""


@dataclass(frozen=True)
class Workload:
    """One optimizer step, on average, and its fullest pack."""

    origin: str  # where the figures come from, for people
    samples: float
    tokens: float
    patches: float
    shard_bytes: float | None  # read from the shards; None: no index tells
    flops: float  # forward and backward of all packs
    balance: float  # mean over slowest rank, of the micro-steps
    fullest: PackShape


def workload(settings: TrainSettings, ranks: int) -> Workload:
    """See the module.

    Raises:
        ValueError: shards and indexes are there and do not fit the recipe.
    """
    tokenizer = Path(settings.model.tokenizer) / "tokenizer.json"
    if not tokenizer.exists():
        return assumed(settings, f"{tokenizer} is absent")
    try:
        plan = Plan.from_settings(settings, training_cost(settings))
    except FileNotFoundError as absent:
        return assumed(settings, str(absent).split(":")[0])
    return planned(settings, plan, ranks)


def planned(settings: TrainSettings, plan: Plan, ranks: int) -> Workload:
    """From the first global batches of the plan. All text counts as labelled: an upper bound."""
    batches = [batch for batch, _ in islice(plan.batches(), PLANNED_BATCHES)]
    packs = [pack for batch in batches for pack in batch.packs]
    tokens, patches = (np.array([getattr(pack, name) for pack in packs]) for name in ("tokens", "patches"))
    count = len(batches)
    labelled = [_labelled(settings, *sizes) for sizes in zip(tokens.tolist(), patches.tolist(), strict=True)]
    sample_bytes = [
        sum(header.shard_bytes for header in plan.source(number).headers) / max(1, len(plan.source(number)))
        for number in range(len(plan.sources))
    ]
    drawn = [sample.source for pack in packs for sample in pack.samples]
    return Workload(
        origin=f"the first {count} global batches of the plan",
        samples=len(drawn) / count,
        tokens=float(tokens.sum()) / count,
        patches=float(patches.sum()) / count,
        shard_bytes=sum(sample_bytes[source] for source in drawn) / count,
        flops=(sum(pack.cost for pack in packs) + _labelled_flops(settings) * sum(labelled)) / count,
        balance=float(np.mean([_balance(batch, ranks) for batch in batches])),
        fullest=PackShape(int(tokens.max()), int(patches.max()), max(labelled)),
    )


def assumed(settings: TrainSettings, why: str) -> Workload:
    """Full packs of equal samples."""
    stage = settings.stage
    tokens = min(stage.max_tokens, ASSUMED_SAMPLE_TOKENS)
    samples = max(1, stage.max_tokens // tokens)
    patches = min(stage.max_patches, ASSUMED_IMAGE_PATCHES * samples, _room_for_patches(settings))
    cost = training_cost(settings)
    per_sample = patches / samples
    full = stage.max_tokens
    flops = cost.token * full + cost.token_squared * full * full / samples
    flops += cost.patch * patches + cost.patch_squared * patches * per_sample
    labelled = _labelled(settings, full, patches)
    packs = stage.global_batch_packs
    return Workload(
        origin=f"no index ({why}): full packs of samples of {tokens:,} tokens are assumed",
        samples=float(samples * packs),
        tokens=float(full * packs),
        patches=float(patches * packs),
        shard_bytes=None,
        flops=(flops + _labelled_flops(settings) * labelled) * packs,
        balance=1.0,
        fullest=PackShape(full, min(stage.max_patches, _room_for_patches(settings)), labelled),
    )


def _room_for_patches(settings: TrainSettings) -> int:
    """Patches whose tokens fit into a pack; Stage 0 has no such bound."""
    stage = settings.stage
    return stage.max_patches if stage.objective == Objective.contrastive else 4 * stage.max_tokens


def _labelled(settings: TrainSettings, tokens: int, patches: int) -> int:
    return 0 if settings.stage.objective == Objective.contrastive else max(0, tokens - patches // 4)


def _labelled_flops(settings: TrainSettings) -> float:
    if settings.stage.objective == Objective.contrastive:
        return 0.0
    trainable = [name for name in settings.stage.trainable if name in TOWERS]
    return FlopCoefficients.of(keye_config(settings.model)).for_training(trainable).labelled_token


def _balance(batch: GlobalBatch, ranks: int) -> float:
    costs = np.array([[pack.cost for pack in micro_step] for micro_step in assign(batch, ranks)])
    slowest = costs.max(axis=1)
    return float(costs.mean() * len(costs) / slowest.sum()) if slowest.sum() else 1.0
