"""Tables of the report as values: rows of cells, the best of each column marked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from keye_train.report.charts import short
from keye_train.report.collect import MERGE, RunRoot, StageRun, clock

Model = Mapping[str, Any]


@dataclass(frozen=True)
class Cell:
    """One cell."""

    text: str
    note: str = ""  # small, below
    best: bool = False
    heat: float | None = None  # 0 (plain) to 1 (full tint)


@dataclass(frozen=True)
class TableRow:
    """One row; ``kind`` is its CSS class."""

    name: str
    cells: Sequence[Cell]
    kind: str = ""


@dataclass(frozen=True)
class Table:
    """A table whose first column names the rows."""

    heads: Sequence[str]
    rows: Sequence[TableRow]


NO_BREAK = "\u00a0"
EMPTY = Cell("–")


def answering(root: RunRoot) -> list[Model]:
    """Models that were scored on tasks."""
    return [model for model in root.models if model.get("tasks")]


def task_names(root: RunRoot) -> list[str]:
    """Tasks in the order of the evaluation."""
    return [task["name"] for task in root.results.get("tasks", [])]


def accuracy_table(root: RunRoot) -> Table | None:
    """Rows: models and chance; columns: the mean over the tasks, then each task."""
    models, tasks = answering(root), root.results.get("tasks", [])
    if not models:
        return None
    chances = {task["name"]: task["chance"] for task in tasks}
    mean_chance = sum(chances.values()) / len(chances)
    rows = []
    for model in models:
        scores = [_score_cell(model["mean_score"], model["mean_low"], model["mean_high"], mean_chance)]
        for name, chance in chances.items():
            cell = model["tasks"].get(name)
            scores.append(_score_cell(cell["score"], cell["low"], cell["high"], chance) if cell else EMPTY)
        rows.append(TableRow(model["name"], scores, MERGE if model["name"] == MERGE else ""))
    values = [[m["mean_score"], *(m["tasks"].get(name, {}).get("score") for name in chances)] for m in models]
    rows = _mark_best(rows, values, highest=True)
    chance_cells = [Cell(_percent(value)) for value in (mean_chance, *chances.values())]
    return Table(["model", "mean", *chances], [*rows, TableRow("chance", chance_cells, "chance")])


def loss_table(root: RunRoot) -> Table | None:
    """Rows: models; columns: mean held-out loss, then each task's."""
    models, names = answering(root), task_names(root)
    if not models:
        return None
    values = [[m["mean_loss"], *(m["tasks"].get(name, {}).get("loss") for name in names)] for m in models]
    rows = [
        TableRow(model["name"], [EMPTY if value is None else Cell(f"{value:.3f}") for value in line])
        for model, line in zip(models, values, strict=True)
    ]
    return Table(["model", "mean", *names], _mark_best(rows, values, highest=False))


def retrieval_table(root: RunRoot) -> tuple[Table, int] | None:
    """Recall of the models that match images with texts, and the number of candidates."""
    models = [model for model in root.models if model.get("retrieval")]
    if not models:
        return None
    columns = [(way, recall) for way in ("image_to_text", "text_to_image") for recall in ("r1", "r5")]
    heads = [f"{way.replace('_', ' ')} {recall.replace('r', 'R@')}" for way, recall in columns]
    rows = []
    for model in models:
        cells = [model["retrieval"][way][recall] for way, recall in columns]
        rows.append(TableRow(model["name"], [_score_cell(c["score"], c["low"], c["high"], c["chance"]) for c in cells]))
    first = models[0]["retrieval"]
    chance = [Cell(_percent(first[way][recall]["chance"])) for way, recall in columns]
    return Table(["model", *heads], [*rows, TableRow("chance", chance, "chance")]), int(first["n"])


def zeroshot_table(root: RunRoot) -> tuple[Table, str] | None:
    """Zero-shot accuracy of the models that match images with texts, and a line that says what each task is."""
    models = [model for model in root.models if model.get("zeroshot")]
    if not models:
        return None
    tasks = {name: result for model in models for name, result in model["zeroshot"].items()}
    rows = []
    for model in models:
        cells = [model["zeroshot"].get(name) for name in tasks]
        scored = [_score_cell(c["score"], c["low"], c["high"], c["chance"]) if c else EMPTY for c in cells]
        rows.append(TableRow(model["name"], scored))
    chance = TableRow("chance", [Cell(_percent(result["chance"])) for result in tasks.values()], "chance")
    about = "; ".join(f"{name}: {result['classes']} classes, {result['n']} images" for name, result in tasks.items())
    return Table(["model", *tasks], [*rows, chance]), about


