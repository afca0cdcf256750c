"""The flight recorder: what each rank did in its last steps, always on the disk, kept when the run fails.

Each rank writes one line a step into one of two files in turn, so that together they always hold at least the last
``guards.recorded_steps`` steps. A line is flushed to the operating system, not forced to the disk: it survives the end
of the process by any signal, not that of the machine.

::

    RUN/flight/rank-00003.0.jsonl, rank-00003.1.jsonl    the ring
    RUN/flight/failed-step-N/rank-00003.jsonl            what the ring held when the run failed in step N
"""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

from keye_train import runs
from keye_train.data.collate import LoadedPack
from keye_train.rows import RowFile

logger = logging.getLogger(__name__)


class FlightRecorder:
    """Of one rank.

    Args:
        run_dir: folder of the run.
        rank: who writes.
        steps: at least so many are kept; 0: nothing is written.
    """

    def __init__(self, run_dir: Path, rank: int, steps: int) -> None:
        self._folder, self._rank, self._steps = run_dir / runs.FLIGHT, rank, steps
        self._half = 0
        self._written = 0  # into this half
        self._file: RowFile | None = None
        if steps:
            self._file = self._go_on()

    def write(self, row: dict[str, Any]) -> None:
        """Write down a step; ``row["step"]`` counts from 1."""
        if self._file is None:
            return
        if self._written >= self._steps:
            self._half = 1 - self._half
            self._file.turn_to(self._path(self._half))
            self._written = 0
        self._file.write(row)
        self._written += 1

    def keep(self, step: int, error: BaseException) -> None:
        """Keep what the ring holds: the run fails in ``step``."""
        if self._file is None:
            return
        target = self._folder / f"failed-step-{step}" / f"rank-{self._rank:05d}.jsonl"
        end = {"step": step, "error": f"{type(error).__name__}: {error}"}
        try:
            rows = [*read_flight(self._folder.parent, self._rank), end]
            runs.write_text_atomic(target, "".join(json.dumps(row) + "\n" for row in rows))
            logger.error("step %d failed; the steps before it: %s", step, target)
        except OSError as caught:
            logger.error("step %d failed, and the flight recorder cannot be kept: %s", step, caught)

    def close(self) -> None:
        """Close the file."""
        if self._file is not None:
            self._file.close()

    def _go_on(self) -> RowFile:
        """Open the newer half of an earlier launch, to fill it up: emptying either would leave too few steps."""
        halves = _by_age(_ring(self._folder, self._rank))
        if halves:
            path, rows = halves[-1]
            self._half, self._written = int(path == self._path(1)), len(rows)
            if not path.read_bytes().endswith(b"\n"):  # the machine died while it wrote
                runs.write_text_atomic(path, "".join(json.dumps(row) + "\n" for row in rows))
        return RowFile(self._path(self._half))

    def _path(self, half: int) -> Path:
        return _ring(self._folder, self._rank)[half]


def read_flight(run_dir: Path, rank: int) -> list[dict[str, Any]]:
    """The recorded steps of a rank, in the order in which they were written."""
    halves = _by_age(_ring(run_dir / runs.FLIGHT, rank))
    return [row for _, rows in halves for row in rows]


def _by_age(halves: tuple[Path, Path]) -> list[tuple[Path, list[dict[str, Any]]]]:
    """Those of the files that exist, with their rows, the one that was written to last at the end."""
    found = [(path, runs.read_jsonl(path)) for path in halves if path.exists()]
    # File systems may round the times of files, and an empty file is what a rotation left that was killed.
    return sorted(found, key=lambda one: (one[1][-1].get("time", 0.0) if one[1] else -1.0, one[0].stat().st_mtime_ns))


def describe_packs(packs: list[LoadedPack]) -> list[dict[str, Any]]:
    """What a rank trained on: of each micro-step the samples as (source, shard, key), and the sizes."""
    return [
        {
            "samples": [[ref.source, ref.shard, ref.key] for ref in pack.refs],
            "tokens": pack.tokens,
            "patches": pack.patches,
            "skipped": len(pack.skipped),
        }
        for pack in packs
    ]


def _ring(folder: Path, rank: int) -> tuple[Path, Path]:
    return folder / f"rank-{rank:05d}.0.jsonl", folder / f"rank-{rank:05d}.1.jsonl"
