"""Samples that a recipe leaves out: ``data.quarantine`` names files that ``keye-data ledger --quarantine`` writes.

One JSON object a line. A sample is known by the checksum of its shard and its row there, so a list holds wherever the
shards lie, and no longer holds for a shard that was mended.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from keye_train.data.corpus import Corpus, Source

log = logging.getLogger(__name__)

QUARANTINED = "quarantined"
"""How the reason of a sample begins that a quarantine list names."""


def read_list(file: str | Path) -> list[dict[str, Any]]:
    """Lines of a quarantine list: source, shard, key, row, reason and sha256 of the shard.

    Raises:
        ValueError: the file is missing, or a line is none of a quarantine list.
    """
    if not Path(file).is_file():
        raise ValueError(f"quarantine list {file} does not exist; write it with keye-data ledger --quarantine")
    rows = []
    for number, line in enumerate(Path(file).read_text(encoding="utf-8").splitlines(), 1):
        try:
            row = json.loads(line)
            texts = {name: str(row[name]) for name in ("source", "shard", "key", "reason", "sha256")}
            rows.append({**texts, "row": int(row["row"])})
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"quarantine list {file} line {number} is no quarantined sample") from error
    return rows


class Quarantine:
    """The samples of some lists."""

    def __init__(self, files: Sequence[str]) -> None:
        """Read the lists.

        Raises:
            ValueError: a file is missing or a line is none of a quarantine list.
        """
        self._samples: dict[tuple[str, int], str] = {}
        for file in files:
            for row in read_list(file):
                self._samples[row["sha256"], row["row"]] = f"{QUARANTINED} ({row['reason']})"

    def __len__(self) -> int:
        return len(self._samples)

    def fingerprint(self) -> str:
        """sha256 of which samples are left out: part of the plan."""
        return hashlib.sha256(repr(sorted(self._samples)).encode()).hexdigest()

    def rows(self, source: Source) -> dict[int, str]:
        """Row of the source -> reason, for the samples that are left out of it."""
        shards: dict[str, list[int]] = {}
        for header, first in zip(source.headers, source.first_rows.tolist(), strict=False):
            shards.setdefault(header.sha256, []).append(first)
        return {
            first + row: reason for (sha256, row), reason in self._samples.items() for first in shards.get(sha256, [])
        }


def exclude(corpus: Corpus, files: Sequence[str]) -> None:
    """Mark the samples of quarantine lists in a corpus; they are drawn, and given up by the plan with that reason.

    Raises:
        ValueError: see ``Quarantine``.
    """
    if not files:
        return
    quarantine = Quarantine(files)
    marked = 0
    for source in corpus.sources.values():
        rows = quarantine.rows(source)
        source.exclude(rows)
        marked += len(rows)
    corpus.quarantine = quarantine.fingerprint()
    log.info("data.quarantine: %d of %d listed samples are in this run's sources", marked, len(quarantine))
