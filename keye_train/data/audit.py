"""What became of every planned sample of a run, recomputed from its recipe, its indexes and what it wrote down.

Per step a run writes how many samples it trained on and their digest (``trained.jsonl``), and a line for each sample it
skipped (``ledger.jsonl``). Which samples those were follows from the plan: planned less skipped must be as many as the
step says, with the same digest. So an audit needs no line for each sample.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from keye_train import compose, runs
from keye_train.data.cost import training_cost
from keye_train.data.digest import digest_samples
from keye_train.data.index import read_columns
from keye_train.data.ledger import read_ledger
from keye_train.data.plan import GlobalBatch, Plan
from keye_train.sample import Fit
from keye_train.settings import StorageSettings, TrainSettings

Row = tuple[int, int]
"""(number of the source, row of the source)."""


@dataclass
class SourceAccount:
    """One source over the whole run."""

    name: str
    size: int  # samples
    drawn: int  # places of its order passed, up to the end of the last window that the run began
    times: np.ndarray  # [size] uint16: how often each row was planned
    filtered: int = 0  # of those places, kept out by its filter, up to the last step
    trained: int = 0
    changed: int = 0  # of those trained or refused, made to fit by data.overlong
    refused: int = 0  # read, but the update of the step was refused as not finite
    skipped: Counter[str] = field(default_factory=Counter)  # kind of reason -> samples

    @property
    def planned(self) -> int:
        """Samples of the steps done."""
        return int(self.times.sum(dtype=np.int64))

    @property
    def coverage(self) -> list[float]:
        """Share of the rows planned at least once, twice, ...: one number for each epoch begun.

        Of all rows, so a filter keeps it below 1.
        """
        return [float((self.times > epoch).mean()) for epoch in range(int(self.times.max(initial=0)))]

    @property
    def repeated(self) -> int:
        """Rows planned more often than the epochs of the source allow: 0 unless the plan is wrong."""
        return int((self.times > -(-self.drawn // max(self.size, 1))).sum())


@dataclass
class Audit:
    """A run under examination."""

    run: str
    steps: int
    sources: list[SourceAccount]
    storage: StorageSettings  # how its shards are reached
    problems: list[str] = field(default_factory=list)  # what is neither trained nor skipped, or both
    skipped: list[dict[str, Any]] = field(default_factory=list)  # rows of the ledger, with "row" of the shard

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return {
            "run": self.run,
            "steps": self.steps,
            "problems": self.problems,
            "sources": {
                one.name: {
                    "size": one.size,
                    "filtered": one.filtered,
                    "planned": one.planned,
                    "trained": one.trained,
                    "refused": one.refused,
                    "changed": one.changed,
                    "skipped": dict(one.skipped),
                    "coverage": one.coverage,
                    "repeated": one.repeated,
                }
                for one in self.sources
            },
        }


def run_plan(run_dir: str | Path) -> tuple[TrainSettings, Plan]:
    """Settings of a run, and its plan made once more.

    Raises:
        ValueError: it is no run, keeps no account, or its data are not those that it was trained on.
    """
    folder = Path(run_dir)
    if not (folder / runs.RECIPE).exists() or not (folder / runs.TRAINED).exists():
        raise ValueError(
            f"{folder} has no {runs.RECIPE} or no {runs.TRAINED}: name the folder of one run of keye-train"
        )
    settings = compose.stored_settings(TrainSettings, folder / runs.RECIPE)
    plan = Plan.from_settings(settings, training_cost(settings))
    if runs.read_json(folder / runs.MANIFEST).get("data_fingerprint") != plan.fingerprint:
        raise ValueError(
            f"{folder} was planned on other data, or by another version of this program: restore the shards and "
            "indexes that its recipe names"
        )
    return settings, plan


def audit_run(run_dir: str | Path) -> Audit:
    """Examine a run, finished or not.

    Raises:
        ValueError: see ``run_plan``.
    """
    settings, plan = run_plan(run_dir)
    folder = Path(run_dir)
    return _examine(folder, plan, runs.read_json(folder / runs.MANIFEST), settings.data.storage)


def _examine(folder: Path, plan: Plan, manifest: Mapping[str, Any], storage: StorageSettings) -> Audit:
    written = {row["step"]: row for row in runs.read_jsonl(folder / runs.TRAINED)}
    steps = max([*written, -1]) + 1
    audit = Audit(str(folder), steps, [], storage)
    finished = manifest.get("steps", 0)
    if finished > steps:
        audit.problems.append(f"steps {steps} to {finished - 1} were done, and {runs.TRAINED} does not have them")
    ledger: dict[int, list[dict[str, Any]]] = defaultdict(list)
    for row in read_ledger(folder):
        ledger[row["step"]].append(row)
    rows_of = _RowFinder(plan, [row for step, rows in ledger.items() if step < steps for row in rows])
    sources = [plan.source(number) for number in range(len(plan.sources))]
    audit.sources = [SourceAccount(one.name, len(one), 0, np.zeros(len(one), np.uint16)) for one in sources]
    if not steps:
        return audit
    for batch, after in plan.batches():
        if batch.step < steps:
            _examine_step(audit, plan, batch, ledger.get(batch.step, []), rows_of, written.get(batch.step))
        if batch.step >= steps - 1 and after.batch == 0:  # its draws are known at the end of a window
            for account, drawn in zip(audit.sources, after.drawn, strict=True):
                account.drawn = drawn
            break
    for account in audit.sources:
        if account.repeated:
            audit.problems.append(f"{account.repeated} samples of {account.name} came more often than its epochs")
    return audit


def _examine_step(
    audit: Audit,
    plan: Plan,
    batch: GlobalBatch,
    skipped: list[dict[str, Any]],
    rows_of: _RowFinder,
    written: Mapping[str, Any] | None,
) -> None:
    left: Counter[Row] = Counter((one.source, one.row) for pack in batch.packs for one in pack.samples)
    dropped: Counter[Row] = Counter((one.source, one.row) for one in batch.dropped)
    for source, row in (*left.elements(), *dropped.elements()):
        audit.sources[source].times[row] += 1
    for account, filtered in zip(audit.sources, batch.filtered, strict=True):
        account.filtered += filtered
    for line in skipped:
        found = next((row for row in rows_of(line) if dropped[row] or left[row]), None)
        if found is None:
            audit.problems.append(f"step {batch.step}: {line['key']} of {line['shard']} was skipped, but never planned")
            continue
        (dropped if dropped[found] else left)[found] -= 1
        audit.sources[found[0]].skipped[kind_of_reason(line["reason"])] += 1
        shard_row = plan.source(found[0]).locate(found[1])[1]
        audit.skipped.append({**line, "row": shard_row})
    for source, row in dropped.elements():
        ref = plan.source(source).ref(row)
        audit.problems.append(f"step {batch.step}: {ref.key} of {ref.shard} is neither trained nor skipped")
    samples = left.total()
    digest = digest_samples((plan.sources[source], row) for source, row in left.elements())
    if written is None:
        audit.problems.append(f"step {batch.step}: its {samples} samples are neither trained nor skipped")
        return
    changed = _count_changed(audit, plan, [*left.elements()])
    if changed != written.get("changed", changed):
        audit.problems.append(
            f"step {batch.step}: {written['changed']} samples were made to fit, the plan says {changed} (data.overlong)"
        )
    if (samples, digest) != (written["samples"], written["digest"]):
        audit.problems.append(
            f"step {batch.step}: trained on {written['samples']} samples, {samples} were planned and not skipped"
            + ("" if samples != written["samples"] else ", and they are not the same ones")
        )
    for source, _ in left.elements():
        if written["applied"]:
            audit.sources[source].trained += 1
        else:
            audit.sources[source].refused += 1


def _count_changed(audit: Audit, plan: Plan, read: list[Row]) -> int:
    """Count the samples of a step that ``data.overlong`` made fit, also in the accounts of their sources."""
    total = 0
    for number, account in enumerate(audit.sources):
        if plan.source(number).fitting is not None:
            fits = plan.source(number).fits(np.array([row for source, row in read if source == number], dtype=np.int64))
            own = sum(fit != Fit() for fit in fits)
            account.changed += own
            total += own
    return total


class _RowFinder:
    """From a line of the ledger to rows of the source: keys are read from the index once for each shard."""

    def __init__(self, plan: Plan, lines: list[dict[str, Any]]) -> None:
        self._rows: dict[tuple[str, str, str], list[Row]] = defaultdict(list)
        wanted: dict[tuple[str, str], set[str]] = defaultdict(set)
        for line in lines:
            wanted[line["source"], line["shard"]].add(line["key"])
        for number, name in enumerate(plan.sources):
            source = plan.source(number)
            for shard, first in zip(source.shards, source.first_rows.tolist(), strict=False):
                keys = wanted.get((name, shard))
                if not keys:
                    continue
                for row, key in enumerate(read_columns(shard, ["key"], source.storage)["key"].to_pylist()):
                    if key in keys:
                        self._rows[name, shard, key].append((number, first + row))

    def __call__(self, line: Mapping[str, Any]) -> list[Row]:
        return self._rows.get((line["source"], line["shard"], line["key"]), [])


def kind_of_reason(reason: str) -> str:
    """A reason without its numbers, so that alike ones can be counted together; digits of a word (mp4) stay."""
    return re.sub(r"(?<!\w)\d+(\.\d+)?(?!\w)", "N", reason)
