"""The account of every sample that was planned and not trained on, and the limit on how many there may be."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

from keye_train.data.loader import StepData
from keye_train.data.plan import OVER_BUDGET
from keye_train.runs import LEDGER, keep_rows_until, read_jsonl

log = logging.getLogger(__name__)

MIN_SKIPPED = 10
"""The share of skipped samples says nothing before this many."""


def ledger_path(run_dir: str | Path, rank: int) -> Path:
    """``ledger.jsonl`` for rank 0, ``ledger.rank3.jsonl`` for rank 3: no two processes write the same file."""
    path = Path(run_dir) / LEDGER
    return path if rank == 0 else path.with_suffix(f".rank{rank}.jsonl")


def read_ledger(run_dir: str | Path) -> list[dict[str, Any]]:
    """Rows of all ranks of a run, by step."""
    return sorted((row for path in _paths(run_dir) for row in read_jsonl(path)), key=lambda row: row["step"])


def _paths(run_dir: str | Path) -> list[Path]:
    folder, name = Path(run_dir), Path(LEDGER)
    return [folder / name, *sorted(folder.glob(f"{name.stem}.rank*{name.suffix}"))]


class Ledger:
    """Writes one line for each skipped sample: step, source, shard, key, reason."""

    def __init__(self, run_dir: str | Path, rank: int, world_size: int = 1, first_step: int = 0) -> None:
        """Open the ledger of one rank.

        Args:
            run_dir: folder of the run.
            rank: who writes.
            world_size: ranks of this launch. Rank 0 also trims the files of ranks that only an earlier launch had;
                those of its own launch are open in their processes.
            first_step: step that comes next. Lines of it and later ones are of a past that a resumed run does not
                share; they are dropped.
        """
        self.path = ledger_path(run_dir, rank)
        running = {ledger_path(run_dir, other) for other in range(world_size)}
        gone = [path for path in _paths(run_dir) if path not in running] if rank == 0 else []
        for path in (self.path, *gone):
            keep_rows_until(path, first_step - 1)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._file = self.path.open("a", encoding="utf-8")

    def record(self, data: StepData) -> None:
        """Write down what a step skipped."""
        for ref, reason in [*data.dropped, *(entry for pack in data.packs for entry in pack.skipped)]:
            log.info("step %d skips %s of %s: %s", data.step, ref.key, ref.shard, reason)
            row = {"step": data.step, "source": ref.source, "shard": ref.shard, "key": ref.key, "reason": reason}
            self._file.write(_line(row))
        self._file.flush()

    def close(self) -> None:
        """Close the file."""
        self._file.close()


class SkipLimit:
    """Stops a run whose data are broken, by sums over all ranks: every rank decides the same at the same step.

    Samples that the index already knows to be unreadable are reported for a whole window at its first step, so they
    are held against whole windows; what turns out broken on reading is held against what was read. Samples over the
    budgets do not count: they are a choice of the recipe.
    """

    def __init__(self, max_skipped_fraction: float, window_samples: int) -> None:
        self._limit, self._window_samples = max_skipped_fraction, window_samples
        self._first_window: int | None = None
        self._unreadable = self._read = self._broken = 0

    def observe(self, unreadable: int, read: int, broken: int, window: int) -> None:
        """Add one step.

        Args:
            unreadable: samples of the step's window that its index marks.
            read: samples read well.
            broken: samples that could not be read.
            window: number of the window that the step belongs to.

        Raises:
            ValueError: more than ``data.max_skipped_fraction`` of the samples since the start of this process were
                skipped, and at least ``MIN_SKIPPED``.
        """
        self._first_window = window if self._first_window is None else self._first_window
        windows = window - self._first_window + 1
        self._unreadable += unreadable
        self._read += read
        self._broken += broken
        for skipped, planned in (
            (self._unreadable, windows * self._window_samples),
            (self._broken, self._read + self._broken),
        ):
            if skipped >= MIN_SKIPPED and skipped > self._limit * planned:
                raise ValueError(
                    f"{skipped} of {planned} samples could not be read, more than data.max_skipped_fraction="
                    f"{self._limit}. The reasons stand in the run's {LEDGER}; mend the shards (keye-data check), or "
                    "raise the limit"
                )


def unreadable(data: StepData) -> int:
    """Samples that a step dropped because the index marks them as unreadable, not because they exceed a budget."""
    return sum(not reason.startswith(OVER_BUDGET) for _, reason in data.dropped)


def _line(row: dict[str, Any]) -> str:
    return json.dumps(row, ensure_ascii=False) + "\n"
