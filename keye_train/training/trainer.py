"""The training loop of every stage.

A run is: build, resume where a checkpoint is, step, export. A step is: read -> count -> forward and backward of each
micro-batch -> apply or refuse -> log. Nothing waits for the device between the first micro-batch and the update.
"""

from __future__ import annotations

import logging
import random
import time
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from keye_train.data.cost import training_cost
from keye_train.data.ledger import Ledger, SkipLimit
from keye_train.data.loader import Loader, StepData
from keye_train.data.plan import Plan, PlanState
from keye_train.model import module_parameters
from keye_train.model.pretrained import load_state
from keye_train.model.sample_encoder import SampleEncoder
from keye_train.sample import SampleRef
from keye_train.settings import TrainSettings
from keye_train.training import build, checkpoint, distributed, export, manifest
from keye_train.training.checkpoint import Checkpoint, TrainState
from keye_train.training.counting import BatchCounter, Counts
from keye_train.training.distributed import World
from keye_train.training.engine import Engine, Outcome
from keye_train.training.guards import NonFiniteGuard, StopRequest, exit_code
from keye_train.training.heldout import HeldoutLoss
from keye_train.training.metrics import StepMetrics
from keye_train.training.monitor import Monitor
from keye_train.training.occupancy import RunLock
from keye_train.training.optimizer import parameter_groups
from keye_train.training.saver import Saver

logger = logging.getLogger(__name__)


SAVE_PATIENCE_S = 60.0
"""How long a failing rank waits for its save under way."""


def train(settings: TrainSettings) -> int:
    """Run one stage, or continue it: the same call in the same ``run_dir`` goes on from the newest whole checkpoint.

    Works in one process, and in every process that torchrun or the deepspeed launcher starts.

    Returns:
        Exit code: 0 when the run is finished (also when it was before), 130, 143 or 138 when a signal stopped it.

    Raises:
        SettingsError: the recipe cannot work, or ``run_dir`` belongs to another recipe.
        ValueError: data, parent or checkpoint do not fit the recipe.
        NonFiniteError: loss or gradient stayed non-finite.
    """
    settings.check()
    run_dir = Path(settings.run_dir)
    if manifest.is_finished(settings):
        logger.info("%s: already finished", run_dir)
        return 0
    manifest.check_same_recipe(run_dir, settings)
    stop_request = StopRequest()
    world = distributed.start(settings.deepspeed.timeout_minutes)
    lock = RunLock(run_dir, world)
    try:
        return Trainer(settings, world, stop_request).run()
    finally:
        lock.release()


