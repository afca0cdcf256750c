"""One window of the plan: draw until whole global batches are full, pack what was drawn, form the batches.

A window has two parts, packed apart, so that a checkpoint need not name the samples that a window leaves over:

- The *main* part is packed from its own draws alone. What finds no place there waits for the next window. So what waits
  is a function of where the main part began in the draw, and is found again from that position.
- The *rest*, about one pack of ``REST``, takes all that waits from the window before and the next draws, as many as fit
  with all of them placed. Nothing is left over there.

The last window, in which the data end, packs all that there is together.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import repeat

import numpy as np

from keye_train.data.balance import form_batches
from keye_train.data.corpus import Looked, Sizes, Source
from keye_train.data.cost import PackCost
from keye_train.data.draw import FLOPS_PER_UNIT, Draw, DrawState
from keye_train.data.packing import Budget, Packing, pack_samples
from keye_train.data.planned import Dropped, Pack
from keye_train.settings import MixtureUnit

OVER_BUDGET = "over budget: "
"""How the reason of a sample begins that exceeds stage.max_tokens or stage.max_patches."""

RESERVE = 0.0015
"""Share of tokens that a main part draws beyond its packs, so that the last gaps find samples of their size."""

REST = 128
"""One of so many packs is made of samples that wait and of the draws behind the main part."""

GIVEN_BACK = 2
"""Where some samples of the rest find no place, draws of so many times their size are given back, and the others are
packed anew."""


@dataclass(frozen=True)
class Samples:
    """Samples that fit into a pack, as parallel columns."""

    sources: np.ndarray  # [N] int64 source numbers
    rows: np.ndarray  # [N] int64
    sizes: Sizes

    def __len__(self) -> int:
        return len(self.rows)

    def take(self, places: np.ndarray) -> Samples:
        """Some of them."""
        return Samples(self.sources[places], self.rows[places], self.sizes.take(places))

    @property
    def names(self) -> tuple[tuple[int, int], ...]:
        """(source, row) of each."""
        return tuple(zip(self.sources.tolist(), self.rows.tolist(), strict=True))

    @classmethod
    def concatenate(cls, parts: Sequence[Samples]) -> Samples:
        """One after another."""
        none = np.zeros(0, dtype=np.int64)
        return cls(
            np.concatenate([none, *(part.sources for part in parts)]),
            np.concatenate([none, *(part.rows for part in parts)]),
            Sizes.concatenate([part.sizes for part in parts]),
        )


@dataclass(frozen=True)
class Taken:
    """Some draws: what fits, what does not, and where they end."""

    samples: Samples
    places: np.ndarray  # [N] int64: which of the draws they are
    draws: int
    dropped: tuple[Dropped, ...]
    filtered: np.ndarray  # [sources] int64, passed over on the way
    draw: DrawState  # behind them
    ended: bool  # every source has had its last epoch

    def and_then(self, behind: Taken) -> Taken:
        """Both, one after the other."""
        return Taken(
            Samples.concatenate([self.samples, behind.samples]),
            np.concatenate([self.places, self.draws + behind.places]),
            self.draws + behind.draws,
            self.dropped + behind.dropped,
            self.filtered + behind.filtered,
            behind.draw,
            behind.ended,
        )


@dataclass(frozen=True)
class Main:
    """The main part of a window."""

    taken: Taken
    packing: Packing  # without packs where the data ended: what is drawn then is packed with what waits

    @property
    def left(self) -> Samples:
        """What waits for the next window."""
        return self.taken.samples.take(self.packing.left)


@dataclass(frozen=True)
class Window:
    """The plan of one window."""

    samples: Samples
    packing: Packing
    costs: np.ndarray  # [packs]
    batches: np.ndarray  # [batches, G] packs
    dropped: tuple[Dropped, ...]
    draw: DrawState  # behind it
    filtered: tuple[int, ...]  # of each source, passed over on the way
    ended: bool  # every source has had its last epoch: there is no further window

    @property
    def left(self) -> tuple[tuple[int, int], ...]:
        """(source, row) of the samples left over."""
        return self.samples.take(self.packing.left).names

    def packs(self, batch: int) -> tuple[Pack, ...]:
        """The packs of one of its batches, with their samples."""
        packs, starts = self.batches[batch], self.packing.starts
        bounds = starts[packs].tolist(), starts[packs + 1].tolist()
        return tuple(map(Pack, repeat(self._columns), *bounds, self.costs[packs].tolist()))

    @cached_property
    def _columns(self) -> np.ndarray:
        """[placed, 4] int64, what ``PlannedSample`` has, in the order of the packing."""
        own = self.samples
        columns = (own.sources, own.rows, own.sizes.tokens, own.sizes.patches)
        return np.stack(columns, axis=1)[self.packing.order]


@dataclass(frozen=True)
class Rules:
    """What windows are made by."""

    budget: Budget
    cost: PackCost
    window_samples: int
    batch_packs: int  # packs of a global batch
    like_packs: int  # packs of like cost that batches are made of, see ``balance``
    unit: MixtureUnit


class WindowPlanner:
    """Plans one window after another."""

    def __init__(self, sources: Sequence[Source], rules: Rules) -> None:
        self._sources, self._rules = sources, rules
        self._last: tuple[DrawState, Main] | None = None  # what the next window asks for

    def plan(self, draw: Draw, state: DrawState, before: DrawState | None, seed: int) -> Window:
        """Draw until the samples fill whole global batches, pack them, and form the batches.

        Args:
            draw: where samples come from.
            state: its position.
            before: its position at the window before, whose samples without a place are packed, too; None: there is
                none.
            seed: of the order of the batches.
        """
        waiting = self.left(draw, before)
        main = self._main(draw, state)
        taken = main.taken
        if not taken.ended:
            rest, packing, taken = self._rest(draw, main, waiting)
            samples = Samples.concatenate([main.taken.samples, rest])
            packing = main.packing.and_then(len(main.taken.samples) + np.arange(len(rest)), packing)
        if taken.ended:
            samples = Samples.concatenate([waiting, taken.samples])
            packing = self._pack_all(samples)
        rules = self._rules
        costs = rules.cost(samples.sizes.map(packing.sums))
        kinds = range(len(self._sources))
        of_source = [packing.sums((samples.sources == number).astype(np.int64)) for number in kinds]
        return Window(
            samples=samples,
            packing=packing,
            costs=costs,
            batches=form_batches(costs, np.stack(of_source, axis=1), rules.batch_packs, rules.like_packs, seed),
            dropped=taken.dropped,
            draw=taken.draw,
            filtered=tuple(taken.filtered.tolist()),
            ended=taken.ended,
        )

    def left(self, draw: Draw, before: DrawState | None) -> Samples:
        """What waits behind the window that began at a position; looked up, or its main part is packed once more."""
        if before is None:
            return Samples.concatenate([])
        if self._last is None or self._last[0] != before:
            self._main(draw, before)
        assert self._last is not None
        return self._last[1].left

    def _main(self, draw: Draw, state: DrawState) -> Main:
        """Draw and pack the main part of the window at ``state``."""
        rules = self._rules
        taken = self._take(draw, state, rules.window_samples)
        packs = self._main_packs(taken.samples.sizes)
        while (number := self._missing(taken.samples.sizes, packs)) and not taken.ended:
            taken = taken.and_then(self._take(draw, taken.draw, number))
        packing = self._pack(taken.samples, 0 if taken.ended else packs)
        self._last = state, Main(taken, packing)
        return self._last[1]

    def _rest(self, draw: Draw, main: Main, waiting: Samples) -> tuple[Samples, Packing, Taken]:
        """The rest of a window: its samples, their packing with all of them placed, and what the window took in all.

        Where the data end before its packs are full, all that was taken is returned, without packs.
        """
        behind = main.taken.draw
        packs = self._rest_packs(len(main.packing), waiting)
        a_sample = self._filled(main.taken.samples.sizes) / len(main.taken.samples)
        looked: Taken | None = None
        while (room := packs - self._filled(waiting.sizes, *([looked.samples.sizes] if looked else []))) > 0:
            more = self._take(draw, looked.draw if looked else behind, int(room / a_sample * 1.05) + 1)
            looked = looked.and_then(more) if looked else more
            if looked.ended:
                return waiting, Packing.none(len(waiting)), main.taken.and_then(looked)
        if looked is None:
            return waiting, self._pack(waiting, packs), main.taken
        fresh, count = looked.samples, self._most(waiting, looked.samples, packs)
        least = max(packs - len(waiting), 0)  # so many, each in a pack of its own, always find a place
        while True:
            samples = Samples.concatenate([waiting, fresh.take(np.arange(count))])
            packing = self._pack(samples, packs)
            if not len(packing.left):
                break
            assert count > least, "samples without a place where each can have a pack of its own"
            excess = GIVEN_BACK * self._filled(samples.sizes.take(packing.left))
            count = max(min(self._most(waiting, fresh, self._filled(samples.sizes) - excess), count - 1), least)
        draws = int(looked.places[count - 1]) + 1 if count else 0
        return samples, packing, main.taken.and_then(self._take(draw, behind, draws))

    def _rest_packs(self, main_packs: int, waiting: Samples) -> int:
        """Packs that complete global batches and hold all that waits."""
        batch_packs = self._rules.batch_packs
        packs = -main_packs % batch_packs
        while packs < len(waiting):  # else each can have a pack of its own
            if self._filled(waiting.sizes) <= packs and not len(self._pack(waiting, packs).left):
                break
            packs += batch_packs
        return packs

    def _most(self, waiting: Samples, fresh: Samples, packs: float) -> int:
        """How many of the first of ``fresh`` do not exceed packs together with what waits."""
        budget = self._rules.budget
        tokens = waiting.sizes.tokens.sum() + fresh.sizes.tokens.cumsum()
        patches = waiting.sizes.patches.sum() + fresh.sizes.patches.cumsum()
        over = (tokens > packs * budget.max_tokens) | (patches > packs * budget.max_patches)
        return int(over.argmax()) if over.any() else len(fresh)

    def _pack(self, samples: Samples, packs: int) -> Packing:
        return pack_samples(samples.sizes.tokens, samples.sizes.patches, self._rules.budget, packs)

    def _pack_all(self, samples: Samples) -> Packing:
        """As many whole global batches as samples fill; what finds no place is packed again."""
        packing = Packing.none(len(samples))
        while True:
            left = samples.take(packing.left)
            packs = self._rules.budget.packs(left.sizes.tokens, left.sizes.patches, multiple=self._rules.batch_packs)
            if not packs:
                return packing
            packing = packing.and_then(packing.left, self._pack(left, packs))

    def _take(self, draw: Draw, state: DrawState, number: int) -> Taken:
        """The next draws, fewer where every source has had its last epoch."""
        drawn = draw.next(state, number)
        places, sizes, dropped = self._sort_out(drawn.sources, drawn.rows)
        return Taken(
            Samples(drawn.sources[places], drawn.rows[places], sizes),
            places,
            len(drawn.rows),
            tuple(dropped),
            np.array(drawn.filtered, dtype=np.int64),
            drawn.state,
            len(drawn.rows) < number,
        )

    def amounts(self, looked: Looked) -> np.ndarray:
        """What samples count in a mixture of tokens or compute: 0 for those that will not be trained on."""
        if self._rules.unit == MixtureUnit.compute:
            costs = self._rules.cost(looked.sizes)
            amounts = np.maximum(np.rint(costs / FLOPS_PER_UNIT), 1).astype(np.int64)
        else:
            amounts = looked.sizes.tokens.copy()
        amounts[~self._rules.budget.fits(looked.sizes.tokens, looked.sizes.patches)] = 0
        amounts[list(looked.errors)] = 0
        return amounts

    def _main_packs(self, sizes: Sizes) -> int:
        """Packs of the main part of a window that has these samples, and some more to fill whole global batches."""
        packs, batch_packs = self._rules.budget.packs(sizes.tokens, sizes.patches), self._rules.batch_packs
        total = max(-(-packs // batch_packs), 1) * batch_packs
        return max(total - -(-total // REST), 1)

    def _missing(self, sizes: Sizes, packs: int) -> int:
        """How many more samples it takes, going by those at hand, to fill packs; 0: there are enough."""
        count = len(sizes.tokens)
        if not count:
            return self._rules.window_samples
        filled, wanted = self._filled(sizes), packs * (1 + RESERVE)
        if filled >= wanted:
            return 0
        return min(int((wanted - filled) / filled * count) + 1, self._rules.window_samples)

    def _filled(self, *sizes: Sizes) -> float:
        """How many packs samples fill, by the scarcer budget."""
        tokens, patches = sum(int(one.tokens.sum()) for one in sizes), sum(int(one.patches.sum()) for one in sizes)
        return max(tokens / self._rules.budget.max_tokens, patches / self._rules.budget.max_patches)

    def _sort_out(self, sources: np.ndarray, rows: np.ndarray) -> tuple[np.ndarray, Sizes, list[Dropped]]:
        """Draws that can be packed, their sizes, and the others with the reason."""
        looked = self._look(sources, rows)
        fit = self._rules.budget.fits(looked.sizes.tokens, looked.sizes.patches)
        reasons: dict[int, str] = {}
        over = np.flatnonzero(~fit)
        numbers = (over, looked.sizes.tokens[over], looked.sizes.patches[over])
        for place, tokens, patches in zip(*(one.tolist() for one in numbers), strict=True):
            reasons[place] = _over_budget(tokens, patches, self._rules.budget)
        reasons |= looked.errors
        fit[list(reasons)] = False
        places = np.flatnonzero(fit)
        dropped = [Dropped(int(sources[place]), int(rows[place]), reasons[place]) for place in sorted(reasons)]
        return places, looked.sizes.take(places), dropped

    def _look(self, sources: np.ndarray, rows: np.ndarray) -> Looked:
        """What is known of samples of several sources."""
        order = np.argsort(sources, kind="stable")
        bounds = np.searchsorted(sources[order], np.arange(len(self._sources) + 1)).tolist()
        parts: list[Looked] = []
        errors: dict[int, str] = {}
        for source, start, stop in zip(self._sources, bounds[:-1], bounds[1:], strict=True):
            own = source.look(rows[order[start:stop]])
            parts.append(own)
            errors |= {int(order[start + place]): reason for place, reason in own.errors.items()}
        back = np.empty_like(order)
        back[order] = np.arange(len(order))
        sizes = Sizes.concatenate([part.sizes for part in parts]).take(back)
        return Looked(sizes, np.concatenate([part.keep for part in parts])[back], errors)


def _over_budget(tokens: int, patches: int, budget: Budget) -> str:
    over = []
    if tokens > budget.max_tokens:
        over.append(f"{tokens} tokens > stage.max_tokens={budget.max_tokens}")
    if patches > budget.max_patches:
        over.append(f"{patches} patches > stage.max_patches={budget.max_patches}")
    return OVER_BUDGET + ", ".join(over)
