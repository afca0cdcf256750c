"""Which samples come next: the mixture chooses sources, each source has its rows in its own endless order.

The draw goes on from a few numbers (``DrawState``), at any position in the same time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import repeat

import numpy as np

from keye_train.data.blocks import row_order
from keye_train.data.corpus import Looked, Source
from keye_train.data.mixture import Mixture, MixtureState
from keye_train.data.shares import Weights
from keye_train.settings import DataSettings, MixtureUnit

FLOPS_PER_UNIT = 1000
"""Compute is counted in thousands of operations: whole numbers whose sum over a window stays below 2^63."""

LEAST_CHUNK = 256
"""Samples of a source that are looked at together, at first; twice as many each time."""


@dataclass(frozen=True)
class DrawRules:
    """What shares are of, how they change, and how rows are shuffled."""

    unit: MixtureUnit = MixtureUnit.samples
    later: tuple[tuple[int, Mapping[str, float]], ...] = ()  # (amount drawn, weights) from there on
    linear: bool = True  # between those points
    block_rows: int = 128  # see ``blocks``
    group_blocks: int = 8192

    @classmethod
    def from_settings(cls, data: DataSettings, mixture: str, token_capacity: int) -> DrawRules:
        """The rules of one mixture of a recipe.

        Args:
            data: settings, checked.
            mixture: its name.
            token_capacity: language tokens of all packs of the stage; see ``CurriculumSettings.over``.
        """
        curriculum = data.curricula.get(mixture)
        later: tuple[tuple[int, Mapping[str, float]], ...] = ()
        if curriculum is not None:
            over = curriculum.over or token_capacity
            if data.mixture_unit == MixtureUnit.compute:
                over /= FLOPS_PER_UNIT
            later = tuple((round(point.at * over), data.mixtures[point.mixture]) for point in curriculum.points)
        return cls(
            data.mixture_unit,
            later,
            curriculum is None or curriculum.linear,
            data.shuffle_block_rows,
            data.shuffle_group_blocks,
        )

    def weights(self, first: Mapping[str, float]) -> Weights:
        """Weights of the whole run, from those of its start."""
        return Weights.of(first, self.later, self.linear)


@dataclass(frozen=True)
class DrawState:
    """Position of a draw; numbers for each source, by name."""

    passed: tuple[int, ...]  # places of the source's endless order: drawn, or kept out by its filter
    mixture: MixtureState


@dataclass(frozen=True)
class Drawn:
    """The next samples."""

    sources: np.ndarray  # [N] int64 source numbers
    rows: np.ndarray  # [N] int64 rows of them
    filtered: tuple[int, ...]  # of each source: passed over on the way because its filter keeps them out
    state: DrawState  # behind them


class Draw:
    """The draw of one plan."""

    def __init__(
        self,
        sources: Sequence[Source],
        mixture: Mixture,
        rules: DrawRules,
        seed: int,
        amounts: Callable[[Looked], np.ndarray],
    ) -> None:
        """Args:
        sources: in the order of ``mixture.sources``.
        mixture: chooses among them.
        rules: how rows are shuffled.
        seed: decides every order.
        amounts: what samples count in a mixture by amounts: whole numbers, [N] int64.
        """
        self.mixture, self._sources, self._amounts = mixture, sources, amounts
        self.orders = [
            row_order(len(source), seed, source.name, rules.block_rows, rules.group_blocks) for source in sources
        ]

    @property
    def may_end(self) -> bool:
        """Whether there may come a point at which no source with a share is left."""
        return any(source.max_epochs is not None for source in self._sources)

    def start(self) -> DrawState:
        """Before the first sample."""
        return DrawState((0,) * len(self._sources), self.mixture.start())

    def next(self, state: DrawState, number: int) -> Drawn:
        """The next samples, fewer than ``number`` where every source has had its last epoch."""
        amounts = self._amounts if self.mixture.sized else None
        streams = [
            _Stream(source, order.rows, passed, amounts, number)
            for source, order, passed in zip(self._sources, self.orders, state.passed, strict=True)
        ]
        endless_ones = all(stream.plain and stream.stop is None for stream in streams)
        ahead = None if endless_ones else [stream.amounts() for stream in streams]
        sources, mixture = self.mixture.draw(state.mixture, number, ahead)
        rows = np.empty(len(sources), dtype=np.int64)
        passed, filtered = [], []
        for own, stream in enumerate(streams):
            mine = np.flatnonzero(sources == own)
            rows[mine], behind, out = stream.taken(len(mine))
            passed.append(behind)
            filtered.append(out)
        return Drawn(sources, rows, tuple(filtered), DrawState(tuple(passed), mixture))


@dataclass
class _Stream:
    """The samples of one source from a position on, looked at as far as they are asked for."""

    source: Source
    order: Callable[[np.ndarray], np.ndarray]  # positions -> rows
    first: int  # position
    count: Callable[[Looked], np.ndarray] | None  # amounts of samples; None: each counts 1
    most: int  # samples that can be drawn
    _rows: list[np.ndarray] = field(default_factory=list)
    _positions: list[np.ndarray] = field(default_factory=list)

    @property
    def stop(self) -> int | None:
        """Position behind the last epoch."""
        epochs = self.source.max_epochs
        return None if epochs is None else epochs * len(self.source)

    @property
    def plain(self) -> bool:
        """Whether samples need not be looked at: each counts 1, and none is filtered."""
        return self.count is None and self.source.filter is None

    def amounts(self) -> Iterator[int]:
        """What the samples that pass the filter count, one after another."""
        if self.plain:
            return repeat(1) if self.stop is None else repeat(1, self.stop - self.first)
        return self._look()

    def _look(self) -> Iterator[int]:
        position, chunk, idle = self.first, LEAST_CHUNK, 0
        while self.stop is None or position < self.stop:
            behind = position + chunk if self.stop is None else min(position + chunk, self.stop)
            positions = np.arange(position, behind)
            rows = self.order(positions)
            looked = self.source.look(rows)
            self._rows.append(rows[looked.keep])
            self._positions.append(positions[looked.keep])
            idle = 0 if looked.keep.any() else idle + len(positions)
            if idle > 2 * len(self.source):
                raise ValueError(
                    f"data.sources.{self.source.name}.filter={self.source.filter!r} keeps none of its "
                    f"{len(self.source)} samples: loosen it, or take the source out of the mixture"
                )
            counts = np.ones(len(rows), dtype=np.int64) if self.count is None else self.count(looked)
            yield from counts[looked.keep].tolist()
            position, chunk = behind, min(2 * chunk, self.most)

    def taken(self, number: int) -> tuple[np.ndarray, int, int]:
        """Rows of the first ``number`` samples, the position behind them, and how many the filter kept out before."""
        if self.plain:
            return self.order(self.first + np.arange(number)), self.first + number, 0
        if not number:
            ended = not self._rows or not sum(map(len, self._rows))
            behind = self.stop if ended and self.stop is not None and self._positions else self.first
            return np.empty(0, dtype=np.int64), behind, behind - self.first
        rows, positions = np.concatenate(self._rows), np.concatenate(self._positions)
        last = len(rows) == number and self.stop is not None
        behind = self.stop if last and self.stop is not None else int(positions[number - 1]) + 1
        return rows[:number], behind, behind - self.first - number