def merge_section(root: RunRoot) -> dict[str, Any] | None:
    """Parents with their weights and scores, the merge, and whether it reaches the mean of its parts."""
    if not root.merge:
        return None
    scored = {model["name"]: model for model in answering(root)}
    parents = [(_run_name(parent["path"]), float(parent["weight"])) for parent in root.merge["parents"]]
    rows = [TableRow(name, [Cell(f"{weight:.3f}"), *_mean_cells(scored.get(name))]) for name, weight in parents]
    known = [scored[name] for name, _ in parents if name in scored]
    method = str(root.merge["method"]).capitalize()
    section: dict[str, Any] = {
        "about": (
            f"{method} average of {len(parents)} models, {root.merge['tensors']} tensors, "
            f"{short(root.merge['bytes'])}B in {', '.join(root.merge['dtype'])}."
        ),
        "verdict": "",
        "verdict_kind": "",
    }
    if len(known) == len(parents) and known:
        score, loss = (sum(model[key] for model in known) / len(known) for key in ("mean_score", "mean_loss"))
        rows.append(TableRow("mean of the parts", [EMPTY, Cell(_percent(score)), Cell(f"{loss:.4f}")], "chance"))
        if MERGE in scored:
            section |= _verdict(scored[MERGE], score, loss)
    rows.append(TableRow(MERGE, [EMPTY, *_mean_cells(scored.get(MERGE))], MERGE))
    return section | {"table": Table(["model", "weight", "mean score", "mean held-out loss"], rows)}


def stages_table(root: RunRoot) -> Table:
    """What ran: one row for each training run."""
    heads = [
        "run",
        "recipe",
        "from",
        "trains",
        "mixture",
        "steps",
        "samples",
        "tokens",
        "wall time",
        "final loss",
        "seed",
    ]
    heads += ["ranks", "commit", "status"]
    return Table(heads, [_stage_row(run) for run in root.stages])


def ledger_table(root: RunRoot) -> Table | None:
    """Samples trained on and left out, by run."""
    if not any(run.rows for run in root.stages):
        return None
    rows = []
    for run in root.stages:
        kinds = run.ledger_reasons()
        more = sum(count for _, count in kinds[4:])
        shown = [f"{count} x {reason}" for reason, count in kinds[:4]] + ([f"{more} x other reasons"] if more else [])
        reasons = "; ".join(shown) or "–"
        rows.append(
            TableRow(run.name, [Cell(f"{run.total('samples'):,.0f}"), Cell(f"{len(run.ledger):,}"), Cell(reasons)])
        )
    return Table(["run", "trained on", "left out", "reasons"], rows)


def _stage_row(run: StageRun) -> TableRow:
    losses = [value for value in run.column("loss") if value is not None]
    tail = losses[-max(1, len(losses) // 20) :]
    commit = str(run.manifest.get("commit", ""))
    cells = [
        str(run.manifest.get("stage", "")),
        run.parent or "start",
        run.trainable,
        run.mixture,
        f"{run.steps[-1]:,.0f}" if run.rows else "0",
        short(run.total("samples")),
        short(run.total("tokens")),
        clock(run.wall_s).replace(" ", NO_BREAK),
        f"{sum(tail) / len(tail):.3f}" if tail else "–",
        str(run.manifest.get("seed", "")),
        str(run.manifest.get("world_size", "")),
        commit[:8] + ("+" if commit.endswith("+changes") else ""),
        str(run.manifest.get("status", "")),
    ]
    return TableRow(run.name, [Cell(cell or "–") for cell in cells])


def _verdict(merged: Model, score: float, loss: float) -> dict[str, str]:
    better = merged["mean_score"] >= score
    points = 100 * (merged["mean_score"] - score)
    text = (
        f"The merge scores {_percent(merged['mean_score'])}, the mean of its parts {_percent(score)} "
        f"({points:+.1f} points); held-out loss {merged['mean_loss']:.4f} against {loss:.4f}."
    )
    return {"verdict": text, "verdict_kind": "right" if better else "wrong"}


def _mean_cells(model: Model | None) -> list[Cell]:
    if model is None:
        return [EMPTY, EMPTY]
    interval = f"{100 * model['mean_low']:.1f}–{100 * model['mean_high']:.1f}"
    return [Cell(_percent(model["mean_score"]), interval), Cell(f"{model['mean_loss']:.4f}")]


def _run_name(path: str) -> str:
    """Name of the run that an export belongs to."""
    folder = Path(path)
    return folder.parent.name if folder.name == "export" else folder.name


def _score_cell(score: float, low: float, high: float, chance: float) -> Cell:
    """The tint grows with the score above chance."""
    heat = max(0.0, score - chance) / max(1e-9, 1 - chance)
    return Cell(_percent(score), f"{100 * low:.0f}–{100 * high:.0f}", heat=round(heat, 3))


def _mark_best(rows: list[TableRow], values: list[list[float | None]], highest: bool) -> list[TableRow]:
    """Mark the best value of each column, ties included; a column of one value has no best."""
    marked = [list(row.cells) for row in rows]
    for column in range(len(values[0])):
        known = [value for line in values if (value := line[column]) is not None]
        if len(known) < 2 or min(known) == max(known):
            continue
        best = max(known) if highest else min(known)
        for line, cells in zip(values, marked, strict=True):
            if line[column] == best:
                cells[column] = replace(cells[column], best=True)
    return [replace(row, cells=cells) for row, cells in zip(rows, marked, strict=True)]


def _percent(value: float) -> str:
    return f"{100 * value:.1f} %"
