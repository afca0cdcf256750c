"""The account of every sample that was planned and not trained on, and the limit on how many there may be."""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from keye_train.data.loader import StepData
from keye_train.runs import LEDGER, read_jsonl, write_text_atomic
from keye_train.sample import SampleRef

log = logging.getLogger(__name__)

MIN_SKIPPED = 10
"""The share of skipped samples says nothing before this many."""


def ledger_path(run_dir: str | Path, rank: int) -> Path:
    """``ledger.jsonl`` for rank 0, ``ledger.rank3.jsonl`` for rank 3: no two processes write the same file."""
    path = Path(run_dir) / LEDGER
    return path if rank == 0 else path.with_suffix(f".rank{rank}.jsonl")


def read_ledger(run_dir: str | Path) -> list[dict[str, Any]]:
    """Rows of all ranks of a run, by step."""
    folder, name = Path(run_dir), Path(LEDGER)
    paths = [folder / name, *sorted(folder.glob(f"{name.stem}.rank*{name.suffix}"))]
    return sorted((row for path in paths for row in read_jsonl(path)), key=lambda row: row["step"])


class Ledger:
    """Writes one line for each skipped sample: step, source, shard, key, reason."""

    def __init__(self, run_dir: str | Path, rank: int, max_skipped_fraction: float, first_step: int = 0) -> None:
        """Open the ledger of one rank.

        Args:
            run_dir: folder of the run.
            rank: who writes.
            max_skipped_fraction: ``data.max_skipped_fraction``.
            first_step: step that comes next. Lines of it and later ones are of a past that a resumed run does not
                share; they are dropped.
        """
        self.path = ledger_path(run_dir, rank)
        self._max_skipped_fraction = max_skipped_fraction
        self._planned = 0
        self._skipped: Counter[str] = Counter()  # source -> samples
        kept = [row for row in read_jsonl(self.path) if row["step"] < first_step]
        write_text_atomic(self.path, "".join(_line(row) for row in kept))
        self._file = self.path.open("a", encoding="utf-8")

    def record(self, data: StepData) -> None:
        """Write down what a step skipped.

        Raises:
            ValueError: more than ``data.max_skipped_fraction`` of the samples planned since the start of this process
                were skipped.
        """
        skipped = [*data.dropped, *(entry for pack in data.packs for entry in pack.skipped)]
        self._planned += len(skipped) + sum(len(pack.refs) for pack in data.packs)
        self._write(data.step, skipped)
        self._check()

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def _write(self, step: int, skipped: Iterable[tuple[SampleRef, str]]) -> None:
        for ref, reason in skipped:
            self._skipped[ref.source] += 1
            log.info("step %d skips %s of %s: %s", step, ref.key, ref.shard, reason)
            row = {"step": step, "source": ref.source, "shard": ref.shard, "key": ref.key, "reason": reason}
            self._file.write(_line(row))
        self._file.flush()

    def _check(self) -> None:
        total = self._skipped.total()
        if total < MIN_SKIPPED or total <= self._max_skipped_fraction * self._planned:
            return
        by_source = ", ".join(f"{source}: {count}" for source, count in self._skipped.most_common())
        raise ValueError(
            f"{total} of {self._planned} samples were skipped ({by_source}), more than data.max_skipped_fraction="
            f"{self._max_skipped_fraction}. The reasons stand in {self.path}; mend the shards (keye-data check), or "
            "raise the limit"
        )


def _line(row: dict[str, Any]) -> str:
    return json.dumps(row, ensure_ascii=False) + "\n"
