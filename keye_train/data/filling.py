"""Packs being filled: what samples take of two budgets, what packs have left of them, and who is where."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Filling:
    """Samples and packs; the arrays of rooms and places are changed in place.

    One budget is the scarcer one over all samples, and packs are filled by it. The other one is kept.
    """

    need: np.ndarray  # [N] int64, what samples take of the scarcer budget
    other: np.ndarray  # [N] int64, and of the other one
    need_room: np.ndarray  # [packs] int64, what packs have left of the scarcer budget
    other_room: np.ndarray  # [packs] int64, and of the other one
    pack_of: np.ndarray  # [N] int64, pack of each sample; -1: without a place

    @property
    def waiting(self) -> np.ndarray:
        """Samples without a place, ascending."""
        return np.flatnonzero(self.pack_of < 0)

    def put(self, samples: np.ndarray, packs: np.ndarray) -> np.ndarray:
        """Put each sample into the pack beside it, if that has room for it in both budgets.

        Args:
            samples: [M] int64, without a place.
            packs: [M] int64, no pack twice.

        Returns:
            [M] bool: which found a place.
        """
        fits = (self.need[samples] <= self.need_room[packs]) & (self.other[samples] <= self.other_room[packs])
        samples, packs = samples[fits], packs[fits]
        self.pack_of[samples] = packs
        self.need_room[packs] -= self.need[samples]
        self.other_room[packs] -= self.other[samples]
        return fits

    def fit_largest(self, samples: np.ndarray, packs: np.ndarray) -> None:
        """Packs take the largest samples that they have room for, one in each round, until no turn finds any.

        In a round the pack with the most room comes first, and takes the largest sample of at most its room. The next
        one takes the largest of at most its own that is behind that one, and so on. A pack that has no room in the
        other budget for the sample of its turn takes no more, nor does one to whose turn no sample is left.

        Args:
            samples: [M] int64, without a place.
            packs: [K] int64, each once.
        """
        samples = samples[np.argsort(-self.need[samples], kind="stable")]
        while len(samples):
            smallest = self.need[samples[-1]]
            packs = packs[self.need_room[packs] >= smallest]
            if not len(packs):
                return
            packs = packs[np.argsort(-self.need_room[packs], kind="stable")]
            first = np.searchsorted(-self.need[samples], -self.need_room[packs])  # not larger than the room
            turn = np.arange(len(packs))
            chosen = np.maximum.accumulate(first - turn) + turn  # the first such one that is behind those of all before
            chosen = chosen[chosen < len(samples)]
            packs = packs[: len(chosen)]
            fits = self.put(samples[chosen], packs)
            samples, packs = np.delete(samples, chosen[fits]), packs[fits]


def first_of_runs(values: np.ndarray) -> np.ndarray:
    """Places at which a run of equal values begins: [runs] int64."""
    return np.flatnonzero(np.concatenate([np.ones(min(len(values), 1), dtype=bool), values[1:] != values[:-1]]))
