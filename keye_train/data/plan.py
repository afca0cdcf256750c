"""Who reads which sample when: windows of the draw -> packs -> global batches -> micro-steps of the ranks.

Everything here is a function of (index, recipe, seed). Every rank computes the same plan without a word to the others;
going on after an interruption, also at another world size, is the same function with another argument.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from keye_train.data.corpus import SCAN_ROWS, Corpus, Looked, Sizes, Source
from keye_train.data.draw import FLOPS_PER_UNIT, Draw, DrawRules, DrawState
from keye_train.data.mixture import Mixture, MixtureState, shuffled
from keye_train.data.packing import Budget, Packing, pack_samples
from keye_train.model.configuration import KeyeConfig
from keye_train.model.flops import FlopCoefficients
from keye_train.settings import MixtureUnit, Objective, TrainSettings

log = logging.getLogger(__name__)

OVER_BUDGET = "over budget: "
"""How the reason of a sample begins that exceeds stage.max_tokens or stage.max_patches."""

AT_THE_END = "the data ended before a global batch was full"
"""Reason of the samples that are left when every source has had its last epoch."""

CostFunction = Callable[[Sizes], np.ndarray]
"""Cost of packs, [N] float64, from what they hold: FLOPs of both towers, in any unit."""


def flop_cost(config: KeyeConfig, objective: Objective = Objective.language) -> CostFunction:
    """Cost of packs by ``model.flops``.

    With the contrastive objective only the vision tower counts: captions are padded alike, and a caption decoder, small
    beside the tower, follows the number of patches.
    """
    flops = FlopCoefficients.of(config)
    language = 1.0 if objective == Objective.language else 0.0

    def cost(sizes: Sizes) -> np.ndarray:
        pairs = (sizes.tokens_squared + sizes.tokens) / 2  # a causal model sees l * (l + 1) / 2 of a sample
        return (
            language * (flops.language_token * sizes.tokens + flops.language_pair * pairs)
            + flops.vision_patch * sizes.patches
            + flops.vision_pair * sizes.patches_squared
        )

    return cost


@dataclass(frozen=True)
class PlannedSample:
    """One sample of a pack."""

    source: int  # number in Plan.sources
    row: int  # of that source
    tokens: int
    patches: int


@dataclass(frozen=True)
class Pack:
    """What one rank reads in one micro-step."""

    samples: tuple[PlannedSample, ...]
    cost: float

    @property
    def tokens(self) -> int:
        """Language tokens."""
        return sum(sample.tokens for sample in self.samples)

    @property
    def patches(self) -> int:
        """Vision patches."""
        return sum(sample.patches for sample in self.samples)


@dataclass(frozen=True)
class Dropped:
    """A sample that was drawn and will not be read."""

    source: int
    row: int
    reason: str


@dataclass(frozen=True)
class GlobalBatch:
    """What all ranks together read in one optimizer step."""

    step: int  # optimizer step, from 0
    packs: tuple[Pack, ...]
    dropped: tuple[Dropped, ...]  # drawn since the batch before, and given up
    seed: int  # of the order of its micro-steps


@dataclass(frozen=True)
class PlanState:
    """Position in a plan: what a checkpoint keeps of the data. It does not grow with the corpus or with time."""

    plan: str  # fingerprint of the plan
    step: int  # global batches given out
    window: int  # windows finished
    batch: int  # global batches given out of the current window
    drawn: tuple[int, ...]  # places of each source's order passed before the current window, those below included
    carried: tuple[tuple[int, int], ...]  # (source, row) drawn earlier that the current window packs, too
    filtered: tuple[int, ...]  # of the places passed: kept out by the filter of the source
    spent: tuple[int, ...]  # of each source in the unit of the mixture, since ``origin``
    origin: int  # drawn in all when a source last left the mixture

    def to_json(self) -> dict[str, Any]:
        """Plain value for a checkpoint."""
        return asdict(self)

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> PlanState:
        """Inverse of ``to_json``, also after a round trip through a JSON file."""
        carried = tuple((int(source), int(row)) for source, row in value["carried"])
        numbers = {name: tuple(value[name]) for name in ("drawn", "filtered", "spent")}
        return cls(**{**value, **numbers, "carried": carried})

    @property
    def draw(self) -> DrawState:
        """Position of the draw."""
        return DrawState(self.drawn, MixtureState(self.spent, self.origin))


@dataclass(frozen=True)
class _Window:
    """The plan of one window."""

    sources: np.ndarray  # [N] samples that fit
    rows: np.ndarray  # [N]
    sizes: Sizes
    packing: Packing
    costs: np.ndarray  # [packs]
    batches: np.ndarray  # [batches, G] packs
    dropped: tuple[Dropped, ...]
    draw: DrawState  # after it
    filtered: tuple[int, ...]  # of each source, passed over on the way
    ended: bool  # every source has had its last epoch
    carried: tuple[tuple[int, int], ...]  # left over for the next


@dataclass(frozen=True)
class _End:
    """Every source has had its last epoch."""

    dropped: tuple[Dropped, ...]  # since the last batch


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
        cost: CostFunction,
        rules: DrawRules | None = None,
    ) -> None:
        """Args:
            corpus: the sources.
            weights: source -> weight in the mixture, at the start of the run.
            budget: of one pack.
            global_batch_packs: packs of one optimizer step over all ranks.
            window_samples: samples that are packed together.
            seed: decides every order.
            cost: see ``CostFunction``.
            rules: what weights are shares of, how they change, how rows are shuffled.

        Raises:
            ValueError: a source of the mixture is unknown, is empty, or has no sample that fits into a pack.
        """
        self.corpus, self.budget, self.cost, self.seed = corpus, budget, cost, seed
        self.global_batch_packs, self.window_samples = global_batch_packs, window_samples
        rules = rules or DrawRules()
        self.mixture = Mixture(rules.weights(weights), sized=rules.unit != MixtureUnit.samples)
        for name in self.mixture.sources:
            _check_source(corpus, name, budget)
        self._sources = [corpus.sources[name] for name in self.mixture.sources]
        self._unit = rules.unit
        self._draw = Draw(self._sources, self.mixture, rules, seed, self._amounts)
        described = [
            corpus.fingerprint(),
            {name: str(weights.get(name, 0.0)) for name in self.mixture.sources},
            repr(rules),
            asdict(budget),
            global_batch_packs,
            window_samples,
            seed,
        ]
        self.fingerprint = hashlib.sha256(json.dumps(described).encode()).hexdigest()

    @classmethod
    def from_settings(cls, settings: TrainSettings, cost: CostFunction) -> Plan:
        """The plan of a run; opens the indexes of the sources that its mixture draws from.

        Raises:
            ValueError: see the constructor and ``Corpus.open``.
        """
        stage, data = settings.stage, settings.data
        weights = {name: weight for name, weight in data.mixtures[stage.mixture].items() if weight > 0}
        capacity = stage.steps * stage.global_batch_packs * stage.max_tokens
        rules = DrawRules.from_settings(data, stage.mixture, capacity)
        corpus = Corpus.open(
            {name: data.sources[name] for name in rules.weights(weights).sources},
            settings.model.tokenizer,
            data.resolution,
            settings.model.text_tower.max_tokens if stage.objective == Objective.contrastive else None,
            data.plan_cache,
        )
        budget = Budget(stage.max_tokens, stage.max_patches)
        return cls(corpus, weights, budget, stage.global_batch_packs, data.window_samples, settings.seed, cost, rules)

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
        return PlanState(self.fingerprint, 0, 0, 0, none, (), none, none, 0)

    def batches(self, state: PlanState | None = None) -> Iterator[tuple[GlobalBatch, PlanState]]:
        """Global batches, each with the state that continues behind it.

        Without end, unless every source has a last epoch. What is then left over, less than a global batch, is
        reported as dropped by the last batch.

        Raises:
            ValueError: the state belongs to another plan.
        """
        found = self._batches(state)
        if not self._draw.ends:
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
                held = replace(held[0], dropped=held[0].dropped + item.dropped), held[1]
        if held is not None:
            yield held
        elif step == 0:
            raise ValueError(
                f"the data end before stage.global_batch_packs={self.global_batch_packs} packs are full: lower it, or "
                "raise max_epochs in data.sources"
            )

    def _batches(self, state: PlanState | None) -> Iterator[tuple[GlobalBatch, PlanState] | _End]:
        state = state or self.start()
        if state.plan != self.fingerprint:
            raise ValueError(
                "the checkpoint's data position belongs to another plan: the data, the mixture, data.window_samples, "
                "data.resolution, stage.max_tokens, stage.max_patches, stage.global_batch_packs or seed has changed. "
                "Restore them, or start a new run in another run_dir"
            )
        dropped: tuple[Dropped, ...] = ()
        while True:
            window = self._plan_window(state)
            if window.ended and not len(window.batches):
                left = tuple(Dropped(source, row, AT_THE_END) for source, row in window.carried)
                yield _End(dropped + window.dropped + left)
                return
            if not len(window.batches):
                log.warning(
                    "a window of data.window_samples=%d fills %d packs, fewer than stage.global_batch_packs=%d: "
                    "planning goes on, but a larger window is faster and packs better",
                    self.window_samples,
                    len(window.packing),
                    self.global_batch_packs,
                )
            # After a batch of this window its dropped samples have been reported.
            dropped += window.dropped if state.batch == 0 else ()
            filtered = tuple(map(sum, zip(state.filtered, window.filtered, strict=True)))
            behind = PlanState(
                self.fingerprint,
                state.step,
                state.window + 1,
                0,
                window.draw.passed,
                window.carried,
                filtered,
                window.draw.mixture.spent,
                window.draw.mixture.origin,
            )
            for number in range(state.batch, len(window.batches)):
                packs = tuple(self._pack(window, pack) for pack in window.batches[number].tolist())
                batch = GlobalBatch(state.step, packs, dropped, _seed(self.seed, "steps", state.window, number))
                state = replace(state, step=state.step + 1, batch=number + 1)
                behind = replace(behind, step=state.step)
                dropped = ()
                yield batch, behind if state.batch == len(window.batches) else state
            state = behind

    def _plan_window(self, state: PlanState) -> _Window:
        drawn = self._draw.next(state.draw, self.window_samples)
        fit, fresh, dropped = self._sort_out(drawn.sources, drawn.rows)
        carried = np.array(state.carried, dtype=np.int64).reshape(-1, 2)
        sources = np.concatenate([carried[:, 0], drawn.sources[fit]])
        rows = np.concatenate([carried[:, 1], drawn.rows[fit]])
        sizes = Sizes.concatenate([self._look(*carried.T).sizes, fresh])
        packs = self.budget.packs(sizes.tokens, sizes.patches, multiple=self.global_batch_packs)
        packing = pack_samples(sizes.tokens, sizes.patches, self.budget, packs, first=len(carried))
        order = shuffled(packs, _seed(self.seed, "window", state.window))
        return _Window(
            sources=sources,
            rows=rows,
            sizes=sizes,
            packing=packing,
            costs=self.cost(sizes.map(packing.sums)),
            batches=order.reshape(-1, self.global_batch_packs),
            dropped=dropped,
            draw=drawn.state,
            filtered=drawn.filtered,
            ended=len(drawn.rows) < self.window_samples,
            carried=tuple(zip(sources[packing.left].tolist(), rows[packing.left].tolist(), strict=True)),
        )

    def _sort_out(self, sources: np.ndarray, rows: np.ndarray) -> tuple[np.ndarray, Sizes, tuple[Dropped, ...]]:
        """Draws that can be packed, their sizes, and the others with the reason."""
        looked = self._look(sources, rows)
        fit = self.budget.fits(looked.sizes.tokens, looked.sizes.patches)
        reasons: dict[int, str] = {}
        for place in np.flatnonzero(~fit).tolist():
            tokens, patches = int(looked.sizes.tokens[place]), int(looked.sizes.patches[place])
            reasons[place] = _over_budget(tokens, patches, self.budget)
        reasons |= looked.errors
        fit[list(reasons)] = False
        dropped = (Dropped(int(sources[place]), int(rows[place]), reasons[place]) for place in sorted(reasons))
        return np.flatnonzero(fit), looked.sizes.take(np.flatnonzero(fit)), tuple(dropped)

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

    def _amounts(self, looked: Looked) -> np.ndarray:
        """What samples count in a mixture of tokens or compute: 0 for those that will not be trained on."""
        if self._unit == MixtureUnit.compute:
            amounts = np.maximum(np.rint(self.cost(looked.sizes) / FLOPS_PER_UNIT), 1).astype(np.int64)
        else:
            amounts = looked.sizes.tokens.copy()
        amounts[~self.budget.fits(looked.sizes.tokens, looked.sizes.patches)] = 0
        amounts[list(looked.errors)] = 0
        return amounts

    def _pack(self, window: _Window, pack: int) -> Pack:
        members = window.packing.members(pack)
        columns = (window.sources, window.rows, window.sizes.tokens, window.sizes.patches)
        samples = zip(*(column[members].tolist() for column in columns), strict=True)
        return Pack(tuple(PlannedSample(*sample) for sample in samples), float(window.costs[pack]))


def assign(batch: GlobalBatch, world_size: int) -> list[list[Pack]]:
    """Spread a global batch over micro-steps and ranks: ``[micro-step][rank] -> pack``.

    Packs that run at the same time are neighbours in cost; the micro-steps and the ranks within them are shuffled.
    Which samples the batch has does not depend on ``world_size``.

    Raises:
        ValueError: the packs do not divide over the ranks.
    """
    if len(batch.packs) % world_size:
        raise ValueError(
            f"stage.global_batch_packs={len(batch.packs)} does not divide over {world_size} ranks: "
            "set it to a multiple of the number of ranks"
        )
    costs = np.array([pack.cost for pack in batch.packs])
    by_cost = np.argsort(-costs, kind="stable").reshape(-1, world_size)
    micro_steps = by_cost[shuffled(len(by_cost), batch.seed)].tolist()
    ranks = [shuffled(world_size, _seed(batch.seed, number)).tolist() for number in range(len(micro_steps))]
    return [[batch.packs[packs[place]] for place in order] for packs, order in zip(micro_steps, ranks, strict=True)]


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
        "data.resolution, loosen the filter or take the source out of the mixture"
    )


def _over_budget(tokens: int, patches: int, budget: Budget) -> str:
    over = []
    if tokens > budget.max_tokens:
        over.append(f"{tokens} tokens > stage.max_tokens={budget.max_tokens}")
    if patches > budget.max_patches:
        over.append(f"{patches} patches > stage.max_patches={budget.max_patches}")
    return OVER_BUDGET + ", ".join(over)


def _seed(*parts: object) -> int:
    """A seed of 64 bits from several values."""
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=8).digest(), "little")
