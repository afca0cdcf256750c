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

from keye_train.data.corpus import Corpus, Source

log = logging.getLogger(__name__)

QUARANTINED = "quarantined"
"""How the reason of a sample begins that a quarantine list names."""


class Quarantine:
    """The samples of some lists."""

    def __init__(self, files: Sequence[str]) -> None:
        """Read the lists.

        Raises:
            ValueError: a file is missing or a line is none of a quarantine list.
        """
        self._samples: dict[tuple[str, int], str] = {}
        for file in files:
            if not Path(file).is_file():
                raise ValueError(f"data.quarantine: {file} does not exist; write it with keye-data ledger --quarantine")
            for number, line in enumerate(Path(file).read_text(encoding="utf-8").splitlines(), 1):
                try:
                    row = json.loads(line)
                    self._samples[str(row["sha256"]), int(row["row"])] = f"{QUARANTINED} ({row['reason']})"
                except (ValueError, KeyError, TypeError) as error:
                    raise ValueError(f"data.quarantine: {file} line {number} is no quarantined sample") from error

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
