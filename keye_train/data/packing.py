"""Samples into packs under two budgets: language tokens and vision patches.

The number of packs comes first: as many as the window fills. Then the large samples are dealt out, each to a pack that
is among the emptiest, so that every pack holds some of every size, costs about the same, and its tasks are mixed. The
small ones come last and go where they fit most tightly, and packs swap samples until few gaps are left (see
``exchange``). What finds no place waits for the next window.

Whole numbers and stable sorts only: every machine packs the same.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from keye_train.data.exchange import close_gaps

MAX_TRIES = 16
"""Packs tried for the room in patches before a sample is left over."""

TIGHT_SHARE = 0.2
"""Share of the window, its smallest samples, that fills gaps. More would fill no better (99.92 % of 8,192 tokens on a
web mix at 0.2, 99.89 % at 0.3), takes longer and mixes worse."""

DEAL_SHARE = 4
"""The emptiest of so many parts of the packs take a sample in one round of dealing. Dealing to all of them at once
would give a pack that holds a long video as many further samples as one that holds a caption."""

DEAL_LEAST = 16
"""Packs that take a sample in one round at least: fewer would only take longer."""


@dataclass(frozen=True)
class Budget:
    """What one pack may hold."""

    max_tokens: int
    max_patches: int

    def fits(self, tokens: np.ndarray, patches: np.ndarray) -> np.ndarray:
        """Which samples fit into an empty pack: [N] bool."""
        return (tokens <= self.max_tokens) & (patches <= self.max_patches)

    def strain(self, tokens: np.ndarray, patches: np.ndarray) -> np.ndarray:
        """Of the scarcer budget, what samples take, in units of 1 / (max_tokens * max_patches): [N] int64."""
        return np.maximum(tokens * self.max_patches, patches * self.max_tokens)

    def packs(self, tokens: np.ndarray, patches: np.ndarray, multiple: int = 1) -> int:
        """How many packs these samples fill to the brim, rounded down to a multiple of ``multiple``."""
        full = max(int(tokens.sum()) // self.max_tokens, int(patches.sum()) // self.max_patches)
        return full // multiple * multiple


@dataclass(frozen=True)
class Packing:
    """Which samples share a pack."""

    order: np.ndarray  # [placed] int64: samples, those of a pack side by side
    starts: np.ndarray  # [packs + 1] int64: pack i holds order[starts[i] : starts[i + 1]]
    left: np.ndarray  # [N - placed] int64: samples without a place, ascending

    def __len__(self) -> int:
        return len(self.starts) - 1

    def members(self, pack: int) -> np.ndarray:
        """Samples of one pack, ascending."""
        return self.order[self.starts[pack] : self.starts[pack + 1]]

    @classmethod
    def none(cls, count: int) -> Packing:
        """No packs, and so many samples without a place."""
        return cls(np.zeros(0, dtype=np.int64), np.zeros(1, dtype=np.int64), np.arange(count))

    def and_then(self, names: np.ndarray, behind: Packing) -> Packing:
        """These packs and those of another packing behind them.

        Args:
            names: [M] int64, numbers here of the samples there: such as have no place here, or are new.
            behind: packing of M samples.
        """
        order = np.concatenate([self.order, names[behind.order]])
        starts = np.concatenate([self.starts, self.starts[-1] + behind.starts[1:]])
        left = np.setdiff1d(np.union1d(self.left, names[behind.left]), names[behind.order])
        return Packing(order, starts, left)

    def sums(self, values: np.ndarray) -> np.ndarray:
        """Sum of a quantity of the samples over each pack: [packs]."""
        if not len(self):
            return np.zeros(0, dtype=values.dtype)
        return np.add.reduceat(values[self.order], self.starts[:-1])


def pack_samples(tokens: np.ndarray, patches: np.ndarray, budget: Budget, packs: int) -> Packing:
    """Fill ``packs`` packs.

    Args:
        tokens: [N] int64, language tokens of each sample, each at least 1.
        patches: [N] int64, vision patches of each sample.
        budget: no sample may exceed it alone.
        packs: see :meth:`Budget.packs`; not more than N, and no pack stays empty.

    Returns:
        A packing in which every sample stands once, in a pack or in ``left``. The same input gives the same packing on
        any machine.
    """
    assert bool(budget.fits(tokens, patches).all()), "a sample is over the budget alone"
    assert packs <= len(tokens), "more packs than samples"
    strain = budget.strain(tokens, patches)
    order = np.lexsort((-tokens, -strain))
    dealt = int(np.searchsorted(np.cumsum(strain[order]), (1 - TIGHT_SHARE) * strain.sum(), side="right"))
    dealt = max(dealt, packs)
    table = _Table(tokens, patches, budget, packs)
    table.deal(order[:dealt])
    table.fit_tightly(order[table.pack_of[order] < 0])
    table.close_gaps()
    starts = np.zeros(packs + 1, dtype=np.int64)
    starts[1:] = np.bincount(table.pack_of[table.pack_of >= 0], minlength=packs).cumsum()
    left = np.flatnonzero(table.pack_of < 0)
    return Packing(np.argsort(table.pack_of, kind="stable")[len(left) :], starts, left)


class _Rooms:
    """Packs under how much room they have, for the question: which is the tightest with at least n?

    ``filled`` is a bit set of the rooms that have packs, so the answer is the lowest bit of ``filled >> n``.
    """

    def __init__(self, rooms: list[int]) -> None:
        """``rooms``: of pack 0, 1, ..."""
        self.packs: dict[int, dict[int, None]] = {}  # room -> packs, in order of arrival
        self.filled = 0
        for pack, room in enumerate(rooms):
            self.add(room, pack)

    def tightest(self, need: int) -> int:
        """Smallest room of at least ``need`` that has a pack; -1 where there is none."""
        above = self.filled >> need
        return need + (above & -above).bit_length() - 1 if above else -1

    def add(self, room: int, pack: int) -> None:
        """Note a pack under its room."""
        packs = self.packs.get(room)
        if packs:
            packs[pack] = None
        else:
            self.packs[room] = {pack: None}
            self.filled |= 1 << room

    def remove(self, room: int, pack: int) -> None:
        """Take a pack from its room."""
        packs = self.packs[room]
        del packs[pack]
        if not packs:
            self.filled ^= 1 << room


class _Table:
    """Packs being filled."""

    def __init__(self, tokens: np.ndarray, patches: np.ndarray, budget: Budget, packs: int) -> None:
        self.tokens, self.patches, self.budget = tokens, patches, budget
        self.token_room = np.full(packs, budget.max_tokens, dtype=np.int64)
        self.patch_room = np.full(packs, budget.max_patches, dtype=np.int64)
        self.pack_of = np.full(len(tokens), -1, dtype=np.int64)  # -1: without a place

    def deal(self, samples: np.ndarray) -> None:
        """Put samples, the largest first, into the packs with the most room, by their scarcer budget.

        In rounds: the emptiest packs take one sample each, the emptiest the largest. A sample that does not fit into
        the pack of its turn stays without a place.
        """
        T, P = self.budget.max_tokens, self.budget.max_patches
        packs = len(self.token_room)
        turn = max(packs // DEAL_SHARE, min(packs, DEAL_LEAST), 1)
        for start in range(0, len(samples), turn):
            some = samples[start : start + turn]
            room = np.minimum(self.token_room * P, self.patch_room * T)
            emptiest = np.argsort(-room, kind="stable")[: len(some)]
            if len(emptiest) < len(some):  # there are no packs
                return
            fits = (self.tokens[some] <= self.token_room[emptiest]) & (self.patches[some] <= self.patch_room[emptiest])
            some, emptiest = some[fits], emptiest[fits]
            self.token_room[emptiest] -= self.tokens[some]
            self.patch_room[emptiest] -= self.patches[some]
            self.pack_of[some] = emptiest

    def fit_tightly(self, samples: np.ndarray) -> None:
        """Put each sample, in this order, into the tightest pack that takes it."""
        tokens, patches = self.tokens[samples], self.patches[samples]
        if (self.patches * self.budget.max_tokens <= self.tokens * self.budget.max_patches).all():
            found = _fit_tokens(tokens.tolist(), self.token_room.tolist())
        else:
            found = _TwoRooms(self.token_room.tolist(), self.patch_room.tolist(), self.budget).fit(
                tokens.tolist(), patches.tolist()
            )
        self.pack_of[samples] = found
        placed = samples[self.pack_of[samples] >= 0]
        np.subtract.at(self.token_room, self.pack_of[placed], self.tokens[placed])
        np.subtract.at(self.patch_room, self.pack_of[placed], self.patches[placed])

    def close_gaps(self) -> None:
        """Swap samples between packs so that more find a place, see ``exchange``."""
        tokens, patches = (self.tokens, self.token_room), (self.patches, self.patch_room)
        by_tokens = int(self.tokens.sum()) * self.budget.max_patches >= int(self.patches.sum()) * self.budget.max_tokens
        (need, need_room), (other, other_room) = (tokens, patches) if by_tokens else (patches, tokens)
        close_gaps(need, other, need_room, other_room, self.pack_of)


def _fit_tokens(needs: list[int], token_room: list[int]) -> list[int]:
    """Tightest pack for each sample in turn where no pack can run out of patches first; -1: none takes it."""
    rooms = _Rooms(token_room)
    found = []
    for need in needs:
        room = rooms.tightest(need)
        if room < 0:
            found.append(-1)
            continue
        pack = next(reversed(rooms.packs[room]))
        rooms.remove(room, pack)
        rooms.add(room - need, pack)
        found.append(pack)
    return found


class _TwoRooms:
    """Packs under two rooms: that of tokens, and the scarcer of both budgets in units of tokens.

    A sample with vision goes by the scarcer room, where whatever is large enough fits both budgets for certain; only
    if nothing is, a few packs with token room are tried. A sample without vision goes by token room, so it ends up
    where patches have run out.
    """

    def __init__(self, token_room: list[int], patch_room: list[int], budget: Budget) -> None:
        self.token_room, self.patch_room, self.budget = token_room, patch_room, budget
        self._by_tokens = _Rooms(token_room)
        self._by_both = _Rooms([self._scarcer(pack) for pack in range(len(token_room))])

    def fit(self, needs: list[int], visions: list[int]) -> list[int]:
        """Pack of each sample in turn, from its tokens and patches; -1: none takes it."""
        T, P = self.budget.max_tokens, self.budget.max_patches
        found = []
        for need, vision in zip(needs, visions, strict=True):
            rooms, least = (self._by_both, max(need, -(-vision * T // P))) if vision else (self._by_tokens, need)
            room = rooms.tightest(least)
            pack = next(reversed(rooms.packs[room])) if room >= 0 else self._try_some(need, vision)
            found.append(pack)
            if pack >= 0:
                self._put(pack, need, vision)
        return found

    def _put(self, pack: int, need: int, vision: int) -> None:
        self._by_tokens.remove(self.token_room[pack], pack)
        self._by_both.remove(self._scarcer(pack), pack)
        self.token_room[pack] -= need
        self.patch_room[pack] -= vision
        self._by_tokens.add(self.token_room[pack], pack)
        self._by_both.add(self._scarcer(pack), pack)

    def _scarcer(self, pack: int) -> int:
        return min(self.token_room[pack], self.patch_room[pack] * self.budget.max_tokens // self.budget.max_patches)

    def _try_some(self, need: int, vision: int) -> int:
        """A pack that takes the sample, among the few tightest by token room; -1 where none of them does."""
        tries = MAX_TRIES
        room = self._by_tokens.tightest(need)
        while room >= 0:
            for pack in reversed(self._by_tokens.packs[room]):
                if self.patch_room[pack] >= vision:
                    return pack
                tries -= 1
                if not tries:
                    return -1
            room = self._by_tokens.tightest(room + 1)
        return -1
