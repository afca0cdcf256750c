"""One optimizer step after the other, for a run and for its replay.

A step is: count -> forward and backward of each micro-batch -> apply or refuse. Nothing waits for the device between
the first micro-batch and the update.
"""

from __future__ import annotations

import logging
import random
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from keye_train.data.collate import LoadedPack
from keye_train.data.ledger import SkipLimit
from keye_train.data.loader import StepData
from keye_train.data.plan import Plan
from keye_train.model import module_parameters
from keye_train.model.pretrained import load_state
from keye_train.sample import SampleRef
from keye_train.settings import TrainSettings
from keye_train.training.checkpoint import Checkpoint, TrainState
from keye_train.training.counting import BatchCounter, Counts
from keye_train.training.distributed import World
from keye_train.training.engine import Engine, Outcome
from keye_train.training.guards import NonFiniteGuard, StopRequest
from keye_train.training.metrics import StepMetrics
from keye_train.training.objectives import TrainingObjective
from keye_train.training.optimizer import parameter_groups
from keye_train.training.spikes import SpikeGuard, Verdict
from keye_train.training.timing import StepClock, own_times

logger = logging.getLogger(__name__)

OnLosses = Callable[[LoadedPack, Tensor], None]
"""Is shown the losses [K] of each micro-batch."""


class Learner:
    """The model in its engine, and what decides about its updates, on one rank. Collective: every rank makes one.

    Args:
        settings: of the run.
        world: all ranks.
        plan: of the data.
        objective: on the CPU, with its first weights; the engine takes it over.
        stop_request: signals, which the ranks tell each other with the counts of a global batch.
        found: the checkpoint to go on from; None: the start of the run.

    Raises:
        ValueError: the checkpoint holds other tensors than the stage trains.
    """

    def __init__(
        self,
        settings: TrainSettings,
        world: World,
        plan: Plan,
        objective: TrainingObjective,
        stop_request: StopRequest,
        found: Checkpoint | None,
    ) -> None:
        self.settings, self.stage, self.world = settings, settings.stage, world
        self.plan, self.objective = plan, objective
        self._stop_request = stop_request
        self.state = found.state if found else TrainState(0, 0, plan.start().to_json())
        self.engine = self._build_engine(found)
        self._skip_limit = SkipLimit(settings.data)
        self._skip_limit.check_marks(plan)
        self._guard = NonFiniteGuard(settings.guards.non_finite, self.state.refused_in_a_row, self.state.refused_total)
        self.spikes = SpikeGuard(settings.guards.spike, world, self.state.spikes)
        self._counter = BatchCounter(plan.sources, objective, self.stage.loss_weighting)
        self.metrics = StepMetrics(settings, world, plan.sources, objective)
        self.clock = StepClock(world.device)
        self.on_losses: OnLosses | None = None

    def count(self, data: StepData) -> Counts:
        """Sizes of the global batch, now and then with the times of all ranks. Collective: every rank must reach it."""
        every = self.settings.guards.straggler_every_steps
        due = every > 0 and (data.step + 1) % every == 0
        times = own_times(self.clock.take_means(), self.world) if due else []
        return self._counter.count(data, self.world, self._stop_request, self._skip_limit, times)

    def step(self, data: StepData, counts: Counts) -> tuple[dict[str, float], Outcome]:
        """Forward and backward of every micro-batch, then the update. Collective: every rank must reach this.

        Returns:
            The learning rate of each module, and what became of the update.

        Raises:
            NonFiniteError, SpikeError, RollBack: what the guards of the recipe do about the step; on all ranks alike.
        """
        seed_step(self.settings.seed, data.step, self.world.rank)
        rates = self.engine.set_learning_rates(data.step, self.stage)
        self.metrics.begin(counts)
        self.spikes.begin()
        # The engine averages over ranks; we want the sum over ranks divided by the weight of all items.
        weight = self.world.size / (counts.weight or 1)
        for number, (pack, on_host) in enumerate(zip(data.packs, counts.packs, strict=True)):
            self.clock.enter("forward")
            items = on_host.to(self.world.device)
            losses, figures = self.engine.forward(pack.inputs.to(self.world.device))
            self.metrics.add(losses, items, figures)
            if self.on_losses is not None:
                self.on_losses(pack, losses)
            last = number == len(data.packs) - 1
            loss = self.spikes.gate(weighted_sum(losses, weight, items.weights), last)
            self.clock.enter("backward")
            self.engine.accumulate(loss, last)
        self.clock.enter("optimizer")
        self.metrics.add_gradient_squares(self.engine.module_gradient_squares())
        outcome = self.engine.apply()
        self.clock.enter(None)
        verdict = self.spikes.observe(data.step + 1, outcome.applied)
        if outcome.applied or verdict != Verdict.spike:
            self._guard.observe(outcome.applied, data.step + 1, _samples(data))
        return rates, outcome

    def advance(self, data: StepData, wall_s: float = 0.0) -> None:
        """The step of ``data`` is done, or passed over."""
        self.state = TrainState(
            step=data.step + 1,
            updates=self.engine.updates,
            data=data.plan_state_after.to_json(),
            refused_in_a_row=self._guard.in_a_row,
            refused_total=self._guard.total,
            wall_s=self.state.wall_s + wall_s,
            spikes=self.spikes.to_json(),
        )

    def _build_engine(self, found: Checkpoint | None) -> Engine:
        """The engine, at the start of the run or where the checkpoint stands."""
        model = self.objective.model
        groups = parameter_groups(module_parameters(model), self.stage)
        reader = None
        if found is not None:
            reader = found.reader()
            named = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
            reader.check_fits({name: tuple(parameter.shape) for name, parameter in named.items()})
            # Before the engine is built, so that its 16-bit copies are roundings of these, as they were in that run.
            load_state(model, ((name, reader.tensor(name)) for name in named))
        engine = Engine(self.objective, model, groups, self.settings, self.world)
        if found is not None and reader is not None:
            engine.restore(reader, found.state.updates)
            if self.world.is_main:
                logger.info("continuing from %s", found.folder)
        return engine


def step_seed(seed: int, step: int, rank: int) -> int:
    """Seed of every generator in a step (from 0) on a rank.

    The random numbers of a step then depend on nothing that happened before it: resuming needs no generator states.
    """
    return int(np.random.SeedSequence([seed, step, rank]).generate_state(1)[0])


def seed_step(seed: int, step: int, rank: int) -> None:
    """Seed every generator with :func:`step_seed`."""
    mixed = step_seed(seed, step, rank)
    torch.manual_seed(mixed)
    np.random.seed(mixed)
    random.seed(mixed)


def weighted_sum(losses: Tensor, weight: float, of_item: Tensor | None = None) -> Tensor:
    """Sum of the losses, each times its own weight ``of_item`` [K] where there is one, times ``weight``.

    A sum that is not finite gets the weight NaN, so that the gradient cannot be finite by accident: the engine then
    refuses the update on every rank, without a further collective and without waiting for the device here.
    """
    total = losses.sum() if of_item is None else (losses * of_item).sum()
    factor = torch.where(torch.isfinite(total.detach()), weight, torch.nan)
    return total * factor


def _samples(data: StepData) -> list[SampleRef]:
    return [ref for pack in data.packs for ref in pack.refs]
