"""What the steps of a run hold: planned from the indexes where they are at hand, else assumed from the budgets."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path

import numpy as np

from keye_train.data.cost import PackCost, config_cost, training_cost
from keye_train.data.plan import GlobalBatch, Plan, assign
from keye_train.forecast.activations import PackShape
from keye_train.model import keye_config
from keye_train.model.flops import TOWERS, FlopCoefficients
from keye_train.model.positions import PATCH_SIZE
from keye_train.settings import ActivationCheckpointing, Objective, TrainSettings

PLANNED_BATCHES = 4
"""Global batches that are planned: thousands of packs for a large run."""

ASSUMED_SAMPLE_TOKENS = 1670
ASSUMED_IMAGE_PATCHES = 4096
"""Ours: where no index tells, packs are full of samples of about this length, each with such an image where patches
allow. A pair of Stage 0 has an image of the tower's own grid."""


@dataclass(frozen=True)
class Workload:
    """One optimizer step, on average, and its fullest pack."""

    origin: str  # where the figures come from, for people
    samples: float
    tokens: float
    patches: float
    shard_bytes: float | None  # read from the shards; None: no index tells
    flops: float  # forward and backward of all packs
    recomputed: float  # operations that activation checkpointing adds to these
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
    drawn: dict[int, list[int]] = {}
    for pack in packs:
        for sample in pack.samples:
            drawn.setdefault(sample.source, []).append(sample.row)
    again = recomputed_cost(settings)
    labelled = [_labelled(settings, *sizes) for sizes in zip(tokens.tolist(), patches.tolist(), strict=True)]
    shard_bytes = recomputed = 0.0
    for number, rows in drawn.items():
        source = plan.source(number)
        shard_bytes += len(rows) * sum(header.shard_bytes for header in source.headers) / len(source)
        recomputed += float(again(source.look(np.array(rows)).sizes).sum())
    return Workload(
        origin=f"the first {count} global batches of the plan",
        samples=sum(map(len, drawn.values())) / count,
        tokens=float(tokens.sum()) / count,
        patches=float(patches.sum()) / count,
        shard_bytes=shard_bytes / count,
        flops=(sum(pack.cost for pack in packs) + _labelled_flops(settings) * sum(labelled)) / count,
        recomputed=recomputed / count,
        balance=float(np.mean([_balance(batch, ranks) for batch in batches])),
        fullest=PackShape(int(tokens.max()), int(patches.max()), max(labelled)),
    )


def assumed(settings: TrainSettings, why: str) -> Workload:
    """Full packs of equal samples."""
    stage, model = settings.stage, settings.model
    if stage.objective == Objective.contrastive:
        image = max(4, (model.vision.image_size // PATCH_SIZE) ** 2)
        samples = max(1, min(stage.max_tokens // model.text_tower.max_tokens, stage.max_patches // image))
        tokens, patches = samples * model.text_tower.max_tokens, min(stage.max_patches, samples * image)
    else:
        samples, tokens = max(1, stage.max_tokens // ASSUMED_SAMPLE_TOKENS), stage.max_tokens
        patches = min(stage.max_patches, ASSUMED_IMAGE_PATCHES * samples, _room_for_patches(settings))

    def operations(cost: PackCost) -> float:
        per_token = cost.token + cost.token_squared * tokens / samples
        return per_token * tokens + (cost.patch + cost.patch_squared * patches / samples) * patches

    labelled = _labelled(settings, tokens, patches)
    packs = stage.global_batch_packs
    return Workload(
        origin=f"no index ({why}): full packs are assumed, each of {samples} equal samples",
        samples=float(samples * packs),
        tokens=float(tokens * packs),
        patches=float(patches * packs),
        shard_bytes=None,
        flops=(operations(config_cost(settings)) + _labelled_flops(settings) * labelled) * packs,
        recomputed=operations(recomputed_cost(settings)) * packs,
        balance=1.0,
        fullest=PackShape(stage.max_tokens, min(stage.max_patches, _room_for_patches(settings)), labelled),
    )


def recomputed_cost(settings: TrainSettings) -> PackCost:
    """Operations that activation checkpointing adds: another forward of every layer that a gradient passes through, of
    ``selective`` without its attention. A tower that does not learn and has nothing below it that does is left out.
    """
    stage = settings.stage
    if stage.activation_checkpointing == ActivationCheckpointing.none:
        return PackCost(0.0, 0.0, 0.0, 0.0)
    pairs = float(stage.activation_checkpointing == ActivationCheckpointing.full)
    if stage.objective == Objective.language:
        forward, vision = FlopCoefficients.of(keye_config(settings.model)), float("vision" in stage.trainable)
        half_pair = pairs * forward.language_pair / 2
        patch, patch_pair = vision * forward.tower_patch, vision * pairs * forward.vision_pair
        return PackCost(forward.language_token + half_pair, half_pair, patch, patch_pair)
    # Stage 0: towers learn, and have twice their forward in the backward, or have none. Captions are short: their pairs
    # are counted with their tokens.
    frozen = deepcopy(settings)
    frozen.stage.trainable = []
    both, forward_only = asdict(config_cost(settings)), asdict(config_cost(frozen))
    half = {name: (value - forward_only[name]) / 2 for name, value in both.items()}
    return PackCost(**half | {"patch_squared": pairs * half["patch_squared"]})


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