class Trainer:
    """One run on one rank."""

    def __init__(self, settings: TrainSettings, world: World, stop_request: StopRequest) -> None:
        self.settings, self.stage, self.world = settings, settings.stage, world
        self.run_dir = Path(settings.run_dir)
        self._stop_request = stop_request
        settings.gradient_accumulation(world.size)  # refuses a world size that does not divide the global batch
        self.plan = Plan.from_settings(settings, training_cost(settings))
        self.plan.check_world_size(world.size)
        self.processor = SampleEncoder.from_settings(
            settings.model, settings.data.resolution, settings.data.video_backend, settings.data.scaled_jpeg
        )
        found = checkpoint.newest_whole(self.run_dir, world, partial(manifest.foreign, settings))
        self.state = found.state if found else TrainState(0, 0, self.plan.start().to_json())
        self.objective = build.build_objective(settings)
        self.manifest = self._begin_manifest(build.count_parameters(self.objective.model))
        self.engine = self._build_engine(found)
        self.saver = Saver(self.run_dir, self.engine, world, settings.checkpoint, self.manifest)
        self.skip_limit = SkipLimit(settings.data)
        self.skip_limit.check_marks(self.plan)
        self.guard = NonFiniteGuard(settings.guards.non_finite, self.state.refused_in_a_row, self.state.refused_total)
        self.counter = BatchCounter(self.plan.sources, self.objective, self.stage.loss_weighting)
        self.heldout = HeldoutLoss(settings, world, self.processor, self.objective)
        self.metrics = StepMetrics(settings, world, self.plan.sources, self.objective, self.plan.cost)

    def run(self) -> int:
        """Train to the end or to a signal; the exit code."""
        position = PlanState.from_json(self.state.data)
        monitor = Monitor(
            self.run_dir,
            self.settings.logging,
            self.world.is_main,
            self.state.step,
            self.stage.steps,
            self.stage.name,
            self.manifest["recipe"],
        )
        ledger = Ledger(self.run_dir, self.world.rank, self.world.size, self.state.step)
        loader = Loader(self.plan, self.processor, self.world.rank, self.world.size, self.settings, position)
        try:
            with self._stop_request:  # before and behind it a signal ends the process at once: nothing would be lost
                stopped_by = self._train(loader, ledger, monitor)
        finally:
            self.saver.close(SAVE_PATIENCE_S)
            loader.close()
            ledger.close()
            monitor.close()
        if stopped_by:
            logger.info("stopped after step %d; the same command goes on from there", self.state.step)
            return exit_code(stopped_by)
        for average in (False, True) if self.stage.optimizer.ema_decay else (False,):
            config = self.objective.model.config
            export.write_export(self.engine, config, self.settings, self.run_dir, self.world, average)
        if self.world.is_main:
            manifest.finish(self.run_dir, self.manifest, self._result())
        self.world.barrier()
        self.engine.close()
        return 0

    def _train(self, loader: Loader, ledger: Ledger, monitor: Monitor) -> int:
        """All remaining steps; the signal that stopped them, or 0."""
        while self.state.step < self.stage.steps:
            began = time.monotonic()
            data = next(loader, None)
            if data is None:  # on every rank at the same step: all have the same plan
                logger.warning(
                    "the data ended after %d of stage.steps=%d: every source has had its max_epochs; set stage.steps "
                    "to that number, so that the learning rate ends with the data, or raise max_epochs",
                    self.state.step,
                    self.stage.steps,
                )
                self._save_last()
                return 0
            data_wait_s = time.monotonic() - began
            ledger.record(data)
            counts = self.counter.count(data, self.world, self._stop_request, self.skip_limit)
            rates, outcome = self._step(data, counts)
            ledger.finish(data.step, counts.samples, counts.digest, outcome.applied, counts.changed)
            self.state = TrainState(
                step=data.step + 1,
                updates=self.engine.updates,
                data=data.plan_state_after.to_json(),
                refused_in_a_row=self.guard.in_a_row,
                refused_total=self.guard.total,
                wall_s=self.state.wall_s + time.monotonic() - began,
            )
            row = None
            last = self.state.step == self.stage.steps
            measured = self.heldout.is_due(self.state.step)
            if measured or last or self.state.step % self.settings.logging.every_steps == 0:
                step_s = time.monotonic() - began
                row = self.metrics.row(data, counts, rates, outcome, self.engine, data_wait_s, step_s)
                row |= self.heldout.measure(self.engine) if measured else {}
                monitor.write(row)
            monitor.advance(self.state.step, row)
            if counts.stop or last:
                self._save_last()
            elif self.state.step % self.settings.checkpoint.every_steps == 0:
                self.saver.save(self.state)
            if counts.stop and not last:
                return counts.stop
        return 0

    def _step(self, data: StepData, counts: Counts) -> tuple[dict[str, float], Outcome]:
        """Forward and backward of every micro-batch, then the update."""
        seed_step(self.settings.seed, data.step, self.world.rank)
        rates = self.engine.set_learning_rates(data.step, self.stage)
        self.metrics.begin(counts)
        # The engine averages over ranks; we want the sum over ranks divided by the weight of all items.
        weight = self.world.size / (counts.weight or 1)
        for number, (pack, on_host) in enumerate(zip(data.packs, counts.packs, strict=True)):
            items = on_host.to(self.world.device)
            losses, figures = self.engine.forward(pack.inputs.to(self.world.device))
            self.metrics.add(losses, items, figures)
            self.engine.accumulate(weighted_sum(losses, weight, items.weights), last=number == len(data.packs) - 1)
        self.metrics.add_gradient_squares(self.engine.module_gradient_squares())
        outcome = self.engine.apply()
        self.guard.observe(outcome.applied, data.step + 1, _samples(data))
        return rates, outcome

    def _save_last(self) -> None:
        """Save, and wait until it is whole. Collective: every rank must reach this."""
        self.saver.save(self.state)
        self.saver.wait()
        if self.saver.saved_step != self.state.step:  # the disk was full a moment ago: the state is worth another try
            self.saver.save(self.state)
            self.saver.wait()

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

    def _begin_manifest(self, counts: dict[str, dict[str, int]]) -> dict[str, Any]:
        """Write recipe and manifest on rank 0; every rank fails where rank 0 does."""
        written: dict[str, Any] = {"recipe": manifest.recipe_values(self.settings)}
        error: Exception | None = None
        if self.world.is_main:
            build.log_parameters(counts)
            try:
                data = self.plan.corpus.describe()
                written = manifest.begin(self.settings, self.plan.fingerprint, data, counts, self.world.size)
            except (OSError, ValueError) as caught:
                error = caught
        self.world.require_all(error, "writing the manifest")
        return written

    def _result(self) -> dict[str, Any]:
        """What the manifest says at the end."""
        return {
            "steps": self.state.step,
            "updates": self.state.updates,
            "updates_refused": self.state.refused_total,
            "wall_s": round(self.state.wall_s, 3),
        }


def seed_step(seed: int, step: int, rank: int) -> None:
    """Seed every generator from (seed, step, rank).

    The random numbers of a step then depend on nothing that happened before it: resuming needs no generator states.
    """
    mixed = int(np.random.SeedSequence([seed, step, rank]).generate_state(1)[0])
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
