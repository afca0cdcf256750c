"""Which source is drawn next, by weight, and a shuffle of its rows that needs no table.

Both are pure functions of a few numbers, so the draw can go on from anywhere.
"""

from __future__ import annotations

import hashlib
import heapq
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import repeat
from math import gcd
from operator import add

import numpy as np

from keye_train.data.shares import ShareCurve, Weights


@dataclass(frozen=True)
class MixtureState:
    """Position of a mixture: where its count began, and what each source has had since."""

    spent: tuple[int, ...]  # of each source since ``origin``, in the unit of the mixture
    origin: int = 0  # drawn in all when a source last left the mixture; 0 while all are there

    @property
    def total(self) -> int:
        """Drawn in all."""
        return self.origin + sum(self.spent)


class Mixture:
    """Draws sources so that every prefix of the draw holds each source close to its exact share.

    A share is one of samples (``sized`` off), or of amounts that differ from sample to sample, such as tokens. With
    S(T) what a source should have had of the first T (the integral of its share, see ``shares``):

    - Samples: every prefix holds each source within 1 - e of S, e = 1 / (2k - 2) for k sources. R. Tijdeman, "The
      chairman assignment problem" (1980), which allows shares to change: the j-th draw of a source is released once
      S >= j + e and due while S <= j + 1 - e; of the released, the earliest due is taken.
    - Amounts: every prefix holds each source between S - L - 1 and S + l, l the source's own largest sample and L the
      largest of all. J. Bennett and H. Zhang, "WF2Q" (1996): a sample that would take its source from a to a + l is
      released once S >= a and due when S reaches a + l.

    All arithmetic is in whole numbers, so there is no drift, however long the run. Where a source leaves, the count
    starts afresh among the others: from there on the bounds hold against their shares.
    """

    def __init__(self, weights: Mapping[str, float] | Weights, sized: bool = False) -> None:
        """Args:
            weights: source -> weight, or weights that change with what is drawn.
            sized: shares are of amounts.

        Raises:
            ValueError: no weight is above 0.
        """
        self.weights = weights if isinstance(weights, Weights) else Weights.of(weights)
        self.sources = self.weights.sources
        self.sized = sized
        self._made: tuple[tuple[int, tuple[int, ...]], tuple[dict[int, ShareCurve], int, int]] | None = None

    def start(self) -> MixtureState:
        """Before the first draw."""
        return MixtureState((0,) * len(self.sources))

    def draw(
        self, state: MixtureState, number: int, amounts: Sequence[Iterator[int]] | None = None
    ) -> tuple[np.ndarray, MixtureState]:
        """The next draws.

        Args:
            state: the position.
            number: how many more.
            amounts: for each source what its next samples count, 1 or more altogether above 0; an iterator that ends
                says that its source has left. One sample more is asked for than is drawn. None: 1 without end.

        Returns:
            Source numbers [number] int64, fewer where all sources have left; and the position after them.
        """
        ahead = amounts or [repeat(1)] * len(self.sources)
        nexts = [next(own, None) for own in ahead]
        origin, spent = state.origin, list(state.spent)
        drawn: list[int] = []
        while len(drawn) < number and (present := [i for i, amount in enumerate(nexts) if amount is not None]):
            curves, scale, margin = self._curves(origin, tuple(present))
            if not curves:
                break
            if amounts is None and _in_step(curves, scale, number):
                found = _draw_in_step(curves, scale, margin, spent, origin + sum(spent), number)
                own = np.bincount(found, minlength=len(spent)).tolist()
                return found, MixtureState(tuple(map(add, spent, own)), origin)
            queue = _Queue(curves, scale, margin, early=not self.sized)
            for source in present:
                queue.add(source, spent[source], nexts[source] or 0)
            total = origin + sum(spent)
            while len(drawn) < number:
                source = queue.pop(total)
                amount = nexts[source] or 0
                drawn.append(source)
                spent[source] += amount
                total += amount
                following = nexts[source] = next(ahead[source], None)
                if following is None:
                    origin, spent = total, [0] * len(spent)
                    break
                queue.add(source, spent[source], following)
        return np.array(drawn, dtype=np.int64), MixtureState(tuple(spent), origin)

    def curve(self, state: MixtureState, present: Sequence[int]) -> tuple[dict[int, ShareCurve], int]:
        """Exact shares since ``state.origin`` of the sources that are still there, and their scale."""
        return self._curves(state.origin, tuple(present))[:2]

    def _curves(self, origin: int, present: tuple[int, ...]) -> tuple[dict[int, ShareCurve], int, int]:
        """Curves, their scale, and e in that scale; kept, because one window after another asks for the same."""
        if self._made is None or self._made[0] != (origin, present):
            slack = 1 if self.sized else max(2 * len(present) - 2, 1)  # 1 / e
            named, scale = self.weights.curves(origin, [self.sources[source] for source in present], slack)
            curves = {source: named[self.sources[source]] for source in present if named}
            margin = scale // slack if len(present) > 1 and not self.sized else 0
            self._made = (origin, present), (curves, scale, margin)
        return self._made[1]


