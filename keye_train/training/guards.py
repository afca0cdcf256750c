"""What stops a run on purpose: updates that stay non-finite, and signals of the user or the scheduler."""

from __future__ import annotations

import logging
import os
import signal
import time
from collections.abc import Sequence
from types import FrameType

from keye_train import runs
from keye_train.sample import SampleRef
from keye_train.settings import NonFiniteSettings

logger = logging.getLogger(__name__)

PATIENCE_S = 3.0
"""Seconds after a SIGINT from which on another one means it."""


STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
"""A scheduler's come first where ranks got different ones."""


class NonFiniteError(RuntimeError):
    """Too many updates had a loss or gradient that was not finite."""


class NonFiniteGuard:
    """Counts updates refused for a loss or gradient that was not finite, and stops the run when they do not end."""

    def __init__(self, settings: NonFiniteSettings, in_a_row: int = 0, total: int = 0) -> None:
        self._settings = settings
        self.in_a_row = in_a_row
        self.total = total

    def observe(self, applied: bool, step: int, samples: Sequence[SampleRef]) -> None:
        """Record the outcome of a step.

        Args:
            applied: False where the engine refused the update. The engine decides from the *global* norm, so all ranks
                agree and all raise together.
            samples: this rank's samples of the global batch, named in the log.

        Raises:
            NonFiniteError: more refused updates than ``guards.non_finite`` allows.
        """
        if applied:
            self.in_a_row = 0
            return
        self.in_a_row += 1
        self.total += 1
        named = ", ".join(f"{ref.source}/{ref.key} in {ref.shard}" for ref in samples)
        logger.warning(
            "step %d: loss or gradient not finite, update not applied; samples of this rank: %s", step, named
        )
        limits = self._settings
        row = self.in_a_row >= limits.max_in_a_row
        if row or 0 < limits.max_total <= self.total:
            times = f"{self.in_a_row} times in a row" if row else f"{self.total} times in this run"
            key = "max_in_a_row" if row else "max_total"
            raise NonFiniteError(
                f"step {step}: loss or gradient was not finite {times} (guards.non_finite.{key}="
                f"{getattr(limits, key)}). Lower stage.optimizer.lr or look at these samples: {named}"
            )


class StopRequest:
    """Turns SIGINT, SIGTERM and SIGUSR1 into a wish that the training loop grants at the end of a step.

    SIGUSR1 is what schedulers are told to send ahead of a preemption (Slurm's ``--signal=USR1@300``). The end of the
    launcher of this rank counts as SIGTERM: nobody would restart or stop it any more.

    A second SIGINT, at least ``PATIENCE_S`` later, is passed on as KeyboardInterrupt, for those who cannot wait. Sooner
    it is an echo: on Ctrl-C each rank gets the terminal's signal and then the launcher's.
    """

    def __init__(self) -> None:
        self.signal_number = 0
        self._received_at = 0.0
        self._previous: dict[int, object] = {}
        self._launcher = runs.PARENT if "RANK" in os.environ else None

    def __enter__(self) -> StopRequest:
        for number in STOP_SIGNALS:
            self._previous[number] = signal.signal(number, self._receive)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def as_flags(self) -> tuple[int, ...]:
        """Which of ``STOP_SIGNALS`` came: numbers that can be summed over the ranks."""
        if not self.signal_number and self._launcher is not None and os.getppid() != self._launcher:
            logger.warning("the launcher of this rank is gone: saving a checkpoint and leaving")
            self.signal_number = signal.SIGTERM
        return tuple(int(self.signal_number == number) for number in STOP_SIGNALS)

    @staticmethod
    def from_flags(counts: Sequence[int]) -> int:
        """Signal that stops the run, given how many ranks got each of ``STOP_SIGNALS``; 0: none."""
        return next((number for number, count in zip(STOP_SIGNALS, counts, strict=True) if count), 0)

    def _receive(self, number: int, _: FrameType | None) -> None:
        now = time.monotonic()
        if number == signal.SIGINT and self.signal_number and now - self._received_at >= PATIENCE_S:
            raise KeyboardInterrupt
        if not self.signal_number:
            self.signal_number, self._received_at = number, now


def exit_code(signal_number: int) -> int:
    """Shell convention: 128 + number of the signal (130 for SIGINT, 143 for SIGTERM, 138 for SIGUSR1 on Linux)."""
    return 128 + signal_number
