"""The training loop of every stage.

A run is: build, resume where a checkpoint is, step, export. A step is: read -> count -> forward and backward of each
micro-batch -> apply or refuse -> log. Nothing waits for the device between the first micro-batch and the update.
"""

from __future__ import annotations

import gc
import logging
import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from keye_train import runs
from keye_train.data.collate import LoadedPack
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
from keye_train.training.metrics import StepMetrics, finite
from keye_train.training.monitor import Monitor
from keye_train.training.occupancy import RunLock
from keye_train.training.optimizer import parameter_groups
from keye_train.training.recorder import FlightRecorder, describe_packs
from keye_train.training.saver import Saver
from keye_train.training.spikes import (
    RollBack,
    Spike,
    SpikeGuard,
    Verdict,
    left_out_reasons,
    read_spikes,
    record_spike,
)
from keye_train.training.timing import StepClock, describe_straggler, own_times, slowest_ranks
from keye_train.training.watchdog import COUNT, DATA, SAVE, STEP, Watchdog, begin_launch

logger = logging.getLogger(__name__)


SAVE_PATIENCE_S = 60.0
"""How long a failing rank waits for its save under way."""


def train(settings: TrainSettings) -> int:
    """Run one stage, or continue it: the same call in the same ``run_dir`` goes on from the newest whole checkpoint.

    Works in one process, and in every process that torchrun or the deepspeed launcher starts.

    Returns:
        Exit code: 0 when the run is finished (also when it was before), 130, 143 or 138 when a signal stopped it.

    Raises:
        SpikeError: more loss spikes than the recipe allows.
        SettingsError: the recipe cannot work, or ``run_dir`` belongs to another recipe.
        ValueError: data, parent or checkpoint do not fit the recipe.
        NonFiniteError: loss or gradient stayed non-finite.
    """
    settings.check()
    run_dir = Path(settings.run_dir)
    if _is_finished(settings):  # without joining the ranks, which takes seconds
        return 0
    stop_request = StopRequest()
    world = distributed.start(settings.deepspeed.timeout_minutes)
    lock = RunLock(run_dir, world)
    try:
        if _was_finished_meanwhile(settings, world):
            return 0
        begin_launch(run_dir, world)
        while isinstance(ended := _run_until_spike(settings, world, stop_request), Spike):
            record_spike(run_dir, ended, settings.guards.spike, world)
            gc.collect()  # model and optimizer of the run that ended hold each other
        return ended
    finally:
        lock.release()


def _is_finished(settings: TrainSettings) -> bool:
    """Whether there is nothing to do; refuses a ``run_dir`` of another run."""
    if manifest.is_finished(settings):
        logger.info("%s: already finished", settings.run_dir)
        return True
    manifest.check_same_run(settings)
    return False


def _was_finished_meanwhile(settings: TrainSettings, world: World) -> bool:
    """What another launch did while this one waited for the folder. Collective: every rank must reach this."""
    error: Exception | None = None
    finished = False
    if world.is_main:
        try:
            finished = _is_finished(settings)
        except (OSError, ValueError) as caught:
            error = caught
    world.require_all(error, f"looking at {settings.run_dir}")
    return world.max_int(finished) > 0


def _run_until_spike(settings: TrainSettings, world: World, stop_request: StopRequest) -> int | Spike:
    """Run to the exit code, or to a spike after which the run goes on from a checkpoint.

    Nothing of the run is referenced when this returns: its memory is free for the next.
    """
    try:
        return Trainer(settings, world, stop_request).run()
    except RollBack as wish:
        return wish.spike


@dataclass(frozen=True)
class Attendants:
    """What accompanies the steps of a run."""

    loader: Loader
    ledger: Ledger
    monitor: Monitor
    recorder: FlightRecorder
    watchdog: Watchdog

    def close(self) -> None:
        """Close all but the watchdog, which also watches over the export."""
        self.loader.close()
        self.ledger.close()
        self.monitor.close()
        self.recorder.close()


OnLosses = Callable[[LoadedPack, Tensor], None]
"""Is shown the losses [K] of each micro-batch."""


@dataclass(frozen=True)
class Start:
    """Where a replay begins; ``checkpoint`` None: where the run began."""

    checkpoint: Checkpoint | None