def _in_step(curves: Mapping[int, ShareCurve], scale: int, number: int) -> bool:
    """Whether shares stay and ``_draw_in_step`` can count in 63 bits."""
    return all(curve.rate for curve in curves.values()) and scale * (number + 5) < 2**62


def _draw_in_step(
    curves: Mapping[int, ShareCurve], scale: int, margin: int, spent: Sequence[int], total: int, number: int
) -> np.ndarray:
    """The next draws of samples that count 1, from shares that stay: as ``_Queue`` does, many samples at once: int64.

    Shares of 0.45 and the like have a period of 100 draws, in which each source has exactly its share. What comes next
    depends on nothing but how far the sources are off their shares, so it repeats from there.
    """
    period = scale // gcd(scale, *(curve.rate for curve in curves.values()))
    drawn = np.array(_draw_one_by_one(curves, scale, margin, spent, total, min(number, period)), dtype=np.int64)
    if number <= period:
        return drawn
    counts = np.bincount(drawn, minlength=len(spent)).tolist()
    if any(counts[source] * scale != period * curve.rate for source, curve in curves.items()):
        return np.array(_draw_one_by_one(curves, scale, margin, spent, total, number), dtype=np.int64)
    return np.resize(drawn, number)


def _draw_one_by_one(
    curves: Mapping[int, ShareCurve], scale: int, margin: int, spent: Sequence[int], total: int, number: int
) -> list[int]:
    """``_draw_in_step`` without a look at the period."""
    released, due = [], []
    for source, curve in curves.items():
        ahead = number * curve.rate // scale + 4  # no source is a whole sample off its share
        counts = np.arange(ahead, dtype=np.int64) * scale
        start = spent[source] * scale
        released.append(curve.reach_many(start + margin, counts))
        due.append(curve.reach_many(start + scale - margin + 1, counts) * len(spent) + source)
    order = np.argsort(np.concatenate(released), kind="stable")
    waiting = np.concatenate(released)[order].tolist()
    keys = np.concatenate(due)[order].tolist()
    ready: list[int] = []
    drawn, place = [], 0
    for now in range(total + 1, total + 1 + number):  # a sample may count against the share that its own draw adds
        while place < len(waiting) and waiting[place] <= now:
            heapq.heappush(ready, keys[place])
            place += 1
        drawn.append(heapq.heappop(ready) % len(spent))
    return drawn


class _Queue:
    """Next samples of the sources; gives out the earliest due of those released."""

    def __init__(self, curves: Mapping[int, ShareCurve], scale: int, margin: int, early: bool) -> None:
        self._curves, self._scale, self._margin = curves, scale, margin
        self._early = 1 if early else 0  # a sample may count against the share that its own draw adds
        self._waiting: list[tuple[int, int, int]] = []  # (released at, due, source)
        self._released: list[tuple[int, int]] = []  # (due, source)

    def add(self, source: int, spent: int, amount: int) -> None:
        """Put in the next sample of a source that has had ``spent``."""
        curve, start = self._curves[source], spent * self._scale
        due = curve.reach(start + amount * self._scale - self._margin + 1)
        heapq.heappush(self._waiting, (curve.reach(start + self._margin), due, source))

    def pop(self, total: int) -> int:
        """Take out the source to draw when ``total`` has been drawn."""
        while self._waiting and self._waiting[0][0] <= total + self._early:
            _, due, source = heapq.heappop(self._waiting)
            heapq.heappush(self._released, (due, source))
        assert self._released, "no source is behind its share"
        return heapq.heappop(self._released)[1]


