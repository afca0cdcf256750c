"""One window of the plan: draw until whole global batches are full, pack what was drawn, form the batches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice

import numpy as np

from keye_train.data.balance import form_batches
from keye_train.data.corpus import Looked, Sizes, Source
from keye_train.data.cost import PackCost
from keye_train.data.draw import FLOPS_PER_UNIT, Draw, DrawState
from keye_train.data.packing import Budget, Packing, pack_samples
from keye_train.data.planned import Dropped, Pack, PlannedSample
from keye_train.settings import MixtureUnit

OVER_BUDGET = "over budget: "
"""How the reason of a sample begins that exceeds stage.max_tokens or stage.max_patches."""

RESERVE = 0.002
"""Share of tokens that a window draws beyond its packs, so that the last gaps find samples of their size."""


@dataclass(frozen=True)
class Window:
    """The plan of one window."""

    sources: np.ndarray  # [N] samples that fit
    rows: np.ndarray  # [N]
    sizes: Sizes
    packing: Packing
    costs: np.ndarray  # [packs]
    batches: np.ndarray  # [batches, G] packs
    dropped: tuple[Dropped, ...]
    draw: DrawState  # behind it
    filtered: tuple[int, ...]  # of each source, passed over on the way
    ended: bool  # every source has had its last epoch

    @property
    def carried(self) -> tuple[tuple[int, int], ...]:
        """(source, row) of the samples left over for the next window."""
        left = self.packing.left
        return tuple(zip(self.sources[left].tolist(), self.rows[left].tolist(), strict=True))

    def packs(self, batch: int) -> tuple[Pack, ...]:
        """The packs of one of its batches, with their samples."""
        packs = self.batches[batch]
        members = [self.packing.members(pack) for pack in packs.tolist()]
        chosen = np.concatenate(members)
        columns = (self.sources, self.rows, self.sizes.tokens, self.sizes.patches)
        samples = map(PlannedSample._make, zip(*(column[chosen].tolist() for column in columns), strict=True))
        counts, costs = map(len, members), self.costs[packs].tolist()
        return tuple(Pack(tuple(islice(samples, count)), cost) for count, cost in zip(counts, costs, strict=True))


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

    def plan(self, draw: Draw, state: DrawState, carried: Sequence[tuple[int, int]], seed: int) -> Window:
        """Draw until the samples fill whole global batches, pack them, and form the batches.

        A window that stopped at ``window_samples`` would leave up to a global batch of samples for the next, and the
        state of a checkpoint would have to name each of them. Where the data end, as many batches as are full.

        Args:
            draw: where samples come from.
            state: its position.
            carried: (source, row) of the samples that the window before left over.
            seed: of the order of the batches.
        """
        rules = self._rules
        waiting = np.array(carried, dtype=np.int64).reshape(-1, 2)
        sources, rows = waiting.T
        sizes = self._look(sources, rows).sizes
        dropped: list[Dropped] = []
        filtered = np.zeros(len(self._sources), dtype=np.int64)
        ended, target, number = False, 0, rules.window_samples
        while number > 0 and not ended:
            drawn = draw.next(state, number)
            state, ended = drawn.state, len(drawn.rows) < number
            fit, fresh, out = self._sort_out(drawn.sources, drawn.rows)
            sources = np.concatenate([sources, drawn.sources[fit]])
            rows = np.concatenate([rows, drawn.rows[fit]])
            sizes = Sizes.concatenate([sizes, fresh])
            dropped += out
            filtered += drawn.filtered
            target = target or self._whole_batches(sizes)
            number = self._missing(sizes, target)
        if number > 0:  # the data ended
            target = rules.budget.packs(sizes.tokens, sizes.patches, multiple=rules.batch_packs)
        packing = pack_samples(sizes.tokens, sizes.patches, rules.budget, target, first=len(waiting))
        costs = rules.cost(sizes.map(packing.sums))
        of_source = [packing.sums((sources == number).astype(np.int64)) for number in range(len(self._sources))]
        return Window(
            sources=sources,
            rows=rows,
            sizes=sizes,
            packing=packing,
            costs=costs,
            batches=form_batches(costs, np.stack(of_source, axis=1), rules.batch_packs, rules.like_packs, seed),
            dropped=tuple(dropped),
            draw=state,
            filtered=tuple(filtered.tolist()),
            ended=ended,
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

    def _whole_batches(self, sizes: Sizes) -> int:
        """Packs that these samples fill, rounded up to whole global batches."""
        packs, batch_packs = self._rules.budget.packs(sizes.tokens, sizes.patches), self._rules.batch_packs
        return max(-(-packs // batch_packs), 1) * batch_packs

    def _missing(self, sizes: Sizes, packs: int) -> int:
        """How many more samples it takes, going by those at hand, to fill packs; 0: there are enough."""
        count, budget = len(sizes.tokens), self._rules.budget
        if not count:
            return self._rules.window_samples
        filled = max(sizes.tokens.sum() / budget.max_tokens, sizes.patches.sum() / budget.max_patches)
        wanted = packs * (1 + RESERVE)
        if filled >= wanted:
            return 0
        return min(int((wanted - filled) / filled * count) + 1, self._rules.window_samples)

    def _sort_out(self, sources: np.ndarray, rows: np.ndarray) -> tuple[np.ndarray, Sizes, list[Dropped]]:
        """Draws that can be packed, their sizes, and the others with the reason."""
        looked = self._look(sources, rows)
        fit = self._rules.budget.fits(looked.sizes.tokens, looked.sizes.patches)
        reasons: dict[int, str] = {}
        for place in np.flatnonzero(~fit).tolist():
            tokens, patches = int(looked.sizes.tokens[place]), int(looked.sizes.patches[place])
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
