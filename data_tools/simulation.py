"""A stage without its training: the plan is made batch by batch and counted. Reads the indexes, no shard.

Memory: one window, the counts below, and two numbers a source and step for the curves.
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import numpy as np

from keye_train.data.corpus import Sizes
from keye_train.data.plan import OVER_BUDGET, Dropped, GlobalBatch, Pack, Plan, PlanState, assign
from keye_train.model import keye_config
from keye_train.model.flops import TOWERS, FlopCoefficients
from keye_train.settings import MixtureUnit, Objective, TrainSettings

log = logging.getLogger(__name__)

BINS_AN_OCTAVE = 16
"""Resolution of the distributions of lengths: percentiles to 4 %."""


class Distribution:
    """Mean, extremes, percentiles and histogram of any number of values, kept as counts of bins."""

    def __init__(self, low: float, high: float, bins: int) -> None:
        """Args:
        low, high: range of the bins; values beyond go into the outermost ones.
        bins: a percentile is off by at most (high - low) / bins.
        """
        self.low, self.high = low, high
        self.counts = np.zeros(bins, dtype=np.int64)
        self.total, self.smallest, self.largest = 0.0, float("inf"), float("-inf")

    def add(self, values: np.ndarray) -> None:
        """Count values: [N] numbers."""
        if not len(values):
            return
        places = ((np.asarray(values) - self.low) * (len(self.counts) / (self.high - self.low))).astype(np.int64)
        self.counts += np.bincount(places.clip(0, len(self.counts) - 1), minlength=len(self.counts))
        self.total += float(np.sum(values))
        self.smallest = min(self.smallest, float(np.min(values)))
        self.largest = max(self.largest, float(np.max(values)))

    def __len__(self) -> int:
        return int(self.counts.sum())

    @property
    def mean(self) -> float:
        """Exact mean; 0 where nothing was counted."""
        return self.total / max(1, len(self))

    def percentile(self, percent: float) -> float:
        """Value below which ``percent`` of the values lie, to the width of a bin."""
        if not len(self):
            return 0.0
        place = int(np.searchsorted(self.counts.cumsum(), percent / 100 * len(self)))
        middle = self.low + (place + 0.5) * (self.high - self.low) / len(self.counts)
        return min(max(middle, self.smallest), self.largest)

    def histogram(self, bins: int) -> tuple[np.ndarray, np.ndarray]:
        """Edges [B + 1] and counts [B] of about ``bins`` equal bins over the range that holds values."""
        used = np.flatnonzero(self.counts)
        if not len(used):
            return np.array([self.low, self.high]), np.zeros(1, dtype=np.int64)
        width = max(1, -(-(int(used[-1]) + 1 - int(used[0])) // bins))
        first = int(used[0]) // width * width
        counts = np.add.reduceat(self.counts[first : used[-1] + 1], np.arange(0, int(used[-1]) + 1 - first, width))
        step = (self.high - self.low) / len(self.counts)
        return self.low + (first + width * np.arange(len(counts) + 1)) * step, counts

    def summary(self) -> dict[str, float]:
        """Mean, extremes and percentiles by name."""
        if not len(self):
            return {}
        ranks = {f"p{rank}": self.percentile(rank) for rank in (1, 10, 50, 90, 99)}
        return {"mean": self.mean, "min": self.smallest, **ranks, "max": self.largest}


@dataclass
class SourceTally:
    """What one source gave."""

    name: str
    rows: int  # samples that it holds
    weight: float  # share that the recipe asks for
    sample_bytes: float  # mean size of a sample in its shards
    max_epochs: int | None = None  # how often its rows are drawn at most
    filtered: int = 0  # passed over by the filter of the source
    downscaled: int = 0  # of the samples: made to fit by data.overlong
    truncated: int = 0  # likewise; some are both
    samples: int = 0  # planned for training
    dropped: int = 0
    tokens: int = 0
    patches: int = 0
    flops: float = 0.0  # forward and backward, as the plan counts cost
    token_lengths: Distribution = field(default_factory=lambda: _octaves())
    patch_lengths: Distribution = field(default_factory=lambda: _octaves())
    shares: list[float] = field(default_factory=list)  # of the samples of each step
    token_shares: list[float] = field(default_factory=list)  # of the tokens of each step

    @property
    def drawn(self) -> int:
        """Samples drawn, used or not."""
        return self.samples + self.dropped

    @property
    def passed(self) -> int:
        """Rows that the draw has come by: drawn, or kept out by the filter."""
        return self.drawn + self.filtered


@dataclass
class Simulation:
    """Counts of a simulated stage."""

    world_size: int
    sources: list[SourceTally]
    max_tokens: int
    max_patches: int
    recipe_steps: int  # stage.steps
    unit: str  # what the weights are shares of, see ``settings.MixtureUnit``
    curriculum: bool  # the weights change in the course of the stage
    steps: int = 0
    packs: int = 0
    micro_steps: int = 0
    token_fill: Distribution = field(default_factory=lambda: Distribution(0, 1, 2000))
    patch_fill: Distribution = field(default_factory=lambda: Distribution(0, 1, 2000))
    balance: Distribution = field(default_factory=lambda: Distribution(0, 1, 2000))  # mean / slowest, per micro-step
    pack_cost: Distribution = field(default_factory=lambda: Distribution(0, 4, 2000))  # over the mean of its batch
    pack_samples: Distribution = field(default_factory=lambda: _octaves())
    step_flops: list[float] = field(default_factory=list)  # forward and backward, that the slowest ranks wait for
    busy_flops: float = 0.0  # forward and backward, of all packs
    shard_bytes: float = 0.0  # read from the shards
    step_samples: list[int] = field(default_factory=list)  # of each step
    reasons: Counter[tuple[str, str]] = field(default_factory=Counter)  # (source, reason) -> samples
    plan_s: float = 0.0  # time of planning alone
    planned_samples: int = 0  # in the windows that were planned

    @property
    def samples(self) -> int:
        """Planned for training."""
        return sum(source.samples for source in self.sources)

    @property
    def drawn(self) -> int:
        """Drawn, used or not."""
        return sum(source.drawn for source in self.sources)

    @property
    def tokens(self) -> int:
        """Language tokens."""
        return sum(source.tokens for source in self.sources)

    @property
    def patches(self) -> int:
        """Vision patches."""
        return sum(source.patches for source in self.sources)

    @property
    def mix_deviation(self) -> float:
        """Root mean square of (share of a source in a global batch - its weight), in units of sqrt(w (1 - w) / n).

        1.0 is what n samples drawn at random would show; below 1, batches are mixed more evenly than that. Where
        weights are not of samples, or change, the share over all steps stands in for the weight.
        """
        terms = []
        for source in self.sources:
            by_weight = self.unit == MixtureUnit.samples.value and not self.curriculum
            share = source.weight if by_weight else source.samples / max(1, self.samples)
            if 0 < share < 1:
                above = (np.array(source.shares) - share) ** 2 * np.array(self.step_samples)
                terms.append(above.mean() / (share * (1 - share)))
        return float(np.mean(terms) ** 0.5) if terms else 0.0

    def step_seconds(self, flops_per_s: float) -> float:
        """Mean time of a step where each rank does ``flops_per_s`` and waits for the slowest in each micro-step."""
        return float(np.mean(self.step_flops)) / flops_per_s if self.step_flops else 0.0


def _octaves() -> Distribution:
    """For log2 of lengths up to 16 M."""
    return Distribution(0, 24, 24 * BINS_AN_OCTAVE)


def step_cost(plan: Plan, settings: TrainSettings) -> Callable[[Sizes], np.ndarray]:
    """FLOPs of forward and backward: those that the plan compares packs by, and the output matrix.

    All text counts as labelled, so it is an upper bound (see ``model.flops``).
    """
    if settings.stage.objective == Objective.contrastive:
        return plan.cost
    trainable = [name for name in settings.stage.trainable if name in TOWERS]
    labelled = FlopCoefficients.of(keye_config(settings.model)).for_training(trainable).labelled_token
    return lambda sizes: plan.cost(sizes) + labelled * (sizes.tokens - sizes.patches / 4)


def reason_kind(reason: str) -> str:
    """What reasons that differ by their figures have in common."""
    if not reason.startswith(OVER_BUDGET):
        return reason
    over = [name for name in ("stage.max_tokens", "stage.max_patches") if name in reason]
    return OVER_BUDGET + " and ".join(over)


def simulate(
    plan: Plan,
    settings: TrainSettings,
    world_size: int,
    stop: Callable[[Simulation], bool],
    progress: Callable[[Simulation], None] = lambda _: None,
) -> Simulation:
    """Plan batches until ``stop`` says so; Ctrl-C ends it early, with the counts of what was planned.

    Args:
        plan: of the stage.
        settings: of the stage.
        world_size: ranks.
        stop: asked after each global batch.
        progress: called after each global batch.

    Raises:
        SettingsError: the packs of a global batch do not divide over the ranks.
    """
    settings.gradient_accumulation(world_size)
    weights = {name: settings.data.mixtures[settings.stage.mixture].get(name, 0.0) for name in plan.sources}
    total_weight = sum(weights.values())
    tallies = []
    for number, name in enumerate(plan.sources):
        source = plan.source(number)
        shard_bytes = sum(header.shard_bytes for header in source.headers)
        tallies.append(
            SourceTally(
                name,
                len(source),
                weights[name] / total_weight,
                shard_bytes / max(1, len(source)),
                settings.data.sources[name].max_epochs,
            )
        )
    stage = settings.stage
    result = Simulation(
        world_size,
        tallies,
        stage.max_tokens,
        stage.max_patches,
        stage.steps,
        settings.data.mixture_unit.value,
        stage.mixture in settings.data.curricula,
    )
    counting = _Counting(plan, step_cost(plan, settings), result)
    try:
        for batch, state in _timed(plan, result):
            counting.add(batch)
            windows = state.window + (1 if state.batch else 0)
            # A window draws more than it is asked to where that does not fill a global batch.
            result.planned_samples = max(windows * plan.window_samples, result.drawn)
            progress(result)
            if stop(result):
                break
    except KeyboardInterrupt:
        if not result.steps:
            raise
        log.warning("stopped after %d steps; the figures are those of the steps before", result.steps)
    return result


def _timed(plan: Plan, result: Simulation) -> Iterator[tuple[GlobalBatch, PlanState]]:
    batches = plan.batches()
    while True:
        began = time.perf_counter()
        item = next(batches, None)
        result.plan_s += time.perf_counter() - began
        if item is None:
            return
        yield item


class _Counting:
    """Adds global batches to a simulation."""

    def __init__(self, plan: Plan, cost: Callable[[Sizes], np.ndarray], result: Simulation) -> None:
        self._plan, self._cost, self._result = plan, cost, result

    def add(self, batch: GlobalBatch) -> None:
        """Count one global batch."""
        result = self._result
        columns = np.array(
            [
                (number, sample.source, sample.row, sample.tokens, sample.patches)
                for number, pack in enumerate(batch.packs)
                for sample in pack.samples
            ],
            dtype=np.int64,
        ).reshape(-1, 5)
        packs, sources, rows, tokens, patches = columns.T
        sizes = self._look(sources, rows)
        for distribution, values, limit in (
            (result.token_fill, tokens, result.max_tokens),
            (result.patch_fill, patches, result.max_patches),
        ):
            distribution.add(np.bincount(packs, values, minlength=len(batch.packs)) / limit)
        result.pack_samples.add(np.log2(np.bincount(packs, minlength=len(batch.packs)).clip(min=1)))
        self._count_sources(sources, tokens, patches, self._plan.cost(sizes), batch.dropped)
        training = np.bincount(packs, self._cost(sizes), minlength=len(batch.packs))
        self._count_ranks(batch, training)
        result.busy_flops += float(training.sum())
        result.step_samples.append(len(sources))
        for tally, filtered in zip(result.sources, batch.filtered, strict=True):
            tally.filtered += filtered
        result.steps += 1
        result.packs += len(batch.packs)

    def _look(self, sources: np.ndarray, rows: np.ndarray) -> Sizes:
        """Sizes of samples in their order; counts those that were made to fit."""
        order = np.argsort(sources, kind="stable")
        parts = []
        for number, tally in enumerate(self._result.sources):
            looked = self._plan.source(number).look(rows[sources == number])
            parts.append(looked.sizes)
            if looked.fits is not None:
                tally.truncated += int((looked.fits[:, 0] > 0).sum())
                tally.downscaled += int((looked.fits[:, 1] > 0).sum())
        back = np.empty_like(order)
        back[order] = np.arange(len(order))
        return Sizes.concatenate(parts).take(back)

    def _count_sources(
        self,
        sources: np.ndarray,
        tokens: np.ndarray,
        patches: np.ndarray,
        flops: np.ndarray,
        dropped: tuple[Dropped, ...],
    ) -> None:
        result = self._result
        for number, tally in enumerate(result.sources):
            mine = sources == number
            count, own_tokens = int(mine.sum()), tokens[mine]
            tally.samples += count
            tally.tokens += int(own_tokens.sum())
            tally.patches += int(patches[mine].sum())
            tally.flops += float(flops[mine].sum())
            tally.token_lengths.add(np.log2(own_tokens.clip(min=1)))
            with_vision = patches[mine]
            tally.patch_lengths.add(np.log2(with_vision[with_vision > 0]))
            share = count / max(1, len(sources))
            tally.shares.append(share)
            tally.token_shares.append(float(own_tokens.sum()) / max(1, int(tokens.sum())))
            result.shard_bytes += count * tally.sample_bytes
        for sample in dropped:
            tally = result.sources[sample.source]
            tally.dropped += 1
            result.reasons[tally.name, reason_kind(sample.reason)] += 1

    def _count_ranks(self, batch: GlobalBatch, training: np.ndarray) -> None:
        """Balance of the micro-steps, and what the slowest ranks do: ``training`` FLOPs of each pack."""
        result = self._result
        place = {id(pack): number for number, pack in enumerate(batch.packs)}
        micro_steps: list[list[Pack]] = assign(batch, result.world_size)
        costs = np.array([[pack.cost for pack in micro_step] for micro_step in micro_steps])
        slowest = costs.max(axis=1)
        result.balance.add(np.where(slowest > 0, costs.mean(axis=1) / np.where(slowest > 0, slowest, 1), 1.0))
        result.pack_cost.add((costs / max(costs.mean(), 1e-300)).ravel())
        waits = [max(training[place[id(pack)]] for pack in micro_step) for micro_step in micro_steps]
        result.step_flops.append(float(sum(waits)))
        result.micro_steps += len(micro_steps)
