"""How much of a draw each source should have had: the exact integral of its share, in whole numbers.

Shares that stay, shares in steps and shares in straight lines are one thing here: pieces of S(T) = a + b x + c x^2 with
x = T - start, all over one common denominator. So "has this source had its share?" is a comparison of whole numbers,
and the T at which it has is found by one square root and a step or two, however far the run is.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from math import isqrt, lcm

import numpy as np

NEVER = 1 << 256
"""Later than any amount."""

Knot = tuple[int, Mapping[str, Fraction]]


@dataclass(frozen=True)
class Weights:
    """Weights of sources along a run.

    At each knot the weights are made shares (they are divided by their sum); between two knots shares run in a straight
    line, or with ``linear`` off they keep the values of the knot before. Behind the last knot they stay.
    """

    knots: tuple[Knot, ...]  # (amount drawn so far, source -> weight), amounts ascending from 0
    linear: bool = True

    @classmethod
    def of(
        cls, weights: Mapping[str, float], later: Sequence[tuple[int, Mapping[str, float]]] = (), linear: bool = True
    ) -> Weights:
        """Weights as a recipe writes them; decimals are taken as written.

        Args:
            weights: source -> weight >= 0 at the start.
            later: (amount drawn, weights) from there on; amounts above 0, ascending.
            linear: see the class.

        Raises:
            ValueError: no weight is above 0 at some point, or the points are out of order.
        """
        knots: list[Knot] = []
        for amount, point in ((0, weights), *later):
            exact = {name: Fraction(str(weight)) for name, weight in sorted(point.items()) if weight > 0}
            if not exact:
                raise ValueError(f"no source has a weight above 0: {dict(point)}")
            if knots and amount <= knots[-1][0]:
                raise ValueError(f"a mixture changes at {amount} after it has changed at {knots[-1][0]}")
            knots.append((amount, exact))
        return cls(tuple(knots), linear)

    @property
    def sources(self) -> tuple[str, ...]:
        """Every source that has a weight at some point, by name."""
        return tuple(sorted({name for _, weights in self.knots for name in weights}))

    def curves(self, origin: int, among: Collection[str], units: int) -> tuple[dict[str, ShareCurve], int]:
        """What each of some sources should have had since ``origin``.

        The shares at ``origin`` and at every later knot are divided by their sum over ``among``. Where all of them have
        share 0 at a knot, those of the nearest knot with shares hold, later ones first.

        Args:
            origin: amount drawn when the count begins.
            among: the sources that are still there.
            units: the scale is to be a multiple of it.

        Returns:
            Curves with ``scale * S`` in whole numbers, and the scale. No curves where no source has a share any more.
        """
        knots = [(amount, self._shares(weights)) for amount, weights in self.knots]
        later = [knot for knot in knots if knot[0] > origin]
        points = [(origin, self._at(knots, origin)), *later]
        if not self.linear:
            points = [(amount, self._at(knots, amount)) for amount, _ in points]
        rows = [[shares.get(name, Fraction(0)) for name in among] for _, shares in points]
        full = [number for number, row in enumerate(rows) if sum(row)]
        if not full:
            return {}, units
        nearest = [min((other < place, abs(other - place), other) for other in full)[2] for place in range(len(rows))]
        rows = [[share / sum(rows[other]) for share in rows[other]] for other in nearest]
        starts = [amount for amount, _ in points]
        pieces = {
            name: _pieces(starts, [row[column] for row in rows], self.linear) for column, name in enumerate(among)
        }
        scale = lcm(units, *(value.denominator for own in pieces.values() for piece in own for value in piece))
        return {
            name: ShareCurve(starts, [tuple(int(value * scale) for value in piece) for piece in own])
            for name, own in pieces.items()
        }, scale

    @staticmethod
    def _shares(weights: Mapping[str, Fraction]) -> dict[str, Fraction]:
        total = sum(weights.values())
        return {name: weight / total for name, weight in weights.items()}

    def _at(self, knots: list[tuple[int, dict[str, Fraction]]], amount: int) -> dict[str, Fraction]:
        """Shares at one point."""
        before = max(number for number, knot in enumerate(knots) if knot[0] <= amount)
        start, left = knots[before]
        if not self.linear or before + 1 == len(knots):
            return left
        end, right = knots[before + 1]
        part = Fraction(amount - start, end - start)
        return {
            name: (1 - part) * left.get(name, Fraction(0)) + part * right.get(name, Fraction(0))
            for name in sorted({*left, *right})
        }


def _pieces(starts: list[int], shares: list[Fraction], linear: bool) -> list[tuple[Fraction, Fraction, Fraction]]:
    pieces = []
    base = Fraction(0)
    for number, share in enumerate(shares):
        bend = Fraction(0)
        if number + 1 < len(shares):
            length = starts[number + 1] - starts[number]
            bend = (shares[number + 1] - share) / (2 * length) if linear else bend
        pieces.append((base, share, bend))
        if number + 1 < len(shares):
            base += share * length + bend * length**2
    return pieces


class ShareCurve:
    """scale * S(T) of one source: whole numbers at whole T, never falling."""

    def __init__(self, starts: Sequence[int], pieces: Sequence[tuple[int, ...]]) -> None:
        self._starts = list(starts)
        self._pieces = list(pieces)
        self._bases = [piece[0] for piece in pieces]
        # scale * share where it stays, the usual case: then T is found in one division; else 0.
        self.rate = self._pieces[0][1] if len(self._pieces) == 1 and not self._pieces[0][2] else 0

    def at(self, total: int) -> int:
        """scale * S at the amount ``total`` drawn, not before the first start."""
        piece = max(number for number, start in enumerate(self._starts) if start <= total)
        a, b, c = self._pieces[piece]
        x = total - self._starts[piece]
        return a + b * x + c * x * x

    def reach(self, amount: int) -> int:
        """Smallest T with scale * S(T) >= amount; NEVER where there is none."""
        if self.rate:
            return self._starts[0] + max(-(-(amount - self._bases[0]) // self.rate), 0)
        piece = max(bisect_left(self._bases, amount) - 1, 0)
        a, b, c = self._pieces[piece]
        rest, start = amount - a, self._starts[piece]
        if rest <= 0:
            return start
        if c == 0:
            return start - (-rest // b) if b else NEVER
        x = 2 * rest // (b + isqrt(b * b + 4 * c * rest))  # within a step of the root, from either side
        while (b + c * x) * x < rest:
            x += 1
        while x > 0 and (b + c * (x - 1)) * (x - 1) >= rest:
            x -= 1
        return start + x

    def reach_many(self, amount: int, more: np.ndarray) -> np.ndarray:
        """``reach`` of ``amount + more``, where the share stays (``rate`` is not 0).

        Args:
            amount: any size.
            more: [N] int64, 0 or more.
        """
        whole, rest = divmod(amount - self._bases[0], self.rate)
        return self._starts[0] + np.maximum(whole - (-(rest + more) // self.rate), 0)
