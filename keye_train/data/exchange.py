"""The last gaps of a packing: packs swap two samples of almost the same size until the gaps of many are one of a few.

A gap of some tokens takes no sample. But a pack with a gap of g that gives a sample of n and takes one of n + g is
full, and the pack that it swaps with has the gap instead. A few packs, the *collectors*, collect the gaps of all others
in this way, until their own are large enough for a sample that had no place. Sizes hardly change, so packs cost as
before.

Whole numbers, and orders that follow from the numbers of samples and packs: every machine swaps the same.
"""

from __future__ import annotations

from collections import defaultdict

import numpy as np

COLLECTORS = (2, 4, 4)
"""Rounds, and in each which part of the packs collects: the half with the most samples, then quarters of those that
have gaps, the largest ones. On a web mix at 8,192 tokens it makes 99.95 % of 99.79 %."""

LEAST = 4
"""Collectors below which a round is left out."""

TRIES = 6
"""Samples of the size that closes a gap that are tried for the other budget."""


def close_gaps(
    need: np.ndarray, other: np.ndarray, need_room: np.ndarray, other_room: np.ndarray, pack_of: np.ndarray
) -> None:
    """Fill packs by swaps; ``pack_of`` and both rooms are changed in place.

    Args:
        need: [N] int64, what samples take of the scarcer budget.
        other: [N] int64, what they take of the other one.
        need_room, other_room: [packs] int64, what packs have left of the two.
        pack_of: [N] int64, pack of each sample; -1: without a place.
    """
    counts = np.bincount(pack_of[pack_of >= 0], minlength=len(need_room))
    order = np.argsort(-counts, kind="stable")  # many samples, many swaps
    collecting = np.ones(len(need_room), dtype=bool)
    for share in COLLECTORS:
        collectors = order[: len(order) // share]
        if len(collectors) < LEAST or not (pack_of < 0).any():
            return
        collecting[:] = False
        collecting[collectors] = True
        exchange = _Exchange(need, other, need_room, other_room, pack_of)
        exchange.run(np.flatnonzero((need_room > 0) & ~collecting), collectors)
        need_room[:], other_room[:], pack_of[:] = exchange.need_room, exchange.other_room, exchange.pack_of
        gaps = np.flatnonzero((need_room > 0) & collecting)
        order = gaps[np.argsort(-need_room[gaps], kind="stable")]


class _Exchange:
    """One round. Plain lists: the swaps depend on each other."""

    def __init__(
        self, need: np.ndarray, other: np.ndarray, need_room: np.ndarray, other_room: np.ndarray, pack_of: np.ndarray
    ) -> None:
        self._packs, self._sizes = pack_of, need  # before the round
        self.need, self.other = need.tolist(), other.tolist()
        self.need_room, self.other_room, self.pack_of = need_room.tolist(), other_room.tolist(), pack_of.tolist()
        self._waiting = _Sizes([(self.need[sample], sample) for sample in np.flatnonzero(pack_of < 0).tolist()])

    def run(self, givers: np.ndarray, collectors: np.ndarray) -> None:
        """Move the gaps of ``givers`` to ``collectors``, and put samples without a place there."""
        role = np.zeros(len(self.need_room), dtype=np.int8)
        role[collectors], role[givers] = 1, 2
        placed = np.flatnonzero(self._packs >= 0)
        roles = role[self._packs[placed]]
        offered: defaultdict[int, list[int]] = defaultdict(list)  # size -> samples of collectors
        for sample in placed[roles == 1].tolist():
            offered[self.need[sample]].append(sample)
        for pack in collectors.tolist():
            self._place(pack)
        giving = placed[roles == 2]
        giving = giving[np.argsort(self._packs[giving], kind="stable")]
        owners, sizes = self._packs[giving], self._sizes[giving]
        wanted = sizes + np.array(self.need_room)[owners]
        done = -1
        for sample, pack, size in zip(giving.tolist(), owners.tolist(), wanted.tolist(), strict=True):
            if pack == done:
                continue
            if self._waiting.has(size) and self._take(sample, pack, size):
                done = pack
            elif (own := offered.get(size)) is not None:
                for place in range(len(own) - 1, max(len(own) - 1 - TRIES, -1), -1):
                    if self._swap(sample, pack, own[place]):
                        own[place] = own[-1]
                        own.pop()
                        offered[self.need[sample]].append(sample)
                        done = pack
                        break

    def _take(self, sample: int, giver: int, size: int) -> bool:
        """Swap a sample for one without a place that closes the gap, where the other budget allows it."""
        taken = self._waiting.first(size)
        more = self.other[taken] - self.other[sample]
        if more > self.other_room[giver]:
            return False
        self._waiting.remove(size)
        self._waiting.add(self.need[sample], sample)
        self.pack_of[sample], self.pack_of[taken] = -1, giver
        self.need_room[giver] = 0
        self.other_room[giver] -= more
        return True

    def _swap(self, sample: int, giver: int, taken: int) -> bool:
        """Swap a sample for one that closes the gap, where the other budgets of both packs allow it."""
        collector, gap = self.pack_of[taken], self.need_room[giver]
        more = self.other[taken] - self.other[sample]
        if more > self.other_room[giver] or -more > self.other_room[collector]:
            return False
        self.pack_of[sample], self.pack_of[taken] = collector, giver
        self.need_room[giver] = 0
        self.need_room[collector] += gap
        self.other_room[giver] -= more
        self.other_room[collector] += more
        self._place(collector)
        return True

    def _place(self, pack: int) -> None:
        """Put the largest waiting samples that fit into a pack."""
        while (size := self._waiting.largest(self.need_room[pack])) >= 0:
            sample = self._waiting.first(size)
            if self.other[sample] > self.other_room[pack]:
                return
            self._waiting.remove(size)
            self.pack_of[sample] = pack
            self.need_room[pack] -= size
            self.other_room[pack] -= self.other[sample]


class _Sizes:
    """Samples by size, for the question: which is the largest of at most n?"""

    def __init__(self, samples: list[tuple[int, int]]) -> None:
        """``samples``: (size, sample)."""
        self._samples: defaultdict[int, list[int]] = defaultdict(list)
        self._held = 0  # a bit set of the sizes
        for size, sample in samples:
            self.add(size, sample)

    def add(self, size: int, sample: int) -> None:
        """Note a sample."""
        self._samples[size].append(sample)
        self._held |= 1 << size

    def has(self, size: int) -> bool:
        """Whether there is a sample of exactly this size."""
        return bool(self._samples.get(size))

    def largest(self, most: int) -> int:
        """Largest size of at most ``most`` that is there; -1 where there is none."""
        return (self._held & ((1 << (most + 1)) - 1)).bit_length() - 1

    def first(self, size: int) -> int:
        """A sample of this size."""
        return self._samples[size][-1]

    def remove(self, size: int) -> None:
        """Take that sample out."""
        self._samples[size].pop()
        if not self._samples[size]:
            self._held ^= 1 << size