class Trainer:
    """One run on one rank."""

    def __init__(
        self,
        settings: TrainSettings,
        world: World,
        stop_request: StopRequest,
        start: Start | None = None,
    ) -> None:
        """``start``: where a replay begins, which writes nothing; None: a run, from its newest whole checkpoint."""
        self.settings, self.stage, self.world = settings, settings.stage, world
        self.run_dir = Path(settings.run_dir)
        self._stop_request = stop_request
        settings.gradient_accumulation(world.size)  # refuses a world size that does not divide the global batch
        self.plan = Plan.from_settings(settings, training_cost(settings))
        self.plan.check_world_size(world.size)
        self.processor = SampleEncoder.from_settings(
            settings.model, settings.data.resolution, settings.data.video_backend, settings.data.scaled_jpeg
        )
        if start is None:
            found = checkpoint.newest_whole(self.run_dir, world, partial(manifest.foreign, settings))
        else:
            found = start.checkpoint
        self.state = found.state if found else TrainState(0, 0, self.plan.start().to_json())
        self.objective = build.build_objective(settings)
        self.manifest: dict[str, Any] = {}
        if start is None:
            self.manifest = self._begin_manifest(build.count_parameters(self.objective.model))
        self.engine = self._build_engine(found)
        self.saver: Saver | None = None
        if start is None:
            self.saver = Saver(self.run_dir, self.engine, world, settings.checkpoint, self.manifest)
            self.saver.saved_step = found.state.step if found else None
        self.skip_limit = SkipLimit(settings.data)
        self.skip_limit.check_marks(self.plan)
        self.guard = NonFiniteGuard(settings.guards.non_finite, self.state.refused_in_a_row, self.state.refused_total)
        self.spikes = SpikeGuard(settings.guards.spike, world, self.state.spikes)
        self.counter = BatchCounter(self.plan.sources, self.objective, self.stage.loss_weighting)
        self.heldout = HeldoutLoss(settings, world, self.processor, self.objective)
        self.metrics = StepMetrics(settings, world, self.plan.sources, self.objective, self.plan.cost)
        self.clock = StepClock(world.device)
        self.on_losses: OnLosses | None = None

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
        leave_out = left_out_reasons(read_spikes(self.run_dir))
        loader = Loader(self.plan, self.processor, self.world.rank, self.world.size, self.settings, position, leave_out)
        guards = self.settings.guards
        recorder = FlightRecorder(self.run_dir, self.world.rank, guards.recorded_steps)
        timeout_minutes = self.settings.deepspeed.timeout_minutes
        watchdog = Watchdog(self.run_dir, guards, timeout_minutes, self.world, loader)
        with watchdog:
            try:
                return self._run(Attendants(loader, ledger, monitor, recorder, watchdog))
            except RollBack:
                self.engine.close()
                raise

    def _run(self, by: Attendants) -> int:
        try:
            with self._stop_request:  # before and behind it a signal ends the process at once: nothing would be lost
                stopped_by = self._train(by)
        except RollBack:  # no failure
            raise
        except Exception as error:
            by.recorder.keep(self.state.step + 1, error)
            raise
        finally:
            if self.saver is not None:
                self.saver.close(SAVE_PATIENCE_S)
            by.close()
        by.watchdog.enter(SAVE, self.state.step)
        if stopped_by:
            logger.info("stopped after step %d; the same command goes on from %s", self.state.step, self._saved())
            return exit_code(stopped_by)
        self.world.require_all(by.ledger.lost, "writing the ledger")  # or a finished run would lack samples
        for average in (False, True) if self.stage.optimizer.ema_decay else (False,):
            config = self.objective.model.config
            export.write_export(self.engine, config, self.settings, self.run_dir, self.world, average)
        if self.world.is_main:
            manifest.finish(self.run_dir, self.manifest, self._result())
        self.world.barrier()
        self.engine.close()
        return 0

    def _saved(self) -> str:
        """Where a next launch begins."""
        assert self.saver is not None
        saved = self.saver.saved_step
        if saved == self.state.step:
            return "there"
        return "the start of the run" if saved is None else f"step {saved}, its newest checkpoint"

    def _train(self, by: Attendants) -> int:
        """All remaining steps; the signal that stopped them, or 0."""
        try:
            return self._train_steps(by)
        except RollBack:
            # However long it takes: the save under way writes what the run goes on from, in a folder that the start
            # clears. It is no failure, so every rank lives and is here.
            by.watchdog.enter(SAVE, self.state.step)
            assert self.saver is not None
            self.saver.wait()
            raise

    def _train_steps(self, by: Attendants) -> int:
        while self.state.step < self.stage.steps:
            began = time.monotonic()
            by.watchdog.enter(DATA, self.state.step + 1)
            self.clock.enter("data_wait")
            data = next(by.loader, None)
            self.clock.enter(None)
            if data is None:  # on every rank at the same step: all have the same plan
                logger.warning(
                    "the data ended after %d of stage.steps=%d: every source has had its max_epochs; set stage.steps "
                    "to that number, so that the learning rate ends with the data, or raise max_epochs",
                    self.state.step,
                    self.stage.steps,
                )
                self._save(by, wait=True)
                return 0
            data_wait_s = time.monotonic() - began
            by.ledger.record(data)
            if data.passed_over:  # on every rank
                self._pass_over(data, by)
                continue
            by.watchdog.enter(COUNT, self.state.step + 1)  # waits for ranks that have no data yet
            counts = self.count(data)
            by.watchdog.enter(STEP, self.state.step + 1)
            rates, outcome = self.step(data, counts)
            by.ledger.finish(data.step, counts.samples, counts.digest, outcome.applied, counts.changed)
            self.advance(data, time.monotonic() - began)
            row = None
            last = self.state.step == self.stage.steps
            measured = self.heldout.is_due(self.state.step)
            if measured or last or self.state.step % self.settings.logging.every_steps == 0:
                step_s = time.monotonic() - began
                row = self.metrics.row(data, counts, rates, outcome, self.engine, data_wait_s, step_s)
                if measured:
                    by.watchdog.enter(SAVE, self.state.step)
                    row |= self.heldout.measure(self.engine)
                row |= {"slowest_ranks": slowest_ranks(counts.extra)} if counts.extra else {}
                by.monitor.write(row)
            self._note(data, counts, outcome, row, by)
            by.monitor.advance(self.state.step, row)
            if counts.stop or last or self.state.step % self.settings.checkpoint.every_steps == 0:
                self._save(by, wait=counts.stop > 0 or last)
            if counts.stop and not last:
                return counts.stop
        return 0

    def _note(
        self, data: StepData, counts: Counts, outcome: Outcome, row: dict[str, Any] | None, by: Attendants
    ) -> None:
        """Write the step into the flight recorder, and now and then the slowest rank into the log."""
        by.recorder.write(
            {
                "step": self.state.step,
                "time": time.time(),
                "world_size": self.world.size,
                "seed": step_seed(self.settings.seed, data.step, self.world.rank),
                "loss": finite(self.spikes.loss),
                "loss_limit": finite(self.spikes.limit),
                "applied": outcome.applied,
                "grad_norm": finite(outcome.grad_norm),
                "grad_norms": None if row is None else row["grad_norms"],
                "seconds": self.clock.end_step(),
                "packs": describe_packs(data.packs),
            }
        )
        if counts.extra and self.world.is_main and self.world.size > 1:
            logger.info("step %d: %s", self.state.step, describe_straggler(slowest_ranks(counts.extra)))

    def _save(self, by: Attendants, wait: bool) -> None:
        """Save the state; ``wait``: until it is whole. Collective: every rank must reach this."""
        by.watchdog.enter(SAVE, self.state.step)
        self.clock.enter("checkpoint")
        assert self.saver is not None
        if wait:
            self.saver.wait()
        for _ in range(2 if wait else 1):  # the disk was full a moment ago: worth another try
            if self.saver.saved_step == self.state.step:  # the data ended where the last save was, or the launch began
                break
            self.saver.save(self.state, by.ledger.settle)
            if wait:
                self.saver.wait()
        self.clock.enter(None)

    def _pass_over(self, data: StepData, by: Attendants) -> None:
        """A step whose batch is left out: only the position moves on."""
        last = data.step + 1 == self.stage.steps
        if self.world.is_main:
            lacking = "; the run ends without a row and held-out losses of its last step" if last else ""
            logger.warning("step %d: its batch is left out (%s)%s", data.step + 1, runs.LEFT_OUT, lacking)
        by.ledger.finish(data.step, 0, 0, False)
        self.advance(data)
        by.monitor.advance(self.state.step, None)
        if last or self.state.step % self.settings.checkpoint.every_steps == 0:
            self._save(by, wait=last)

    def advance(self, data: StepData, wall_s: float = 0.0) -> None:
        """The step of ``data`` is done."""
        self.state = TrainState(
            step=data.step + 1,
            updates=self.engine.updates,
            data=data.plan_state_after.to_json(),
            refused_in_a_row=self.guard.in_a_row,
            refused_total=self.guard.total,
            wall_s=self.state.wall_s + wall_s,
            spikes=self.spikes.to_json(),
        )

    def count(self, data: StepData) -> Counts:
        """Sizes of the global batch, now and then with the times of all ranks. Collective: every rank must reach it."""
        every = self.settings.guards.straggler_every_steps
        due = every > 0 and (data.step + 1) % every == 0
        times = own_times(self.clock.take_means(), self.world) if due else []
        return self.counter.count(data, self.world, self._stop_request, self.skip_limit, times)

    def step(self, data: StepData, counts: Counts) -> tuple[dict[str, float], Outcome]:
        """Forward and backward of every micro-batch, then the update. Collective: every rank must reach this."""
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
            self.guard.observe(outcome.applied, data.step + 1, _samples(data))
        return rates, outcome

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
            # Going back to a checkpoint forgets the spike that was the reason.
            "loss_spikes": self.spikes.total + len(read_spikes(self.run_dir)),
            "wall_s": round(self.state.wall_s, 3),
        }


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
