"""Sizes of a global batch, agreed on by all ranks before its first forward: what the loss is divided by, and more."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from keye_train.data.collate import LoadedPack
from keye_train.data.ledger import SkipLimit, unreadable
from keye_train.data.loader import StepData
from keye_train.data.measure import Sizes
from keye_train.model.packed import PackedInputs, upload
from keye_train.settings import LossWeighting
from keye_train.training.distributed import World
from keye_train.training.guards import StopRequest
from keye_train.training.objectives import WEIGHT_UNITS, TrainingObjective, item_weights, total_weight
from keye_train.training.tasks import TaskNames


@dataclass(frozen=True)
class PackItems:
    """What the items of one pack belong to; an item is a labelled token or an image-caption pair."""

    groups: Tensor  # [2, K] int64: number of the source, number of the task
    weights: Tensor | None  # [K] float32; None where all weigh 1

    def to(self, device: torch.device) -> PackItems:
        """The same on a device."""
        weights = None if self.weights is None else upload(self.weights, device)
        return PackItems(upload(self.groups, device), weights)


@dataclass(frozen=True)
class Counts:
    """One global batch, over all ranks and all micro-steps."""

    items: int  # labelled tokens, or image-caption pairs
    weight: float  # of all items; equals ``items`` where the loss is weighted per token
    tokens: int
    patches: int
    samples: int
    skipped: int  # samples that could not be read or did not fit
    changed: int  # samples that data.overlong made fit, of those that were read
    digest: int  # of the samples that were read
    stop: int  # signal that asked some rank to stop; 0: none
    extra: list[int]  # sums of what the caller added
    items_by_source: list[int]
    items_by_task: list[int]
    tasks: Sequence[str]  # names behind the task numbers
    sizes: Sizes  # [1]: sums that the cost of the batch follows from
    packs: list[PackItems]  # of this rank's packs


class BatchCounter:
    """Counts global batches on one rank.

    Args:
        sources: names, in the order of the source numbers.
        objective: knows which items a pack has.
        weighting: of the items.
    """

    def __init__(self, sources: tuple[str, ...], objective: TrainingObjective, weighting: LossWeighting) -> None:
        self.sources, self.weighting = sources, weighting
        self._objective = objective
        self._number = {name: number for number, name in enumerate(sources)}
        self._tasks = TaskNames()

    def count(
        self, data: StepData, world: World, stop: StopRequest, skip_limit: SkipLimit, extra: Sequence[int] = ()
    ) -> Counts:
        """Sizes of the global batch. Collective: every rank must reach this.

        Args:
            data: what this rank has read.
            world: the ranks.
            stop: whether this rank is to stop.
            skip_limit: is told what was skipped.
            extra: further numbers to sum, as many on every rank; they travel in the same collective.

        Raises:
            ValueError: more samples were skipped than ``skip_limit`` allows.
        """
        names = self.sources
        samples = [self._objective.item_samples(pack.inputs) for pack in data.packs]  # type: ignore[arg-type]
        items = [torch.bincount(one, minlength=len(pack.refs)) for one, pack in zip(samples, data.packs, strict=True)]
        unknown = self._tasks.unknown(task for pack in data.packs for task in pack.tasks)
        read = Counter(ref.source for pack in data.packs for ref in pack.refs)
        broken = Counter(ref.source for pack in data.packs for ref, _ in pack.skipped)
        sizes = np.sum([_sizes(pack) for pack in data.packs], axis=0).tolist()
        own = [sum(getattr(pack, name) for pack in data.packs) for name in ("tokens", "patches", "digest", "changed")]
        weight = sum(total_weight(one, self.weighting) for one in samples)
        flags = stop.as_flags()
        summed = world.sum_int(
            [
                *self._by_source(data, items),
                *(count[name] for count in (read, broken) for name in names),
                *(*own, len(data.dropped), unreadable(data), weight, len(unknown), *sizes),
                *self._by_task(data, items),
                *flags,
                *extra,
            ]
        )
        end = len(summed) - len(extra)
        sums, stops = summed[: end - len(flags)], summed[end - len(flags) : end]
        sources, reads, brokens = (sums[len(names) * part : len(names) * (part + 1)] for part in range(3))
        tokens, patches, digest, changed, dropped, marked, weight, new_tasks, *rest = sums[3 * len(names) :]
        by_task = rest[len(sizes) :]
        if new_tasks:
            self._tasks.learn(unknown, world)
            by_task = world.sum_int(self._by_task(data, items))
        after = data.plan_state_after
        skip_limit.observe(
            marked,
            dict(zip(names, reads, strict=True)),
            dict(zip(names, brokens, strict=True)),
            window=after.window - (after.batch == 0),
        )
        return Counts(
            items=sum(sources),
            weight=weight / WEIGHT_UNITS,
            tokens=tokens,
            patches=patches,
            samples=sum(reads),
            skipped=sum(brokens) + dropped,
            changed=changed,
            digest=digest,
            stop=StopRequest.from_flags(stops),
            extra=summed[end:],
            items_by_source=sources,
            items_by_task=by_task,
            tasks=tuple(self._tasks.names),
            sizes=Sizes(*(np.array([value]) for value in rest[: len(sizes)])),
            packs=[self._pack_items(pack, one) for pack, one in zip(data.packs, samples, strict=True)],
        )

    def _pack_items(self, pack: LoadedPack, samples: Tensor) -> PackItems:
        numbers = [[self._number[source] for source in pack.sources], self._tasks.numbers(pack.tasks)]
        of_sample = torch.tensor(numbers, dtype=torch.int64).reshape(2, -1)
        return PackItems(of_sample[:, samples], item_weights(samples, self.weighting))

    def _by_source(self, data: StepData, items: list[Tensor]) -> list[int]:
        numbers = [self._number[source] for pack in data.packs for source in pack.sources]
        return _summed(numbers, items, len(self.sources))

    def _by_task(self, data: StepData, items: list[Tensor]) -> list[int]:
        numbers = self._tasks.numbers(task for pack in data.packs for task in pack.tasks)
        return _summed(numbers, items, len(self._tasks.names))


def _summed(numbers: list[int], items: list[Tensor], length: int) -> list[int]:
    """Items of each group: ``numbers`` has the group of each sample, ``items`` their items, pack by pack."""
    sums = torch.zeros(length, dtype=torch.int64)
    return sums.index_add_(0, torch.tensor(numbers, dtype=torch.int64), torch.cat(items)).tolist()


def _sizes(pack: LoadedPack) -> list[int]:
    """Tokens, tokens of each sample squared, patches, patches of each image or video squared; see ``data.measure``."""
    inputs = pack.inputs
    patches = inputs.vision.cu_seqlens.diff().double()
    if isinstance(inputs, PackedInputs):
        tokens = inputs.cu_seqlens.diff().double()
    else:
        tokens = torch.full((len(inputs.text_ids),), float(inputs.text_ids.shape[1]), dtype=torch.float64)
    return [int(value) for row in (tokens, patches) for value in (row.sum(), row.square().sum())]
