"""What stops a run on purpose: gradients that stay non-finite, and signals of the user or the scheduler."""

from __future__ import annotations

import logging
import signal
import time
from collections.abc import Sequence
from types import FrameType

from keye_train.sample import SampleRef

logger = logging.getLogger(__name__)

MAX_REFUSED_IN_A_ROW = 5
"""Updates in a row that may be refused for a non-finite gradient. One bad batch is survivable; five mean that the
weights themselves, or every batch, are broken, and further steps would only burn compute."""


PATIENCE_S = 3.0
"""Seconds after a SIGINT from which on another one means it."""


class NonFiniteError(RuntimeError):
    """Too many updates in a row had a non-finite gradient norm."""


class NonFiniteGuard:
    """Counts updates that were refused for a non-finite gradient and stops the run when they do not end."""

    def __init__(self, in_a_row: int = 0, total: int = 0) -> None:
        self.in_a_row = in_a_row
        self.total = total

    def observe(self, applied: bool, step: int, samples: Sequence[SampleRef]) -> None:
        """Record the outcome of a step.

        Args:
            applied: False where the engine refused the update. The engine decides from the *global* norm, so all ranks
                agree and all raise together.
            samples: this rank's samples of the global batch, named in the log.

        Raises:
            NonFiniteError: ``MAX_REFUSED_IN_A_ROW`` refused updates in a row.
        """
        if applied:
            self.in_a_row = 0
            return
        self.in_a_row += 1
        self.total += 1
        named = ", ".join(f"{ref.source}/{ref.key} in {ref.shard}" for ref in samples)
        logger.warning("step %d: non-finite gradient, update not applied; samples of this rank: %s", step, named)
        if self.in_a_row >= MAX_REFUSED_IN_A_ROW:
            raise NonFiniteError(
                f"step {step}: the gradient was not finite {self.in_a_row} times in a row. Lower "
                f"stage.optimizer.lr or look at these samples: {named}"
            )


class StopRequest:
    """Turns SIGINT and SIGTERM into a wish that the training loop grants at the end of a step.

    A second SIGINT, at least ``PATIENCE_S`` later, is passed on as KeyboardInterrupt, for those who cannot wait. Sooner
    it is an echo: on Ctrl-C each rank gets the terminal's signal and then the launcher's.
    """

    def __init__(self) -> None:
        self.signal_number = 0
        self._received_at = 0.0
        self._previous: dict[int, object] = {}

    def __enter__(self) -> StopRequest:
        for number in (signal.SIGINT, signal.SIGTERM):
            self._previous[number] = signal.signal(number, self._receive)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def as_flags(self) -> tuple[int, int]:
        """Whether SIGINT and SIGTERM came: two numbers that can be summed over the ranks."""
        return int(self.signal_number == signal.SIGINT), int(self.signal_number == signal.SIGTERM)

    @staticmethod
    def from_flags(interrupts: int, terminations: int) -> int:
        """Signal that stops the run, given how many ranks got which; 0: none. SIGTERM, a scheduler's, comes first."""
        return signal.SIGTERM if terminations else signal.SIGINT if interrupts else 0

    def _receive(self, number: int, _: FrameType | None) -> None:
        now = time.monotonic()
        if number == signal.SIGINT and self.signal_number and now - self._received_at >= PATIENCE_S:
            raise KeyboardInterrupt
        if not self.signal_number:
            self.signal_number, self._received_at = number, now


def exit_code(signal_number: int) -> int:
    """Shell convention: 128 + number of the signal (130 for SIGINT, 143 for SIGTERM)."""
    return 128 + signal_number
