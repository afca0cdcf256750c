"""How far a run is, for whoever watches it: a line on a terminal, elsewhere a log line now and then. Rank 0 only."""

from __future__ import annotations

import logging
import sys
import time
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as Display

logger = logging.getLogger(__name__)

QUIET_PROGRESS_S = 15.0  # where the output is no terminal: seconds between two progress lines
SPEED_PERIOD_S = 600.0  # the steps of this time give the time left

Row = dict[str, Any]


class Progress:
    """Shows steps done, the newest figures and the time left.

    Args:
        name: of the run.
        first_step: steps done before this launch.
        steps: of the whole run.
        console: where the line is drawn; None: standard error.
    """

    def __init__(self, name: str, first_step: int, steps: int, console: Console | None = None) -> None:
        self._name, self._steps, self._first = name, steps, first_step
        self._started = self._last_line = time.monotonic()
        self._figures = ""
        self._display: Display | None = None
        self._moved: list[logging.StreamHandler[Any]] = []
        console = console or Console(stderr=True)
        if console.is_terminal:
            self._open(console)

    def advance(self, step: int, row: Row | None) -> None:
        """Show that ``step`` steps are done; ``row`` is the step's row of metrics.jsonl where it has one."""
        if row is not None:
            self._figures = figures(row)
        if self._display is not None:
            self._display.update(self._task, completed=step, figures=self._figures)
            return
        now = time.monotonic()
        if now - self._last_line >= QUIET_PROGRESS_S or step in (self._first + 1, self._steps):
            self._last_line = now
            left_s = (now - self._started) / (step - self._first) * (self._steps - step)
            logger.info("%s: step %d/%d, %s, %s left", self._name, step, self._steps, self._figures, clock(left_s))

    def close(self) -> None:
        """Leave the line as it is."""
        if self._display is not None:
            for handler in self._moved:
                handler.setStream(self._stderr)
            self._display.stop()

    def _open(self, console: Console) -> None:
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        left = (TextColumn("left"), TimeRemainingColumn(), TextColumn("{task.fields[figures]}"))
        self._display = Display(*columns, *left, console=console, speed_estimate_period=SPEED_PERIOD_S)
        self._task = self._display.add_task(self._name, total=self._steps, completed=self._first, figures="")
        self._stderr = sys.stderr
        self._display.start()
        # The display draws what is written to sys.stderr above itself; log handlers hold the stream of before.
        for handler in logging.getLogger().handlers:
            if isinstance(handler, logging.StreamHandler) and handler.stream is self._stderr:
                handler.setStream(sys.stderr)
                self._moved.append(handler)


def figures(row: Row) -> str:
    """The figures of a row that the line shows."""
    loss = "not finite" if row["loss"] is None else f"{row['loss']:.4f}"
    parts = [f"loss {loss}", f"{row['tokens_per_s']:,.0f} tokens/s"]
    if row.get("mfu") is not None:
        parts.append(f"MFU {row['mfu']:.1%}")
    if row.get("data_wait_share", 0) >= 0.01:
        parts.append(f"waiting for data {row['data_wait_share']:.0%}")
    return ", ".join(parts)


def clock(seconds: float) -> str:
    """Hours, minutes and seconds."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}"
