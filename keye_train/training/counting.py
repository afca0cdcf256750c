"""Sizes of a global batch, agreed on by all ranks before its first forward: what the loss is divided by, and more."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import torch
from torch import Tensor

from keye_train.data.collate import LoadedPack
from keye_train.data.ledger import SkipLimit, unreadable
from keye_train.data.loader import StepData
from keye_train.settings import LossWeighting
from keye_train.training.distributed import World
from keye_train.training.guards import StopRequest
from keye_train.training.objectives import WEIGHT_UNITS, TrainingObjective, total_weight


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
    items_by_source: list[int]


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

    def item_samples(self, pack: LoadedPack) -> Tensor:
        """Number of the sample of each item of a pack: [K] int64, on the CPU."""
        return self._objective.item_samples(pack.inputs)  # type: ignore[arg-type]

    def item_sources(self, pack: LoadedPack) -> Tensor:
        """Source number of each item of a pack: [K] int64, on the CPU."""
        of_sample = torch.tensor([self._number[source] for source in pack.sources], dtype=torch.int64)
        return of_sample[self.item_samples(pack)]

    def count(self, data: StepData, world: World, stop: StopRequest, skip_limit: SkipLimit) -> Counts:
        """Sizes of the global batch. Collective: every rank must reach this.

        Raises:
            ValueError: more samples were skipped than ``skip_limit`` allows.
        """
        names = self.sources
        by_source = torch.bincount(torch.cat([self.item_sources(pack) for pack in data.packs]), minlength=len(names))
        read = Counter(ref.source for pack in data.packs for ref in pack.refs)
        broken = Counter(ref.source for pack in data.packs for ref, _ in pack.skipped)
        packs = [sum(getattr(pack, name) for pack in data.packs) for name in ("tokens", "patches", "digest", "changed")]
        weight = sum(total_weight(self.item_samples(pack), self.weighting) for pack in data.packs)
        flags = stop.as_flags()
        summed = world.sum_int(
            [
                *by_source.tolist(),
                *(count[name] for count in (read, broken) for name in names),
                *(*packs, len(data.dropped), unreadable(data), weight),
                *flags,
            ]
        )
        sums, stops = summed[: -len(flags)], summed[-len(flags) :]
        sources, reads, brokens = (sums[len(names) * part : len(names) * (part + 1)] for part in range(3))
        tokens, patches, digest, changed, dropped, marked, weight = sums[3 * len(names) :]
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
            items_by_source=sources,
        )
