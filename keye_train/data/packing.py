"""Samples into packs under two budgets: language tokens and vision patches.

Best fit decreasing: samples come largest first (by the budget they strain more), and each goes to the pack with the
least token room that still takes it. The many small samples come last and fill the gaps.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

MAX_TRIES = 16
"""Packs tried, where none is sure to take a sample, before a new one is opened."""


@dataclass(frozen=True)
class Budget:
    """What one pack may hold."""

    max_tokens: int
    max_patches: int

    def fits(self, tokens: np.ndarray, patches: np.ndarray) -> np.ndarray:
        """Which samples fit into an empty pack: [N] bool."""
        return (tokens <= self.max_tokens) & (patches <= self.max_patches)


@dataclass(frozen=True)
class Packing:
    """Which samples share a pack."""

    order: np.ndarray  # [N] int64: samples, those of a pack side by side
    starts: np.ndarray  # [packs + 1] int64: pack i holds order[starts[i] : starts[i + 1]]

    def __len__(self) -> int:
        return len(self.starts) - 1

    def members(self, pack: int) -> np.ndarray:
        """Samples of one pack, ascending."""
        return self.order[self.starts[pack] : self.starts[pack + 1]]

    def sums(self, values: np.ndarray) -> np.ndarray:
        """Sum of a quantity of the samples over each pack: [packs]."""
        if not len(self):
            return np.zeros(0, dtype=values.dtype)
        return np.add.reduceat(values[self.order], self.starts[:-1])


def pack_samples(tokens: np.ndarray, patches: np.ndarray, budget: Budget) -> Packing:
    """Best fit decreasing under two budgets.

    Args:
        tokens: [N] int64, language tokens of each sample, each at least 1.
        patches: [N] int64, vision patches of each sample.
        budget: no sample may exceed it alone.

    Returns:
        A packing that holds every sample once. The same input gives the same packing on any machine.
    """
    assert bool(budget.fits(tokens, patches).all()), "a sample is over the budget alone"
    strain = np.maximum(tokens * budget.max_patches, patches * budget.max_tokens)  # whole numbers: no ties by rounding
    order = np.lexsort((np.arange(len(tokens)), -tokens, -strain))
    packs = _best_fit(order.tolist(), tokens.tolist(), patches.tolist(), budget)
    pack_of = np.empty(len(tokens), dtype=np.int64)
    pack_of[order] = packs
    starts = np.zeros(max(packs, default=-1) + 2, dtype=np.int64)
    starts[1:] = np.bincount(pack_of, minlength=len(starts) - 1).cumsum() if packs else 0
    return Packing(np.argsort(pack_of, kind="stable"), starts)


class _Rooms:
    """Open packs under how much room they have, for the question: which is the tightest with at least n?

    ``filled`` is a bit set of the rooms that have packs, so the answer is the lowest bit of ``filled >> n``.
    """

    def __init__(self) -> None:
        self.packs: dict[int, dict[int, None]] = {}  # room -> packs, in order of arrival
        self.filled = 0

    def tightest(self, need: int) -> int:
        """Smallest room of at least ``need`` that has a pack; -1 where there is none."""
        above = self.filled >> need
        return need + (above & -above).bit_length() - 1 if above else -1

    def add(self, room: int, pack: int) -> None:
        self.packs.setdefault(room, {})[pack] = None
        self.filled |= 1 << room

    def remove(self, room: int, pack: int) -> None:
        packs = self.packs[room]
        del packs[pack]
        if not packs:
            self.filled ^= 1 << room


def _best_fit(order: list[int], tokens: list[int], patches: list[int], budget: Budget) -> list[int]:
    """Pack of each sample, in the order given.

    Open packs stand under two rooms: that of tokens, and the scarcer of both budgets in units of tokens. A sample with
    vision goes by the scarcer room, where whatever is large enough fits both budgets for certain; only if nothing is,
    a few packs with token room are tried. A sample without vision goes by token room, so it ends up where patches
    have run out.
    """
    by_tokens, by_both = _Rooms(), _Rooms()
    T, P = budget.max_tokens, budget.max_patches
    token_room: list[int] = []
    patch_room: list[int] = []
    chosen: list[int] = []
    for sample in order:
        need, vision = tokens[sample], patches[sample]
        if vision:
            room = by_both.tightest(max(need, -(-vision * T // P)))
            pack = next(reversed(by_both.packs[room])) if room >= 0 else _try_some(by_tokens, patch_room, need, vision)
        else:
            room = by_tokens.tightest(need)
            pack = next(reversed(by_tokens.packs[room])) if room >= 0 else -1
        if pack < 0:
            pack = len(token_room)
            token_room.append(T)
            patch_room.append(P)
        else:
            by_tokens.remove(token_room[pack], pack)
            by_both.remove(min(token_room[pack], patch_room[pack] * T // P), pack)
        token_room[pack] -= need
        patch_room[pack] -= vision
        by_tokens.add(token_room[pack], pack)
        by_both.add(min(token_room[pack], patch_room[pack] * T // P), pack)
        chosen.append(pack)
    return chosen


def _try_some(by_tokens: _Rooms, patch_room: list[int], need: int, vision: int) -> int:
    """A pack that takes the sample, among the few tightest by token room; -1 where none of them does."""
    tries = MAX_TRIES
    room = by_tokens.tightest(need)
    while room >= 0:
        for pack in reversed(by_tokens.packs[room]):
            if patch_room[pack] >= vision:
                return pack
            tries -= 1
            if not tries:
                return -1
        room = by_tokens.tightest(room + 1)
    return -1
