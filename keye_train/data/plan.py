"""Who reads which sample when: windows of the draw -> packs -> global batches -> micro-steps of the ranks.

Everything here is a function of (index, recipe, seed). Every rank computes the same plan without a word to the others;
going on after an interruption, also at another world size, is the same function with another argument.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from fractions import Fraction

import numpy as np

from keye_train.data import balance as batching
from keye_train.data import exchange, packing
from keye_train.data import window as windows
from keye_train.data.columns import BLOCK_ROWS
from keye_train.data.corpus import SCAN_ROWS, Corpus, Source
from keye_train.data.cost import PackCost
from keye_train.data.draw import Draw, DrawRules
from keye_train.data.mixture import Mixture
from keye_train.data.overlong import Fitting
from keye_train.data.packing import Budget
from keye_train.data.planned import Dropped, GlobalBatch, Pack, PlannedSample, PlanState, assign, balance, seed_of
from keye_train.data.quarantine import exclude
from keye_train.data.window import OVER_BUDGET, Rules, Window, WindowPlanner
from keye_train.settings import MixtureUnit, Objective, TrainSettings

__all__ = [
    "AT_THE_END",
    "OVER_BUDGET",
    "Dropped",
    "GlobalBatch",
    "Pack",
    "Plan",
    "PlanState",
    "PlannedSample",
    "assign",
    "balance",
]

log = logging.getLogger(__name__)

AT_THE_END = "the data ended before a global batch was full"
"""Reason of the samples that are left when every source has had its last epoch."""

PLAN_VERSION = 4
"""Goes up whenever the same recipe and data give other global batches: no run goes on across it. A test keeps a digest
of toy plans. The constants of the planner need no new version: the fingerprint has them, see ``_constants``."""

ENOUGH_BATCHES = 8
"""Global batches in a window below which the plan warns: too few packs to find like ones among."""


@dataclass(frozen=True)
class _End:
    """Every source has had its last epoch."""

    dropped: tuple[Dropped, ...]  # since the last batch
    filtered: tuple[int, ...]


class Plan:
    """The plan of one stage."""

    def __init__(
        self,
        corpus: Corpus,
        weights: Mapping[str, float],
        budget: Budget,
        global_batch_packs: int,
        window_samples: int,
        seed: int,
        cost: PackCost,
        rules: DrawRules | None = None,
        balance_packs: int | None = None,
    ) -> None:
        """Args:
            corpus: the sources.
            weights: source -> weight in the mixture, at the start of the run.
            budget: of one pack.
            global_batch_packs: packs of one optimizer step over all ranks.
            window_samples: samples that are packed together, at least; a few more fill the last global batch.
            seed: decides every order.
            cost: what packs cost, see ``data.cost``.
            rules: what weights are shares of, how they change, how rows are shuffled.
            balance_packs: packs of like cost that global batches are made of, see ``data.balance_packs``.

        Raises:
            ValueError: a source of the mixture is unknown, is empty, or has no sample that fits into a pack; or
                ``balance_packs`` does not divide ``global_batch_packs``.
        """
        self.corpus, self.budget, self.cost, self.seed = corpus, budget, cost, seed
        self.global_batch_packs, self.window_samples = global_batch_packs, window_samples
        self.balance_packs = _balance_packs(global_batch_packs, balance_packs)
        self.rules = rules = rules or DrawRules()
        self.mixture = Mixture(rules.weights(weights), sized=rules.unit != MixtureUnit.samples)
        for name in self.mixture.sources:
            _check_source(corpus, name, budget)
        self._sources = [corpus.sources[name] for name in self.mixture.sources]
        window_rules = Rules(budget, cost, window_samples, global_batch_packs, self.balance_packs, rules.unit)
        self._planner = WindowPlanner(self._sources, window_rules)
        self._draw = Draw(self._sources, self.mixture, rules, seed, self._planner.amounts)
        self._warned = False
        described = [
            PLAN_VERSION,
            _constants(),
            corpus.fingerprint(),
            {name: str(weights.get(name, 0.0)) for name in self.mixture.sources},
            repr(rules),
            asdict(budget),
            global_batch_packs,
            window_samples,
            seed,
            self.balance_packs,
            asdict(cost),
        ]
        self.fingerprint = hashlib.sha256(json.dumps(described).encode()).hexdigest()

    @classmethod
    def from_settings(cls, settings: TrainSettings, cost: PackCost) -> Plan:
        """The plan of a run; opens the indexes of the sources that its mixture draws from.

        Raises:
            ValueError: see the constructor and ``Corpus.open``.
        """
        stage, data = settings.stage, settings.data
        weights = {name: weight for name, weight in data.mixtures[stage.mixture].items() if weight > 0}
        capacity = stage.steps * stage.global_batch_packs * stage.max_tokens
        rules = DrawRules.from_settings(data, stage.mixture, capacity)
        budget, names = Budget(stage.max_tokens, stage.max_patches), rules.weights(weights).sources
        corpus = Corpus.open(
            {name: data.sources[name] for name in names},
            settings.model.tokenizer,
            data.resolution,
            settings.model.text_tower.max_tokens if stage.objective == Objective.contrastive else None,
            data.storage,
            data.plan_cache,
            data.shuffle_group_blocks * -(-data.shuffle_block_rows // BLOCK_ROWS),
            {name: Fitting.from_settings(data, name, budget) for name in names},
        )
        exclude(corpus, data.quarantine)
        return cls(
            corpus,
            weights,
            budget,
            stage.global_batch_packs,
            data.window_samples,
            settings.seed,
            cost,
            rules,
            data.balance_packs,
        )

    @property
    def sources(self) -> tuple[str, ...]:
        """Names behind the source numbers."""
        return self.mixture.sources

    def source(self, number: int) -> Source:
        """The source behind a source number."""
        return self._sources[number]

    def start(self) -> PlanState:
        """State before the first step."""
        none = (0,) * len(self.sources)
        return PlanState(self.fingerprint, 0, 0, 0, none, none, none, 0, none, none, 0)

    def check_world_size(self, world_size: int) -> None:
        """Say where groups of like packs are smaller than a micro-step, so that its ranks wait for each other."""
        if world_size > self.balance_packs:
            log.info(
                "%d ranks read packs of one micro-step, and data.balance_packs=%d of them cost alike: ranks wait less "
                "for each other with data.balance_packs=%d, and batches are less alike in their sources",
                world_size,
                self.balance_packs,
                world_size,
            )

    def batches(self, state: PlanState | None = None) -> Iterator[tuple[GlobalBatch, PlanState]]:
        """Global batches, each with the state that continues behind it.

        Without end, unless sources have a last epoch and no other is left. What is then left over, less than a global
        batch, is reported as dropped by the last batch.

        Raises:
            ValueError: the state belongs to another plan.
        """
        found = self._batches(state)
        if not self._draw.may_end:
            yield from found  # type: ignore[misc]
            return
        held: tuple[GlobalBatch, PlanState] | None = None
        step = 0 if state is None else state.step
        for item in found:
            if isinstance(item, tuple):
                if held is not None:
                    yield held
                held = item
            elif held is not None:
                held = _with_end(held[0], item), held[1]
        if held is not None:
            yield held
        elif step == 0:
            raise ValueError(
                f"the data end before stage.global_batch_packs={self.global_batch_packs} packs are full: lower it, or "
                "raise max_epochs in data.sources"
            )

    def waiting(self, state: PlanState) -> tuple[tuple[int, int], ...]:
        """(source, row) of the samples drawn before the window of ``state`` that it packs, too. For tools and tests."""
        return () if state.ended else self._planner.left(self._draw, state.draw_before).names

    def _batches(self, state: PlanState | None) -> Iterator[tuple[GlobalBatch, PlanState] | _End]:
        state = state or self.start()
        if state.plan != self.fingerprint:
            raise ValueError(
                "the checkpoint's data position belongs to another plan: the data, their filters, epochs, mixture or "
                "curriculum, data.window_samples, data.resolution, data.overlong, data.downscale_least, "
                "data.quarantine, data.cost_file, data.balance_packs, data.shuffle_block_rows, "
                "data.shuffle_group_blocks, stage.max_tokens, stage.max_patches, stage.global_batch_packs, "
                "stage.trainable, the model, seed or the version of this program has changed. Restore them, or start a "
                "new run in another run_dir"
            )
        dropped: tuple[Dropped, ...] = ()
        none = (0,) * len(self.sources)
        while not state.ended:
            window = self._planner.plan(
                self._draw, state.draw, state.draw_before, seed_of(self.seed, "window", state.window)
            )
            self._check_window(window)
            # After a batch of this window its dropped samples have been reported.
            dropped += window.dropped if state.batch == 0 else ()
            filtered = window.filtered if state.batch == 0 else none
            behind = self._behind(state, window)
            for number in range(state.batch, len(window.batches)):
                seed = seed_of(self.seed, "steps", state.window, number)
                batch = GlobalBatch(state.step, window.packs(number), dropped, seed, filtered)
                state = replace(state, step=state.step + 1, batch=number + 1)
                behind = replace(behind, step=state.step)
                dropped, filtered = (), none
                yield batch, behind if state.batch == len(window.batches) else state
            if window.ended:
                yield _End(dropped + tuple(Dropped(source, row, AT_THE_END) for source, row in window.left), filtered)
            state = behind

    def _behind(self, state: PlanState, window: Window) -> PlanState:
        """Position behind the window that begins at ``state``."""
        return replace(
            state,
            window=state.window + 1,
            batch=0,
            drawn=window.draw.passed,
            filtered=_sum(state.filtered, window.filtered),
            spent=window.draw.mixture.spent,
            origin=window.draw.mixture.origin,
            before_drawn=state.drawn,
            before_spent=state.spent,
            before_origin=state.origin,
            ended=window.ended,
        )

    def _check_window(self, window: Window) -> None:
        """Warn, once, where a window is too small to balance."""
        batches = len(window.batches)
        if batches < ENOUGH_BATCHES and self.balance_packs > 1 and not window.ended and not self._warned:
            self._warned = True
            log.warning(
                "a window of data.window_samples=%d makes %d global batches: ranks wait less for each other where it "
                "makes %d or more, with data.window_samples=%d",
                self.window_samples,
                batches,
                ENOUGH_BATCHES,
                self.window_samples * -(-ENOUGH_BATCHES // batches),
            )


def _constants() -> dict[str, str]:
    """Every number in the code that decides which samples share packs and batches, by its name."""
    return {
        f"{module.__name__}.{name}": repr(value)
        for module in (batching, exchange, packing, windows)
        for name, value in sorted(vars(module).items())
        if name.isupper() and isinstance(value, int | float | tuple | Fraction)
    }


def _with_end(last: GlobalBatch, end: _End) -> GlobalBatch:
    """The last batch, which also accounts for what came behind it."""
    return replace(last, dropped=last.dropped + end.dropped, filtered=_sum(last.filtered, end.filtered))


def _sum(left: tuple[int, ...], right: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(a + b for a, b in zip(left, right, strict=True))


def _balance_packs(global_batch_packs: int, chosen: int | None) -> int:
    """Packs of a group of like cost: as chosen, or the largest divisor of a global batch up to a quarter of it."""
    if chosen is None:
        return max(n for n in range(1, max(global_batch_packs // 4, 1) + 1) if global_batch_packs % n == 0)
    if global_batch_packs % chosen:
        raise ValueError(
            f"data.balance_packs={chosen} does not divide stage.global_batch_packs={global_batch_packs}: set it to the "
            "number of ranks, or to null"
        )
    return chosen


def _check_source(corpus: Corpus, name: str, budget: Budget) -> None:
    source = corpus.sources.get(name)
    if source is None:
        raise ValueError(f"the mixture names the source '{name}', which data.sources does not have")
    unreadable = filtered = 0
    for start in range(0, len(source), SCAN_ROWS):  # as a rule, the first look finds one
        looked = source.look(np.arange(start, min(start + SCAN_ROWS, len(source))))
        fits = budget.fits(looked.sizes.tokens, looked.sizes.patches) & looked.keep
        fits[list(looked.errors)] = False
        if fits.any():
            return
        unreadable += len(looked.errors)
        filtered += int((~looked.keep).sum())
    raise ValueError(
        f"data.sources.{name}: none of its {len(source)} samples can be used ({unreadable} are unreadable, {filtered} "
        f"are kept out by its filter, the others exceed stage.max_tokens={budget.max_tokens} or "
        f"stage.max_patches={budget.max_patches}); see `keye-data stats`, and raise the budgets, lower "
        "data.resolution, set data.overlong, loosen the filter or take the source out of the mixture"
    )
