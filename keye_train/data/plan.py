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

from keye_train.data.corpus import Corpus, Sizes, Source
from keye_train.data.mixture import Mixture, Shuffle, shuffled
from keye_train.data.packing import Budget, Packing, pack_samples
from keye_train.data.quarantine import exclude
from keye_train.model.configuration import KeyeConfig
from keye_train.model.flops import FlopCoefficients
from keye_train.settings import Objective, TrainSettings

log = logging.getLogger(__name__)

OVER_BUDGET = "over budget: "
"""How the reason of a sample begins that exceeds stage.max_tokens or stage.max_patches."""

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
    drawn: tuple[int, ...]  # draws of each source before the current window
    carried: tuple[tuple[int, int], ...]  # (source, row) drawn earlier that the current window packs, too

    def to_json(self) -> dict[str, Any]:
        """Plain value for a checkpoint."""
        return asdict(self)

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> PlanState:
        """Inverse of ``to_json``, also after a round trip through a JSON file."""
        carried = tuple((int(source), int(row)) for source, row in value["carried"])
        return cls(**{**value, "drawn": tuple(value["drawn"]), "carried": carried})


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
    drawn: tuple[int, ...]  # draws of each source after it
    carried: tuple[tuple[int, int], ...]  # left over for the next


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
    ) -> None:
        """Args:
            corpus: the sources.
            weights: source -> weight in the mixture, as a share of samples.
            budget: of one pack.
            global_batch_packs: packs of one optimizer step over all ranks.
            window_samples: samples that are packed together.
            seed: decides every order.
            cost: see ``CostFunction``.

        Raises:
            ValueError: a source of the mixture is unknown, is empty, or has no sample that fits into a pack.
        """
        self.corpus, self.budget, self.cost, self.seed = corpus, budget, cost, seed
        self.global_batch_packs, self.window_samples = global_batch_packs, window_samples
        self.mixture = Mixture(weights)
        for name in self.mixture.sources:
            _check_source(corpus, name, budget)
        self._sources = [corpus.sources[name] for name in self.mixture.sources]
        self._shuffles = [Shuffle(len(source), seed, source.name) for source in self._sources]
        described = [
            corpus.fingerprint(),
            {name: str(weights[name]) for name in self.mixture.sources},
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
        corpus = Corpus.open(
            {name: data.sources[name] for name in weights},
            settings.model.tokenizer,
            data.resolution,
            settings.model.text_tower.max_tokens if stage.objective == Objective.contrastive else None,
            data.storage,
        )
        exclude(corpus, data.quarantine)
        budget = Budget(stage.max_tokens, stage.max_patches)
        return cls(corpus, weights, budget, stage.global_batch_packs, data.window_samples, settings.seed, cost)

    @property
    def sources(self) -> tuple[str, ...]:
        """Names behind the source numbers."""
        return self.mixture.sources

    def source(self, number: int) -> Source:
        """The source behind a source number."""
        return self._sources[number]

    def start(self) -> PlanState:
        """State before the first step."""
        return PlanState(self.fingerprint, 0, 0, 0, (0,) * len(self.sources), ())

    def batches(self, state: PlanState | None = None) -> Iterator[tuple[GlobalBatch, PlanState]]:
        """Global batches without end, each with the state that continues behind it.

        Raises:
            ValueError: the state belongs to another plan.
        """
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
            behind = PlanState(self.fingerprint, state.step, state.window + 1, 0, window.drawn, window.carried)
            for number in range(state.batch, len(window.batches)):
                packs = tuple(self._pack(window, pack) for pack in window.batches[number].tolist())
                batch = GlobalBatch(state.step, packs, dropped, _seed(self.seed, "steps", state.window, number))
                state = replace(state, step=state.step + 1, batch=number + 1)
                behind = replace(behind, step=state.step)
                dropped = ()
                yield batch, behind if state.batch == len(window.batches) else state
            state = behind

    def _plan_window(self, state: PlanState) -> _Window:
        source_numbers, drawn = self.mixture.draw(state.drawn, self.window_samples)
        rows = np.empty(self.window_samples, dtype=np.int64)
        for number, shuffle in enumerate(self._shuffles):
            mine = np.flatnonzero(source_numbers == number)
            rows[mine] = shuffle.rows(state.drawn[number] + np.arange(len(mine)))
        fit, dropped = self._sort_out(source_numbers, rows)
        carried = np.array(state.carried, dtype=np.int64).reshape(-1, 2)
        sources = np.concatenate([carried[:, 0], source_numbers[fit]])
        rows = np.concatenate([carried[:, 1], rows[fit]])
        sizes = self._sizes(sources, rows)
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
            drawn=drawn,
            carried=tuple(zip(sources[packing.left].tolist(), rows[packing.left].tolist(), strict=True)),
        )

    def _sort_out(self, sources: np.ndarray, rows: np.ndarray) -> tuple[np.ndarray, tuple[Dropped, ...]]:
        """Draws that can be packed, and the others with the reason."""
        sizes = self._sizes(sources, rows)
        fit = self.budget.fits(sizes.tokens, sizes.patches)
        reasons: dict[int, str] = {}
        for place in np.flatnonzero(~fit).tolist():
            reasons[place] = _over_budget(int(sizes.tokens[place]), int(sizes.patches[place]), self.budget)
        for number, source in enumerate(self._sources):
            if source.errors:
                mine = np.flatnonzero(sources == number)
                for place in mine[np.isin(rows[mine], list(source.errors))].tolist():
                    reasons[place] = source.errors[int(rows[place])]
        fit[list(reasons)] = False
        dropped = (Dropped(int(sources[place]), int(rows[place]), reasons[place]) for place in sorted(reasons))
        return np.flatnonzero(fit), tuple(dropped)

    def _sizes(self, sources: np.ndarray, rows: np.ndarray) -> Sizes:
        """Sizes of samples of several sources."""
        order = np.argsort(sources, kind="stable")
        grouped = rows[order]
        bounds = np.searchsorted(sources[order], np.arange(len(self._sources) + 1))
        parts = []
        for source, start, stop in zip(self._sources, bounds[:-1], bounds[1:], strict=True):
            parts.append(source.sizes.take(grouped[start:stop]))
        back = np.empty_like(order)
        back[order] = np.arange(len(order))
        return Sizes.concatenate(parts).take(back)

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
    fits = budget.fits(source.sizes.tokens, source.sizes.patches)
    fits[list(source.errors)] = False
    if not fits.any():
        raise ValueError(
            f"data.sources.{name}: none of its {len(source)} samples can be used ({len(source.errors)} are unreadable, "
            f"the others exceed stage.max_tokens={budget.max_tokens} or stage.max_patches={budget.max_patches}); "
            "see `keye-data stats`, and raise the budgets, lower data.resolution or take the source out of the mixture"
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
