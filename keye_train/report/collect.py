"""What a run folder holds, read into values the page can show. Nothing here knows about HTML."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from keye_train import runs
from keye_train.data.ledger import read_ledger

RESULTS = Path("evaluation") / "results.json"
PIPELINE = "pipeline.json"
MERGE = "merge"
SOUP = "soup"
SOUP_PARTS = ("diagnosis", "curve", "soup")

Row = dict[str, Any]


@dataclass(frozen=True)
class StageRun:
    """One folder of training."""

    name: str
    folder: Path
    manifest: Mapping[str, Any]
    rows: Sequence[Row]  # metrics.jsonl
    ledger: Sequence[Row]  # of all ranks

    @property
    def recipe(self) -> Mapping[str, Any]:
        """The resolved settings."""
        return self.manifest.get("recipe", {})

    @property
    def parent(self) -> str:
        """Name of the run it started from; empty where it had none."""
        parent = self.manifest.get("parent")
        return Path(parent["path"]).name if parent else ""

    @property
    def trainable(self) -> str:
        """Modules that trained."""
        return ", ".join(self.recipe.get("stage", {}).get("trainable", []))

    @property
    def mixture(self) -> str:
        """Name of the data mixture."""
        return str(self.recipe.get("stage", {}).get("mixture", ""))

    @property
    def wall_s(self) -> float:
        """Seconds in logged steps; restarts and waiting between launches do not count."""
        return self.total("step_s")

    def total(self, name: str) -> float:
        """Sum of a figure over all steps."""
        return float(sum(value for value in self.column(name) if value is not None))

    def column(self, *path: str) -> list[float | None]:
        """A figure of each logged step; None where a step lacks it. ``path`` leads through nested values."""
        return [_at(row, path) for row in self.rows]

    def names_below(self, key: str) -> list[str]:
        """Keys of a nested figure, e.g. the sources of ``loss_by_source``, in order of appearance."""
        found: dict[str, None] = {}
        for row in self.rows:
            if isinstance(row.get(key), dict):
                found |= dict.fromkeys(row[key])
        return list(found)

    @property
    def steps(self) -> list[float]:
        """Step numbers of the logged rows."""
        return [float(row["step"]) for row in self.rows]

    def ledger_reasons(self) -> list[tuple[str, int]]:
        """Reasons why samples were not trained on, the most frequent first."""
        return Counter(str(row.get("reason", "unknown")) for row in self.ledger).most_common()


@dataclass(frozen=True)
class RunRoot:
    """Everything the report can show; parts that are absent are empty."""

    folder: Path
    name: str
    stages: Sequence[StageRun]
    pipeline: Mapping[str, Any] = field(default_factory=dict)  # pipeline.json
    results: Mapping[str, Any] = field(default_factory=dict)  # evaluation/results.json
    merge: Mapping[str, Any] = field(default_factory=dict)  # manifest of the merge
    soup: Mapping[str, Any] = field(default_factory=dict)  # soup/: diagnosis, curve and soup, each where it is there

    @property
    def models(self) -> list[Mapping[str, Any]]:
        """Evaluated models, in the order of the table."""
        return list(self.results.get("models", []))

    @property
    def commit(self) -> str:
        """Commit of the code of the newest part."""
        return str(self.pipeline.get("commit") or next((run.manifest.get("commit", "") for run in self.stages), ""))

    @property
    def versions(self) -> Mapping[str, str]:
        """Versions of the packages that decide numbers."""
        return self.pipeline.get("versions") or next((run.manifest.get("versions", {}) for run in self.stages), {})


def read_root(folder: Path) -> RunRoot:
    """Read the folder of a pipeline, or of a single run.

    Raises:
        FileNotFoundError: the folder holds neither runs nor results.
    """
    if (folder / runs.METRICS).exists() or (folder / runs.RECIPE).exists():
        found = [folder]
    elif folder.is_dir():
        found = [path for path in folder.iterdir() if (path / runs.RECIPE).exists()]
    else:
        raise FileNotFoundError(f"{folder} is no folder: name a pipeline's folder or a run's")
    pipeline = _json(folder / PIPELINE)
    order = [str(stage["name"]) for stage in pipeline.get("stages", [])]
    stages = [_read_stage(path) for path in found]
    root = RunRoot(
        folder=folder,
        name=str(pipeline.get("name") or folder.resolve().name),
        stages=sorted(stages, key=lambda run: _place(run, order)),
        pipeline=pipeline,
        results=_json(folder / RESULTS),
        merge=_json(folder / MERGE / runs.MANIFEST),
        soup={name: part for name in SOUP_PARTS if (part := _json(folder / SOUP / f"{name}.json"))},
    )
    if not root.stages and not root.results:
        raise FileNotFoundError(
            f"{folder} holds no run ({runs.RECIPE}) and no {RESULTS}: name a pipeline's folder or a run's"
        )
    return root


def _read_stage(folder: Path) -> StageRun:
    return StageRun(
        name=folder.resolve().name,
        folder=folder,
        manifest=_json(folder / runs.MANIFEST),
        rows=runs.read_jsonl(folder / runs.METRICS),
        ledger=read_ledger(folder),
    )


def _json(path: Path) -> dict[str, Any]:
    return runs.read_json(path) if path.exists() else {}


def _place(run: StageRun, order: list[str]) -> tuple[int, str, str]:
    """The pipeline's order where it is written down, else the order of starting."""
    known = order.index(run.name) if run.name in order else len(order)
    return known, str(run.manifest.get("started", "")), run.name


def _at(row: Row, path: Sequence[str]) -> float | None:
    value: Any = row
    for key in path:
        if not isinstance(value, dict):
            return None
        value = value.get(key)
    return float(value) if isinstance(value, int | float) else None


def clock(seconds: float) -> str:
    """A duration: 0.4 s, 45 s, 3 min 20 s, 2 h 05 min."""
    if seconds < 9.5:
        return f"{seconds:.2g} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    minutes, rest = divmod(whole, 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"
