"""The account of every planned sample: a line for each that was skipped, a line for each step about the others.

``audit`` holds both against the plan. Here is also the limit on how many samples a run may skip.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from keye_train.data.loader import StepData
from keye_train.data.plan import AT_THE_END, OVER_BUDGET, Plan
from keye_train.data.quarantine import QUARANTINED
from keye_train.rows import RowFile
from keye_train.runs import LEDGER, TRAINED, keep_rows_until, read_jsonl
from keye_train.settings import DataSettings

log = logging.getLogger(__name__)

MARKED_PARTS, MARKED_ROWS = 64, 4096
"""Of a large source, so many parts of so many rows are searched at the start for samples that its index marks."""

LEFT_OUT = "batch left out"
"""How the reason of the samples begins whose whole batch is not trained on."""

SOUND = (OVER_BUDGET, QUARANTINED, AT_THE_END, LEFT_OUT)
"""How the reasons begin that say nothing about whether a sample can be read."""

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
    """Writes one line for each skipped sample: step, source, shard, key, reason. Rank 0 closes each step.

    Lines that a full disk does not take wait in memory.
    """

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
        self.lost: OSError | None = None
        """Why lines are lost that the disk did not take until :meth:`close`; None where none is."""
        self._file = RowFile(self.path, must_keep=True)
        self._files = [self._file]
        self._steps: RowFile | None = None
        if rank == 0:
            keep_rows_until(self.path.with_name(TRAINED), first_step - 1)
            self._steps = RowFile(self.path.with_name(TRAINED), must_keep=True)
            self._files.append(self._steps)

    def record(self, data: StepData) -> None:
        """Write down what a step skipped."""
        for ref, reason in [*data.dropped, *data.left_out, *(entry for pack in data.packs for entry in pack.skipped)]:
            log.info("step %d skips %s of %s: %s", data.step, ref.key, ref.shard, reason)
            row = {"step": data.step, "source": ref.source, "shard": ref.shard, "key": ref.key, "reason": reason}
            self._file.write(row)

    def finish(self, step: int, samples: int, digest: int, applied: bool, changed: int = 0) -> None:
        """Write down that a step was done.

        Args:
            step: from 0.
            samples: that were read, over all ranks.
            digest: of those, see ``data.digest``.
            applied: False where the update was refused, or the batch left out.
            changed: of the samples, those that ``data.overlong`` made fit.
        """
        if self._steps is not None:
            row = {"step": step, "samples": samples, "digest": digest, "applied": applied, "changed": changed}
            self._steps.write(row)

    def settle(self) -> None:
        """Have all lines up to now on the disk. No checkpoint counts before: a resumed run does not write them again.

        Raises:
            OSError: the disk is full, or fails.
        """
        for file in self._files:
            file.settle()

    def close(self) -> None:
        """Close the files."""
        faults = [fault for file in self._files if (fault := file.close()) is not None]
        self.lost = faults[0] if faults else None


class SkipLimit:
    """Stops a run whose data are broken, by sums over all ranks: every rank decides the same at the same step.

    Samples that the index already knows to be unreadable are reported for a whole window at its first step, so they
    are held against whole windows; what turns out broken on reading is held against what was read. Samples over the
    budgets do not count: they are a choice of the recipe, and so is the quarantine.
    """

    def __init__(self, data: DataSettings) -> None:
        self._limit, self._window_samples = data.max_skipped_fraction, data.window_samples
        self._limit_of = {name: one.max_skipped_fraction for name, one in data.sources.items()}
        self._first_window: int | None = None
        self._unreadable = 0
        self._read: Counter[str] = Counter()
        self._broken: Counter[str] = Counter()

    def check_marks(self, plan: Plan) -> None:
        """Hold what the indexes of the sources already mark against the limit of each source.

        A source of more than ``MARKED_PARTS * MARKED_ROWS`` rows is judged by that many, evenly spread: a start must
        not measure a whole corpus.

        Raises:
            ValueError: names the source.
        """
        for number, name in enumerate(plan.sources):
            source, limit = plan.source(number), self._limit_of.get(name)
            if limit is not None:
                marked = rows = 0
                for part in _parts(len(source)):
                    looked = source.look(part)
                    errors = [reason for place, reason in looked.errors.items() if looked.keep[place]]
                    marked += sum(not reason.startswith(QUARANTINED) for reason in errors)
                    rows += int(looked.keep.sum())
                self._check(f"data.sources.{name}.", limit, marked, rows)

    def observe(self, unreadable: int, read: Mapping[str, int], broken: Mapping[str, int], window: int) -> None:
        """Add one step.

        Args:
            unreadable: samples of the step's window that its index marks.
            read: source -> samples read well.
            broken: source -> samples that could not be read.
            window: number of the window that the step belongs to.

        Raises:
            ValueError: more than ``data.max_skipped_fraction``, or that of a source, of the samples since the start of
                this process were skipped, and at least ``MIN_SKIPPED``.
        """
        self._first_window = window if self._first_window is None else self._first_window
        windows = window - self._first_window + 1
        self._unreadable += unreadable
        self._read.update(read)
        self._broken.update(broken)
        for name, limit in self._limit_of.items():
            if limit is not None:
                planned = self._read[name] + self._broken[name]
                self._check(f"data.sources.{name}.", limit, self._broken[name], planned)
        self._check("data.", self._limit, self._unreadable, windows * self._window_samples)
        self._check("data.", self._limit, self._broken.total(), self._broken.total() + self._read.total())

    def _check(self, where: str, limit: float, skipped: int, planned: int) -> None:
        if skipped >= MIN_SKIPPED and skipped > limit * planned:
            of = f" of the source '{where.split('.')[-2]}'" if where != "data." else ""
            raise ValueError(
                f"{skipped} of {planned} samples{of} could not be read, more than {where}max_skipped_fraction="
                f"{limit}. The reasons stand in the run's {LEDGER}; mend the shards (keye-data check), leave the "
                "samples out (keye-data ledger --quarantine), or raise the limit"
            )


def unreadable(data: StepData) -> int:
    """Samples that a step dropped because the index marks them as unreadable, and for no other reason."""
    return sum(not reason.startswith(SOUND) for _, reason in data.dropped)


def _parts(size: int) -> Iterator[np.ndarray]:
    """Rows of a source in parts: all of them, or evenly spread ones."""
    parts = min(-(-size // MARKED_ROWS), MARKED_PARTS)
    for part in range(parts):
        start = part * size // parts // MARKED_ROWS * MARKED_ROWS  # whole blocks of ``columns``
        yield np.arange(start, min(start + MARKED_ROWS, size))
