"""Losses on held-out samples while a run trains.

The samples are drawn, decoded and packed once, at the start, each rank its share. Measuring them reads no data, draws
no random numbers (every step seeds its own) and leaves no gradient, so that a run trains alike with and without it.
"""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from keye_train.data.collate import collate_pairs, collate_samples
from keye_train.data.heldout import Skipped, drawn_rows, fill_packs, leave_out, read_rows
from keye_train.data.packing import Budget
from keye_train.model.packed import ContrastiveInputs, PackedInputs
from keye_train.model.sample_encoder import EncodedPair, EncodedSample, SampleEncoder
from keye_train.sample import Sample, SampleError
from keye_train.settings import Objective, SettingsError, SourceSettings, TrainSettings
from keye_train.training.distributed import World
from keye_train.training.engine import Engine
from keye_train.training.objectives import TrainingObjective

logger = logging.getLogger(__name__)

PAIRS = "pairs"
"""Name of Stage 0's held-out set."""


@dataclass(frozen=True)
class _Pack:
    """A pack, ready for the model."""

    inputs: PackedInputs | ContrastiveInputs  # on the CPU
    item_sets: Tensor  # [K] int64: number of the set that each item belongs to


class HeldoutLoss:
    """Measures the losses of the sets of ``evaluation``. Collective: every rank makes one.

    Args:
        settings: of the run.
        world: all ranks.
        encoder: makes tensors of samples.
        objective: knows which items a pack has.

    Raises:
        SettingsError: a shard or its index is missing, or nothing of a set can be read.
    """

    def __init__(
        self, settings: TrainSettings, world: World, encoder: SampleEncoder, objective: TrainingObjective
    ) -> None:
        self._settings, self._world, self._encoder, self._objective = settings, world, encoder, objective
        self._pairs = settings.stage.objective == Objective.contrastive
        self._sets = heldout_sets(settings)
        self._packs: list[_Pack] = []
        self._items: list[int] = []
        if not self._sets:
            return
        error: Exception | None = None
        try:
            self._packs = self._read()
        except (OSError, ValueError) as caught:
            error = caught
        world.require_all(error, "reading held-out samples")
        counted = torch.cat([torch.empty(0, dtype=torch.int64), *(pack.item_sets for pack in self._packs)])
        self._items = world.sum_int(torch.bincount(counted, minlength=len(self._sets)).tolist())
        for (name, source), items in zip(self._sets.items(), self._items, strict=True):
            if not items:
                raise SettingsError(
                    f"evaluation: none of the held-out samples of '{name}' can be used, {source.shards}: they are "
                    f"unreadable or exceed stage.max_tokens or stage.max_patches; leave it out of evaluation.sets"
                )
        # Every rank runs as many forwards: under ZeRO-3 each gathers weights from all ranks.
        missing = world.max_int(len(self._packs)) - len(self._packs)
        self._packs += [self._pack([], [])] * missing

    def is_due(self, step: int) -> bool:
        """Whether the losses are measured after ``step`` steps."""
        every = self._settings.evaluation.every_steps
        return every > 0 and (step % every == 0 or step == self._settings.stage.steps)

    def measure(self, engine: Engine) -> dict[str, Any]:
        """The figures for metrics.jsonl: mean loss of each set over its labelled tokens, or pairs, and the time taken.

        Collective: every rank must reach this. With the contrastive objective a pair's negatives are those of all ranks
        in the same micro-step, so there, as in training, figures of other numbers of ranks are others.
        """
        began = time.monotonic()
        device, sets = self._world.device, len(self._sets)
        figures = self._objective.figures
        sums = torch.zeros(sets + len(figures), dtype=torch.float64, device=device)
        with engine.evaluating():
            for pack in self._packs:
                losses, further = engine.forward(pack.inputs.to(device))
                sums[:sets].index_add_(0, pack.item_sets.to(device), losses.double())
                for place, name in enumerate(figures, sets):
                    sums[place] += further[name]
        dist.all_reduce(sums)
        totals = sums.tolist()
        means = {name: total / items for name, total, items in zip(self._sets, totals, self._items, strict=False)}
        row: dict[str, Any] = {"heldout_loss": means}
        if self._pairs:
            row["heldout_retrieval_accuracy"] = totals[sets + figures.index("retrieved")] / self._items[0]
        return row | {"heldout_s": time.monotonic() - began}

    def _read(self) -> list[_Pack]:
        """This rank's share: every so many rows of each set."""
        evaluation, stage = self._settings.evaluation, self._settings.stage
        storage, world = self._settings.data.storage, self._world
        encoded: list[EncodedSample | EncodedPair] = []
        numbers: list[int] = []
        sizes: list[tuple[int, int]] = []
        budget = Budget(stage.max_tokens, stage.max_patches)
        for number, (name, source) in enumerate(self._sets.items()):
            rows = drawn_rows(source, evaluation.max_samples, self._settings.seed, name, storage)
            for made in read_rows(rows[world.rank :: world.size], name, self._encode, storage):
                if isinstance(made, Skipped):
                    continue
                tokens, patches = _size(made)
                if tokens > budget.max_tokens or patches > budget.max_patches:
                    leave_out(name, made.ref, SampleError(f"{tokens} tokens and {patches} patches exceed a pack"))
                    continue
                encoded.append(made)
                numbers.append(number)
                sizes.append((tokens, patches))
        packs = fill_packs(range(len(encoded)), sizes, budget)
        return [self._pack([encoded[i] for i in places], [numbers[i] for i in places]) for places in packs]

    def _encode(self, sample: Sample) -> EncodedSample | EncodedPair:
        return self._encoder.encode_pair(sample) if self._pairs else self._encoder.encode(sample)

    def _pack(self, samples: list[Any], numbers: list[int]) -> _Pack:
        model = self._settings.model
        inputs: PackedInputs | ContrastiveInputs
        if self._pairs:
            inputs = collate_pairs(samples, model, self._settings.stage.caption_weight > 0)
        else:
            inputs = collate_samples(samples, model)
        of_item = self._objective.item_samples(inputs)  # type: ignore[arg-type]
        return _Pack(inputs, torch.tensor(numbers, dtype=torch.int64)[of_item])


def heldout_sets(settings: TrainSettings) -> dict[str, SourceSettings]:
    """Name -> shards of the sets that a run measures; none where ``evaluation.every_steps`` is 0."""
    if not settings.evaluation.every_steps:
        return {}
    data, chosen = settings.data, settings.evaluation.sets
    if settings.stage.objective == Objective.contrastive:
        assert data.heldout_pairs is not None, "settings let Stage 0 through without held-out pairs"
        return {PAIRS: data.heldout_pairs}
    return {name: data.heldout[name] for name in (data.heldout if chosen is None else chosen)}


def _size(encoded: EncodedSample | EncodedPair) -> tuple[int, int]:
    """Tokens and patches, as the budgets of a pack count them."""
    tokens = encoded.text_ids.numel() if isinstance(encoded, EncodedPair) else len(encoded.input_ids)
    return tokens, len(encoded.pixel_patches)
