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
from typing import Any, TextIO

from keye_train import runs
from keye_train.data.collate import LoadedPack

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
        self._written = 0
        self._file: TextIO | None = None
        if steps:
            self._folder.mkdir(parents=True, exist_ok=True)
            older, newer = (self._path(half) for half in (0, 1))
            if older.exists() and newer.exists() and older.stat().st_mtime > newer.stat().st_mtime:
                older, newer = newer, older
            self._half = 0 if older == self._path(0) else 1  # the newer one of an earlier launch stays whole
            self._file = self._path(self._half).open("w", encoding="utf-8")

    def write(self, row: dict[str, Any]) -> None:
        """Write down a step; ``row["step"]`` counts from 1."""
        if self._file is None:
            return
        if self._written == self._steps:
            self._file.close()
            self._half = 1 - self._half
            self._file = self._path(self._half).open("w", encoding="utf-8")
            self._written = 0
        self._file.write(json.dumps(row) + "\n")
        self._file.flush()
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

    def _path(self, half: int) -> Path:
        return _ring(self._folder, self._rank)[half]


def read_flight(run_dir: Path, rank: int) -> list[dict[str, Any]]:
    """The recorded steps of a rank, in the order in which they were written."""
    files = [path for path in _ring(run_dir / runs.FLIGHT, rank) if path.exists()]
    rows = [row for path in sorted(files, key=lambda path: path.stat().st_mtime) for row in runs.read_jsonl(path)]
    return sorted(rows, key=lambda row: row.get("time", 0.0))  # file systems may round the times of files


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
