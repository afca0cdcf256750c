"""The training loop of every stage.

A run is: build, resume where a checkpoint is, step, export. A step is: read -> count -> train -> log -> save, where it
is due; :mod:`keye_train.training.learner` counts and trains.
"""

from __future__ import annotations

import gc
import logging
import time
from functools import partial
from pathlib import Path
from typing import Any

from keye_train import runs
from keye_train.data import reader_server
from keye_train.data.loader import PackReader, StepData
from keye_train.settings import TrainSettings
from keye_train.training import build, checkpoint, distributed, export, manifest
from keye_train.training.attendants import Attendants
from keye_train.training.distributed import World
from keye_train.training.guards import StopRequest, exit_code
from keye_train.training.heldout import HeldoutLoss
from keye_train.training.learner import Learner
from keye_train.training.occupancy import RunLock
from keye_train.training.saver import Saver
from keye_train.training.spikes import RollBack, Spike, read_spikes, record_spike
from keye_train.training.timing import slowest_ranks
from keye_train.training.watchdog import COUNT, DATA, SAVE, STEP, begin_launch

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
    if settings.data.workers:
        reader_server.prepare(PackReader.__module__)  # imports while this process builds the model
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


class Trainer:
    """One run on one rank."""

    def __init__(self, settings: TrainSettings, world: World, stop_request: StopRequest) -> None:
        self.settings, self.stage, self.world = settings, settings.stage, world
        self.run_dir = Path(settings.run_dir)
        self._stop_request = stop_request
        self.plan = build.build_plan(settings, world.size)
        self.encoder = build.build_encoder(settings)
        found = checkpoint.newest_whole(self.run_dir, world, partial(manifest.foreign, settings))
        objective = build.build_objective(settings)
        self.manifest = self._begin_manifest(build.count_parameters(objective.model))
        self.learner = Learner(settings, world, self.plan, objective, stop_request, found)
        self.saver = Saver(self.run_dir, self.learner.engine, world, settings.checkpoint, self.manifest)
        self.saver.saved_step = found.state.step if found else None
        self.heldout = HeldoutLoss(settings, world, self.encoder, objective)

    @property
    def _done(self) -> int:
        """Optimizer steps done."""
        return self.learner.state.step

    def run(self) -> int:
        """Train to the end or to a signal; the exit code."""
        by = Attendants.open(self.learner, self.encoder, self.manifest["recipe"])
        with by.watchdog:
            try:
                return self._run(by)
            except RollBack:
                self.learner.engine.close()
                raise

    def _run(self, by: Attendants) -> int:
        try:
            with self._stop_request:  # before and behind it a signal ends the process at once: nothing would be lost
                stopped_by = self._train(by)
        except RollBack:  # no failure
            raise
        except Exception as error:
            by.recorder.keep(self._done + 1, error)
            raise
        finally:
            self.saver.close(SAVE_PATIENCE_S)
            by.close()
        by.watchdog.enter(SAVE, self._done)
        if stopped_by:
            logger.info("stopped after step %d; the same command goes on from %s", self._done, self._saved())
            return exit_code(stopped_by)
        self.world.require_all(by.ledger.lost, "writing the ledger")  # or a finished run would lack samples
        for average in (False, True) if self.stage.optimizer.ema_decay else (False,):
            config = self.learner.objective.model.config
            export.write_export(self.learner.engine, config, self.settings, self.run_dir, self.world, average)
        if self.world.is_main:
            manifest.finish(self.run_dir, self.manifest, self._result())
        self.world.barrier()
        self.learner.engine.close()
        return 0

    def _saved(self) -> str:
        """Where a next launch begins."""
        saved = self.saver.saved_step
        if saved == self._done:
            return "there"
        return "the start of the run" if saved is None else f"step {saved}, its newest checkpoint"

    def _train(self, by: Attendants) -> int:
        """All remaining steps; the signal that stopped them, or 0."""
        try:
            return self._train_steps(by)
        except RollBack:
            # However long it takes: the save under way writes what the run goes on from, in a folder that the start
            # clears. It is no failure, so every rank lives and is here.
            by.watchdog.enter(SAVE, self._done)
            self.saver.wait()
            raise

    def _train_steps(self, by: Attendants) -> int:
        while self._done < self.stage.steps:
            began = time.monotonic()
            data = self._read(by)
            if data is None:  # on every rank at the same step: all have the same plan
                self._save(by, wait=True)
                return 0
            data_wait_s = time.monotonic() - began
            by.ledger.record(data)
            if data.passed_over:  # on every rank
                self._pass_over(data, by)
                continue
            stop = self._train_step(data, began, data_wait_s, by)
            last = self._done == self.stage.steps
            if stop or last or self._done % self.settings.checkpoint.every_steps == 0:
                self._save(by, wait=stop > 0 or last)
            if stop and not last:
                return stop
        return 0

    def _read(self, by: Attendants) -> StepData | None:
        """This rank's part of the next global batch; None behind the last one that the data are enough for."""
        by.watchdog.enter(DATA, self._done + 1)
        self.learner.clock.enter("data_wait")
        data = next(by.loader, None)
        self.learner.clock.enter(None)
        if data is None:
            logger.warning(
                "the data ended after %d of stage.steps=%d: every source has had its max_epochs; set stage.steps "
                "to that number, so that the learning rate ends with the data, or raise max_epochs",
                self._done,
                self.stage.steps,
            )
        return data

    def _train_step(self, data: StepData, began: float, data_wait_s: float, by: Attendants) -> int:
        """Train on the global batch and tell all who want to know; the signal that is to stop the run, or 0."""
        learner = self.learner
        by.watchdog.enter(COUNT, self._done + 1)  # waits for ranks that have no data yet
        counts = learner.count(data)
        by.watchdog.enter(STEP, self._done + 1)
        rates, outcome = learner.step(data, counts)
        by.ledger.finish(data.step, counts.samples, counts.digest, outcome.applied, counts.changed)
        learner.advance(data, time.monotonic() - began)
        row = None
        measured = self.heldout.is_due(self._done)
        if measured or self._done == self.stage.steps or self._done % self.settings.logging.every_steps == 0:
            step_s = time.monotonic() - began
            row = learner.metrics.row(data, counts, rates, outcome, learner.engine, data_wait_s, step_s)
            if measured:
                by.watchdog.enter(SAVE, self._done)
                row |= self.heldout.measure(learner.engine)
            row |= {"slowest_ranks": slowest_ranks(counts.extra)} if counts.extra else {}
            by.monitor.write(row)
        by.note(learner, data, counts, outcome, row)
        by.monitor.advance(self._done, row)
        return counts.stop

    def _save(self, by: Attendants, wait: bool) -> None:
        """Save the state; ``wait``: until it is whole. Collective: every rank must reach this."""
        by.watchdog.enter(SAVE, self._done)
        self.learner.clock.enter("checkpoint")
        if wait:
            self.saver.wait()
        for _ in range(2 if wait else 1):  # the disk was full a moment ago: worth another try
            if self.saver.saved_step == self._done:  # the data ended where the last save was, or the launch began
                break
            self.saver.save(self.learner.state, by.ledger.settle)
            if wait:
                self.saver.wait()
        self.learner.clock.enter(None)

    def _pass_over(self, data: StepData, by: Attendants) -> None:
        """A step whose batch is left out: only the position moves on."""
        last = data.step + 1 == self.stage.steps
        if self.world.is_main:
            lacking = "; the run ends without a row and held-out losses of its last step" if last else ""
            logger.warning("step %d: its batch is left out (%s)%s", data.step + 1, runs.LEFT_OUT, lacking)
        by.ledger.finish(data.step, 0, 0, False)
        self.learner.advance(data)
        by.monitor.advance(self._done, None)
        if last or self._done % self.settings.checkpoint.every_steps == 0:
            self._save(by, wait=last)

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
            "steps": self._done,
            "updates": self.learner.state.updates,
            "updates_refused": self.learner.state.refused_total,
            # Going back to a checkpoint forgets the spike that was the reason.
            "loss_spikes": self.learner.spikes.total + len(read_spikes(self.run_dir)),
            "wall_s": round(self.learner.state.wall_s, 3),
        }
