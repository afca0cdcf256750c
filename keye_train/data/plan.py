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
from itertools import islice
from typing import Any, NamedTuple

import numpy as np

from keye_train.data.balance import form_batches
from keye_train.data.corpus import Corpus, Sizes, Source
from keye_train.data.cost import PackCost
from keye_train.data.mixture import Mixture, Shuffle, shuffled
from keye_train.data.packing import Budget, Packing, pack_samples
from keye_train.data.quarantine import exclude
from keye_train.settings import Objective, TrainSettings

log = logging.getLogger(__name__)

OVER_BUDGET = "over budget: "
"""How the reason of a sample begins that exceeds stage.max_tokens or stage.max_patches."""

ENOUGH_BATCHES = 8
"""Global batches in a window below which the plan warns: too few packs to find like ones among."""

RESERVE = 0.002
"""Share of tokens that a window draws beyond its packs, so that the last gaps find samples of their size."""


class PlannedSample(NamedTuple):
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
        cost: PackCost,
        balance_packs: int | None = None,
    ) -> None:
        """Args:
            corpus: the sources.
            weights: source -> weight in the mixture, as a share of samples.
            budget: of one pack.
            global_batch_packs: packs of one optimizer step over all ranks.
            window_samples: samples that are packed together, at least; a few more fill the last global batch.
            seed: decides every order.
            cost: what packs cost, see ``data.cost``.
            balance_packs: packs of like cost that global batches are made of, see ``data.balance_packs``.

        Raises:
            ValueError: a source of the mixture is unknown, is empty, or has no sample that fits into a pack; or
                ``balance_packs`` does not divide ``global_batch_packs``.
        """
        self.corpus, self.budget, self.cost, self.seed = corpus, budget, cost, seed
        self.global_batch_packs, self.window_samples = global_batch_packs, window_samples
        self.balance_packs = _balance_packs(global_batch_packs, balance_packs)
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
            self.balance_packs,
            asdict(cost),
        ]
        self._warned = False
        self.fingerprint = hashlib.sha256(json.dumps(described).encode()).hexdigest()

    @classmethod
    def from_settings(cls, settings: TrainSettings, cost: PackCost) -> Plan:
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
        packs = stage.global_batch_packs
        return cls(corpus, weights, budget, packs, data.window_samples, settings.seed, cost, data.balance_packs)

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
                "data.resolution, data.balance_packs, stage.max_tokens, stage.max_patches, stage.global_batch_packs, "
                "stage.trainable, the model or seed has changed. Restore them, or start a new run in another run_dir"
            )
        dropped: tuple[Dropped, ...] = ()
        while True:
            window = self._plan_window(state)
            self._check_window(len(window.batches))
            # After a batch of this window its dropped samples have been reported.
            dropped += window.dropped if state.batch == 0 else ()
            behind = PlanState(self.fingerprint, state.step, state.window + 1, 0, window.drawn, window.carried)
            for number in range(state.batch, len(window.batches)):
                packs = self._packs(window, window.batches[number])
                batch = GlobalBatch(state.step, packs, dropped, _seed(self.seed, "steps", state.window, number))
                state = replace(state, step=state.step + 1, batch=number + 1)
                behind = replace(behind, step=state.step)
                dropped = ()
                yield batch, behind if state.batch == len(window.batches) else state
            state = behind

    def _plan_window(self, state: PlanState) -> _Window:
        """Draw until the samples fill whole global batches, pack them, and form the batches.

        A window that stopped at ``window_samples`` would leave up to a global batch of samples for the next, and the
        state would have to name each of them.
        """
        carried = np.array(state.carried, dtype=np.int64).reshape(-1, 2)
        sources, rows, drawn = carried[:, 0], carried[:, 1], state.drawn
        sizes = self._sizes(sources, rows)
        dropped: tuple[Dropped, ...] = ()
        target, number = 0, self.window_samples
        while number > 0:
            more_sources, more_rows, drawn = self._draw(drawn, number)
            fit, more_dropped = self._sort_out(more_sources, more_rows)
            sources = np.concatenate([sources, more_sources[fit]])
            rows = np.concatenate([rows, more_rows[fit]])
            sizes, dropped = self._sizes(sources, rows), dropped + more_dropped
            target = target or self._whole_batches(sizes)
            number = self._missing(sizes, target)
        packing = pack_samples(sizes.tokens, sizes.patches, self.budget, target, first=len(carried))
        costs = self.cost(sizes.map(packing.sums))
        of_source = [packing.sums((sources == number).astype(np.int64)) for number in range(len(self._sources))]
        seed = _seed(self.seed, "window", state.window)
        return _Window(
            sources=sources,
            rows=rows,
            sizes=sizes,
            packing=packing,
            costs=costs,
            batches=form_batches(costs, np.stack(of_source, axis=1), self.global_batch_packs, self.balance_packs, seed),
            dropped=dropped,
            drawn=drawn,
            carried=tuple(zip(sources[packing.left].tolist(), rows[packing.left].tolist(), strict=True)),
        )

    def _draw(self, drawn: tuple[int, ...], number: int) -> tuple[np.ndarray, np.ndarray, tuple[int, ...]]:
        """Source numbers and rows of the next draws, each [number] int64, and the draws of each source after them."""
        source_numbers, after = self.mixture.draw(drawn, number)
        rows = np.empty(number, dtype=np.int64)
        for source, shuffle in enumerate(self._shuffles):
            mine = np.flatnonzero(source_numbers == source)
            rows[mine] = shuffle.rows(drawn[source] + np.arange(len(mine)))
        return source_numbers, rows, after

    def _whole_batches(self, sizes: Sizes) -> int:
        """Packs that these samples fill, rounded up to whole global batches."""
        packs = self.budget.packs(sizes.tokens, sizes.patches)
        return max(-(-packs // self.global_batch_packs), 1) * self.global_batch_packs

    def _missing(self, sizes: Sizes, packs: int) -> int:
        """How many more samples it takes, going by those at hand, to fill packs; 0: there are enough."""
        count = len(sizes.tokens)
        filled = max(sizes.tokens.sum() / self.budget.max_tokens, sizes.patches.sum() / self.budget.max_patches)
        wanted = packs * (1 + RESERVE)
        if filled >= wanted and count >= packs:
            return 0
        return min(max(int((wanted - filled) / max(filled, 1) * count), 1), self.window_samples)

    def _check_window(self, batches: int) -> None:
        """Warn, once, where a window is too small to balance."""
        if batches < ENOUGH_BATCHES and self.balance_packs > 1 and not self._warned:
            self._warned = True
            log.warning(
                "a window of data.window_samples=%d makes %d global batches: ranks wait less for each other where it "
                "makes %d or more, with data.window_samples=%d",
                self.window_samples,
                batches,
                ENOUGH_BATCHES,
                self.window_samples * -(-ENOUGH_BATCHES // batches),
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

    def _packs(self, window: _Window, packs: np.ndarray) -> tuple[Pack, ...]:
        """Some packs of a window, with their samples."""
        members = [window.packing.members(pack) for pack in packs.tolist()]
        chosen = np.concatenate(members)
        columns = (window.sources, window.rows, window.sizes.tokens, window.sizes.patches)
        samples = map(PlannedSample._make, zip(*(column[chosen].tolist() for column in columns), strict=True))
        counts, costs = map(len, members), window.costs[packs].tolist()
        return tuple(Pack(tuple(islice(samples, count)), cost) for count, cost in zip(counts, costs, strict=True))


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
