"""Which sample is drawn next: a source by weight, and within the source a shuffle that needs no table.

Both are pure functions of (seed, how often each source was drawn before), so the draw can go on from anywhere.
"""

from __future__ import annotations

import hashlib
import heapq
from collections.abc import Mapping, Sequence
from fractions import Fraction
from math import lcm

import numpy as np


class Mixture:
    """Draws sources so that every prefix of the draw holds each source within one of its exact share.

    R. Tijdeman, "The chairman assignment problem" (1980): with k sources of shares w, the j-th draw (j = 0, 1, ...)
    of a source is released once w * n >= j + e and due while w * n <= j + 1 - e, where e = 1 / (2k - 2) and n counts
    draws. Taking the earliest due of the released keeps every count within 1 - e of w * n. All arithmetic is in whole
    numbers, so there is no drift, however long the run.
    """

    def __init__(self, weights: Mapping[str, float]) -> None:
        """Args:
            weights: source -> weight >= 0; sources of weight 0 are left out. Decimals are taken as written.

        Raises:
            ValueError: no weight is above 0.
        """
        exact = {name: Fraction(str(weight)) for name, weight in sorted(weights.items()) if weight > 0}
        if not exact:
            raise ValueError(f"no source has a weight above 0: {dict(weights)}")
        self.sources = tuple(exact)
        total = sum(exact.values())
        scale = lcm(*((weight / total).denominator for weight in exact.values()))
        slack = max(2 * len(exact) - 2, 1)  # 1 / e
        self._weights = [int(weight / total * scale) * slack for weight in exact.values()]
        self._unit = scale * slack  # one draw; shares are _weights / _unit
        self._margin = scale if len(exact) > 1 else 0  # e of a draw

    def draw(self, counts: Sequence[int], number: int) -> tuple[np.ndarray, tuple[int, ...]]:
        """The next draws.

        Args:
            counts: draws of each source so far, in the order of ``sources``; all 0 at the start.
            number: how many more.

        Returns:
            Source numbers [number] int64, and the counts after them.
        """
        done = sum(counts)
        counts = list(counts)
        released: list[tuple[int, int]] = []  # (last draw at which it is in time, source)
        waiting = [(self._release(source, count), source) for source, count in enumerate(counts)]
        heapq.heapify(waiting)
        drawn = np.empty(number, dtype=np.int64)
        for place in range(number):
            while waiting and waiting[0][0] <= done + place + 1:
                source = heapq.heappop(waiting)[1]
                heapq.heappush(released, (self._due(source, counts[source]), source))
            source = heapq.heappop(released)[1]
            drawn[place] = source
            counts[source] += 1
            heapq.heappush(waiting, (self._release(source, counts[source]), source))
        return drawn, tuple(counts)

    def _release(self, source: int, draw: int) -> int:
        """Smallest n with w * n >= draw + e."""
        return -(-(draw * self._unit + self._margin) // self._weights[source])

    def _due(self, source: int, draw: int) -> int:
        """First n with w * n > draw + 1 - e: the draw must have happened by then."""
        return ((draw + 1) * self._unit - self._margin) // self._weights[source] + 1


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
        keys = _mix(self._key + epoch)
        rows = self._permute(place, keys)
        outside = np.flatnonzero(rows >= self.size)
        while len(outside):
            rows[outside] = self._permute(rows[outside], keys[outside])
            outside = outside[rows[outside] >= self.size]
        return rows.astype(np.int64)

    def _permute(self, values: np.ndarray, keys: np.ndarray) -> np.ndarray:
        """One pass of the network over numbers below 2^bits; halves of unequal width change places in each round."""
        left_bits, right_bits = self._high_bits, self._low_bits
        one = np.uint64(1)
        left, right = values >> right_bits, values & ((one << right_bits) - one)
        for turn in range(self.ROUNDS):
            mask = (one << left_bits) - one
            left, right = right, left ^ (_mix(right + _mix(keys + np.uint64(turn))) & mask)
            left_bits, right_bits = right_bits, left_bits
        return (left << right_bits) | right


def shuffled(count: int, seed: int) -> np.ndarray:
    """The numbers 0 .. count - 1 in an order that depends on the seed alone, not on the version of numpy: [count]."""
    keys = _mix(np.arange(count, dtype=np.uint64) + _mix(np.uint64(seed)))
    return np.argsort(keys, kind="stable")


def _mix(values: np.ndarray | np.uint64) -> np.ndarray:
    """Finalizer of splitmix64 (Steele, Lea and Flood, 2014), modulo 2^64."""
    x = np.atleast_1d(values) + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
