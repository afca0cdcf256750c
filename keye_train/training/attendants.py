"""What accompanies the steps of a run: reads for them, writes about them and watches over them."""

from __future__ import annotations

import logging
import time
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from keye_train.data.ledger import Ledger
from keye_train.data.loader import Loader, StepData
from keye_train.data.plan import PlanState
from keye_train.model.sample_encoder import SampleEncoder
from keye_train.training.counting import Counts
from keye_train.training.engine import Outcome
from keye_train.training.learner import Learner, step_seed
from keye_train.training.metrics import finite
from keye_train.training.monitor import Monitor
from keye_train.training.recorder import FlightRecorder, describe_packs
from keye_train.training.spikes import left_out_reasons, read_spikes
from keye_train.training.timing import describe_straggler, slowest_ranks
from keye_train.training.watchdog import Watchdog

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Attendants:
    """Opened together behind the learner's last step, closed together."""

    loader: Loader
    ledger: Ledger
    monitor: Monitor
    recorder: FlightRecorder
    watchdog: Watchdog
    _open: ExitStack

    @classmethod
    def open(cls, learner: Learner, encoder: SampleEncoder, recipe: dict[str, Any]) -> Attendants:
        """Open all where ``learner`` stands; the watchdog begins when it is entered.

        Args:
            learner: makes the steps.
            encoder: makes tensors of samples.
            recipe: the resolved one, for the writers of metrics.
        """
        settings, world, step = learner.settings, learner.world, learner.state.step
        run_dir, guards = Path(settings.run_dir), settings.guards
        stage = settings.stage
        position = PlanState.from_json(learner.state.data)
        leave_out = left_out_reasons(read_spikes(run_dir))
        with ExitStack() as opened:  # what is open is closed where the next cannot be opened
            recorder = FlightRecorder(run_dir, world.rank, guards.recorded_steps)
            opened.callback(recorder.close)
            monitor = Monitor(run_dir, settings.logging, world.is_main, step, stage.steps, stage.name, recipe)
            opened.callback(monitor.close)
            ledger = Ledger(run_dir, world.rank, world.size, step)
            opened.callback(ledger.close)
            loader = Loader(learner.plan, encoder, world.rank, world.size, settings, position, leave_out)
            opened.callback(loader.close)
            watchdog = Watchdog(run_dir, guards, settings.deepspeed.timeout_minutes, world, loader)
            return cls(loader, ledger, monitor, recorder, watchdog, opened.pop_all())

    def note(
        self, learner: Learner, data: StepData, counts: Counts, outcome: Outcome, row: dict[str, Any] | None
    ) -> None:
        """Write the step that is done into the flight recorder, and now and then the slowest rank into the log.

        Args:
            learner: stands behind the step.
            data: what this rank trained on.
            counts: sizes of the global batch.
            outcome: what became of the update.
            row: of metrics.jsonl, where the step has one.
        """
        step, world = learner.state.step, learner.world
        self.recorder.write(
            {
                "step": step,
                "time": time.time(),
                "world_size": world.size,
                "seed": step_seed(learner.settings.seed, data.step, world.rank),
                "loss": finite(learner.spikes.loss),
                "loss_limit": finite(learner.spikes.limit),
                "applied": outcome.applied,
                "grad_norm": finite(outcome.grad_norm),
                "grad_norms": None if row is None else row["grad_norms"],
                "seconds": learner.clock.end_step(),
                "packs": describe_packs(data.packs),
            }
        )
        if counts.extra and world.is_main and world.size > 1:
            logger.info("step %d: %s", step, describe_straggler(slowest_ranks(counts.extra)))

    def close(self) -> None:
        """Close all but the watchdog, which also watches over the export; each of them, whatever the others do."""
        self._open.close()