class Shuffle:
    """Endless epochs over the rows 0 .. size - 1, each epoch in another order, any position without a table.

    A Feistel network with a keyed round function permutes the numbers below 2^bits >= size; numbers that fall outside
    are sent through it again until they fall inside (cycle walking), which keeps it a permutation of the rows. At most
    half of the numbers lie outside, so this takes two rounds on average.
    """

    ROUNDS = 8

    def __init__(self, size: int, seed: int, name: str) -> None:
        """Args:
        size: rows, at least 1.
        seed, name: key of the order.
        """
        assert size > 0, f"source {name} has no rows"
        self.size = size
        digest = hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=8).digest()
        self._key = np.uint64(int.from_bytes(digest, "little"))
        bits = max((size - 1).bit_length(), 2)
        self._low_bits, self._high_bits = np.uint64(bits // 2), np.uint64(bits - bits // 2)

    def rows(self, positions: np.ndarray) -> np.ndarray:
        """Rows at the given positions of the endless order.

        Args:
            positions: [N] int64, 0 or more; position p belongs to epoch p // size.

        Returns:
            [N] int64.
        """
        epoch, place = np.divmod(positions.astype(np.uint64), np.uint64(self.size))
        if len(epoch) and epoch.min() == epoch.max():
            epoch = epoch[:1]  # as a rule; saves half of the work
        return self.permute(place, mixed(self._key + epoch), np.full(len(place), self.size, dtype=np.uint64))

    def permute(self, places: np.ndarray, keys: np.ndarray, sizes: np.ndarray) -> np.ndarray:
        """Where numbers go under the permutations that ``keys`` name.

        Args:
            places: [N] uint64, each below its size.
            keys: [N] uint64, or [1]: the same for all.
            sizes: [N] uint64, at most ``self.size``; best not far below.

        Returns:
            [N] int64, each below its size.
        """
        rows = self._permute(places, keys)
        outside = np.flatnonzero(rows >= sizes)
        while len(outside):
            rows[outside] = self._permute(rows[outside], keys if len(keys) == 1 else keys[outside])
            outside = outside[rows[outside] >= sizes[outside]]
        return rows.astype(np.int64)

    def _permute(self, values: np.ndarray, keys: np.ndarray) -> np.ndarray:
        """One pass of the network over numbers below 2^bits; halves of unequal width change places in each round."""
        left_bits, right_bits = self._high_bits, self._low_bits
        one = np.uint64(1)
        left, right = values >> right_bits, values & ((one << right_bits) - one)
        for turn in range(self.ROUNDS):
            mask = (one << left_bits) - one
            left, right = right, left ^ (mixed(right + mixed(keys + np.uint64(turn))) & mask)
            left_bits, right_bits = right_bits, left_bits
        return (left << right_bits) | right


def shuffled(count: int, seed: int) -> np.ndarray:
    """The numbers 0 .. count - 1 in an order that depends on the seed alone, not on the version of numpy: [count]."""
    keys = mixed(np.arange(count, dtype=np.uint64) + mixed(np.uint64(seed % 2**64)))
    return np.argsort(keys, kind="stable")


def mixed(values: np.ndarray | np.uint64) -> np.ndarray:
    """Numbers made to look random: finalizer of splitmix64 (Steele, Lea and Flood, 2014), modulo 2^64."""
    x = np.atleast_1d(values) + np.uint64(0x9E3779B97F4A7C15)  # an array of our own: changed in place below
    x ^= x >> np.uint64(30)
    x *= np.uint64(0xBF58476D1CE4E5B9)
    x ^= x >> np.uint64(27)
    x *= np.uint64(0x94D049BB133111EB)
    x ^= x >> np.uint64(31)
    return x
