"""``keye-data ledger``: what became of every planned sample of a run."""

from __future__ import annotations

import argparse
import json
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from data_tools.shards import write_shard
from data_tools.text import one_line
from keye_train import runs
from keye_train.data.audit import Audit, audit_run
from keye_train.data.index import read_metadata
from keye_train.data.ledger import SOUND
from keye_train.data.reader import ShardReader
from keye_train.sample import SampleError
from keye_train.settings import StorageSettings

DESCRIPTION = """\
Audit a run: recompute its plan from recipe and indexes, and hold it against what the run wrote down. Every planned
sample must be trained on in its step or stand in the ledger with a reason.

Prints coverage by source and epoch, skipped samples by reason, and how many samples data.overlong made fit (changed).
Exit status 1 when a planned sample is neither trained nor skipped, or came more often than the epochs of its source.
The shards and indexes must be those of the run.

--quarantine FILE lists the samples that could not be read (not those above the budgets); data.quarantine=[FILE] leaves
them out of later runs, and keye-data requeue FILE reads them again once their shards are mended. --requeue SHARD copies
the members of those samples into a shard of their own, where their archive allows it, to be mended there.
"""
EXAMPLES = """\
examples:
  keye-data ledger runs/2_multitask
  keye-data ledger runs/2_multitask --json
  keye-data ledger runs/2_multitask --quarantine bad.jsonl --requeue bad.tar
"""
MAX_PROBLEMS = 20


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command ``ledger``."""
    parser = subparsers.add_parser(
        "ledger",
        description=DESCRIPTION,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("folder", metavar="RUN", type=Path, help="folder of a run of keye-train")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--quarantine", type=Path, metavar="FILE", help="write the samples that could not be read")
    parser.add_argument("--requeue", type=Path, metavar="SHARD", help="copy those samples into this new .tar")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Audit and tell; the exit status."""
    audit = audit_run(arguments.folder)
    print(json.dumps(audit.to_json(), indent=2) if arguments.json else text_table(audit))
    if arguments.quarantine or arguments.requeue:
        entries = quarantined(audit)
        if arguments.quarantine:
            lines = (json.dumps(entry, ensure_ascii=False) + "\n" for entry in entries)
            runs.write_text_atomic(arguments.quarantine, "".join(lines))
        if arguments.requeue:
            write_shard(arguments.requeue, _copies(entries, audit.storage))
    return 1 if audit.problems else 0


def text_table(audit: Audit) -> str:
    """The audit for a terminal."""
    lines = [f"{audit.run}: {audit.steps} steps"]
    lines.append(
        f"{'source':<20}{'samples':>12}{'filtered':>10}{'planned':>12}{'trained':>12}{'skipped':>10}{'refused':>10}"
        f"{'changed':>10}"
        "  epochs"
    )
    for one in audit.sources:
        epochs = " ".join(f"{share:.1%}" for share in one.coverage[:6])
        skipped = sum(one.skipped.values())
        numbers = (
            f"{one.size:>12,}{one.filtered:>10,}{one.planned:>12,}{one.trained:>12,}{skipped:>10,}{one.refused:>10,}"
            f"{one.changed:>10,}"
        )
        lines.append(f"{one.name:<20}{numbers}  {epochs}")
    reasons = [(count, one.name, reason) for one in audit.sources for reason, count in one.skipped.items()]
    if reasons:
        lines += ["", "skipped, by reason"]
        lines += [f"{count:>8,}  {name}: {one_line(reason)}" for count, name, reason in sorted(reasons, reverse=True)]
    lines += ["", f"{len(audit.problems)} problems: neither trained nor skipped, skipped unplanned, or repeated"]
    lines += [f"  {one_line(problem)}" for problem in audit.problems[:MAX_PROBLEMS]]
    return "\n".join(lines)


def quarantined(audit: Audit) -> list[dict[str, Any]]:
    """Samples that could not be read, each once."""
    checksums: dict[str, str] = {}
    entries = {}
    for line in audit.skipped:
        if line["reason"].startswith(SOUND):
            continue
        shard = line["shard"]
        checksums[shard] = checksums.get(shard) or read_metadata(shard, audit.storage)["shard_sha256"]
        entry = {key: line[key] for key in ("source", "shard", "key", "row", "reason")}
        entries[shard, line["row"]] = entry | {"sha256": checksums[shard]}
    return list(entries.values())


def _copies(entries: list[dict[str, Any]], storage: StorageSettings) -> Iterator[tuple[str, dict[str, bytes]]]:
    reader = ShardReader(storage)
    for entry in entries:
        try:
            _, members = reader.read(entry["shard"], entry["row"])
        except (SampleError, tarfile.TarError):
            continue  # damaged as an archive: there is nothing to copy
        yield f"{entry['sha256'][:12]}-{entry['row']:09d}", members
    reader.close()
