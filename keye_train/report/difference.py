"""Two runs beside each other: what their recipes, data, code and results have in common, and what not."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from keye_train import runs
from keye_train.data.ledger import read_ledger

SECTIONS = ("recipe", "data", "code", "results", "speed")
WITHOUT_MEANING = ("run_dir",)
"""Keys of a recipe that say where a run lies, not what it is."""

TAIL = 0.05  # share of the last steps whose mean loss stands for a run
ABSENT = "–"


@dataclass(frozen=True)
class Difference:
    """One value that differs; None where a run has none."""

    key: str
    a: Any
    b: Any


@dataclass(frozen=True)
class Comparison:
    """What differs between two runs, by section.

    Speed is told and not judged: two launches of one run never take the same time.
    """

    a: str
    b: str
    differences: Mapping[str, list[Difference]]
    notes: list[str] = field(default_factory=list)

    @property
    def same(self) -> bool:
        """Whether nothing but the speed differs."""
        return not any(self.differences[section] for section in SECTIONS if section != "speed")

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        sections = {name: [asdict(one) for one in found] for name, found in self.differences.items()}
        return {"a": self.a, "b": self.b, "same": self.same, "differences": sections, "notes": self.notes}


def compare_runs(a: Path, b: Path) -> Comparison:
    """Compare two run folders, finished or not.

    Raises:
        FileNotFoundError: one of them is no run folder.
        ValueError: a file of theirs is damaged.
    """
    first, second = _Run.read(a), _Run.read(b)
    differences = {
        "recipe": _differing(first.recipe(), second.recipe()),
        "data": _differing(first.data(), second.data()),
        "code": _differing(first.code(), second.code()),
        "results": _differing(first.results(), second.results()),
        "speed": _differing(first.speed(), second.speed()),
    }
    return Comparison(str(a), str(b), differences, _where_they_part(first, second))


def print_comparison(comparison: Comparison, console: Console) -> None:
    """A table for each section that has differences, and the notes."""
    for section, found in comparison.differences.items():
        if not found:
            console.print(f"{section}: the same")
            continue
        table = Table(title=section, title_justify="left", title_style="bold")
        for head in ("key", comparison.a, comparison.b):
            table.add_column(head, overflow="fold")
        for one in found:
            table.add_row(one.key, _shown(one.a), _shown(one.b))
        console.print(table)
    for note in comparison.notes:
        console.print(note)


@dataclass(frozen=True)
class _Run:
    folder: Path
    manifest: Mapping[str, Any]
    rows: list[dict[str, Any]]  # metrics.jsonl
    trained: list[dict[str, Any]]  # trained.jsonl
    left_out: Counter[str]  # reason -> samples

    @classmethod
    def read(cls, folder: Path) -> _Run:
        if not (folder / runs.MANIFEST).exists():
            raise FileNotFoundError(f"{folder} holds no {runs.MANIFEST}: name the folder of a run")
        return cls(
            folder,
            runs.read_json(folder / runs.MANIFEST),
            runs.read_jsonl(folder / runs.METRICS),
            runs.read_jsonl(folder / runs.TRAINED),
            Counter(f"{row['source']}: {row['reason']}" for row in read_ledger(folder)),
        )

    def recipe(self) -> dict[str, Any]:
        flat = runs.flatten(self.manifest.get("recipe", {}))
        return {key: value for key, value in flat.items() if key not in WITHOUT_MEANING}

    def data(self) -> dict[str, Any]:
        found = {"fingerprint of the plan": self.manifest.get("data_fingerprint")}
        found |= runs.flatten(self.manifest.get("data", {}), "source")
        for name in ("samples", "tokens", "patches", "skipped"):
            found[f"{name} of the logged steps"] = sum(row.get(name) or 0 for row in self.rows)
        return found | {f"left out, {reason}": count for reason, count in self.left_out.items()}

    def code(self) -> dict[str, Any]:
        found = {"commit": self.manifest.get("commit"), "ranks": self.manifest.get("world_size")}
        parent = self.manifest.get("parent") or {}
        found["fingerprint of the parent"] = parent.get("fingerprint")
        return found | runs.flatten(self.manifest.get("versions", {}), "version")

    def results(self) -> dict[str, Any]:
        found: dict[str, Any] = {"status": self.manifest.get("status"), "steps": len(self.trained)}
        for name in ("updates", "updates_refused", "export_fingerprint"):
            found[name] = self.manifest.get(name)
        losses = [row["loss"] for row in self.rows if row.get("loss") is not None]
        tail = losses[-max(1, round(TAIL * len(losses))) :]
        found["loss, mean of the last 5 %"] = sum(tail) / len(tail) if tail else None
        measured = [row for row in self.rows if row.get("heldout_loss")]
        return found | (runs.flatten(measured[-1]["heldout_loss"], "held-out loss") if measured else {})

    def speed(self) -> dict[str, Any]:
        found: dict[str, Any] = {"hours of training": self.manifest.get("wall_s", 0) / 3600}
        for name in ("tokens_per_s", "mfu", "data_wait_share", "balance", "fill"):
            values = [row[name] for row in self.rows if row.get(name) is not None]
            found[f"{name}, mean"] = sum(values) / len(values) if values else None
        return found


def _where_they_part(a: _Run, b: _Run) -> list[str]:
    """Up to which step two runs trained on the same samples, and had the same loss."""
    notes = []
    samples = [{row["step"] + 1: (row["samples"], row["digest"]) for row in run.trained} for run in (a, b)]
    losses = [{row["step"]: row["loss"] for row in run.rows} for run in (a, b)]
    for what, (first, second) in (("samples", samples), ("loss", losses)):
        common = sorted(first.keys() & second.keys())
        apart = next((step for step in common if first[step] != second[step]), None)
        if not common:
            notes.append(f"{what}: no step that both have")
        elif apart is None:
            notes.append(f"{what}: the same in all {len(common)} steps that both have")
        else:
            values = f", {first[apart]} and {second[apart]}" if what == "loss" else ""
            notes.append(f"{what}: the first difference is in step {apart}{values}")
    return notes


def _differing(a: Mapping[str, Any], b: Mapping[str, Any]) -> list[Difference]:
    keys = dict.fromkeys([*a, *b])
    return [Difference(key, a.get(key), b.get(key)) for key in keys if a.get(key) != b.get(key)]


def _shown(value: Any) -> str:
    if value is None:
        return ABSENT
    if isinstance(value, float):
        return f"{value:.6g}"
    return str(value)
