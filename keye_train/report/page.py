"""The report: a run folder as one HTML file that needs nothing else."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from markupsafe import Markup

from keye_train import runs
from keye_train.report.charts import Estimate, Series, interval_chart, line_chart, percent, short, smooth
from keye_train.report.collect import RunRoot, StageRun, clock, read_root
from keye_train.report.forecasts import forecast_table
from keye_train.report.gallery import build_gallery, final_model
from keye_train.report.merge_page import PAGE, write_merge_page
from keye_train.report.rendering import write_page
from keye_train.report.soup import soup_verdicts
from keye_train.report.tables import (
    accuracy_table,
    answering,
    ledger_table,
    loss_table,
    merge_section,
    retrieval_table,
    stages_table,
    zeroshot_table,
)

logger = logging.getLogger(__name__)


def write_report(run_root: Path, out: Path) -> Path:
    """Write the page about a pipeline's folder or a single run; sections without data are left out.

    Where the folder holds a diagnosis, a curve or a soup, merge.html beside ``out`` shows them.

    Args:
        run_root: folder of a pipeline (stage runs, merge/, evaluation/results.json, pipeline.json) or of one run.
        out: the HTML file; it appears whole or not at all.

    Returns:
        ``out``.

    Raises:
        FileNotFoundError: the folder holds nothing to report.
    """
    root = read_root(Path(run_root))
    write_page(Path(out), "page.html", _context(root))
    if root.soup:
        write_merge_page(Path(out).with_name(PAGE), f"{root.name}: the merge", **root.soup, back=Path(out).name)
    logger.info("report: %s, %.1f MB", out, Path(out).stat().st_size / 1e6)
    return Path(out)


def _context(root: RunRoot) -> dict[str, Any]:
    retrieval, zeroshot = retrieval_table(root), zeroshot_table(root)
    gallery = build_gallery(root.models)
    accuracy = accuracy_table(root)
    context: dict[str, Any] = {
        "title": root.name,
        "about": _about(root),
        "tiles": _tiles(root),
        "accuracy": accuracy,
        "accuracy_chart": _accuracy_chart(root),
        "task_notes": [
            {"name": t["name"], "metric": t["metric"], "n": t["n"], "skipped": len(t.get("skipped", []))}
            for t in root.results.get("tasks", [])
        ],
        "losses": loss_table(root),
        "retrieval": {"table": retrieval[0], "n": retrieval[1]} if retrieval else None,
        "zeroshot": {"table": zeroshot[0], "about": zeroshot[1]} if zeroshot else None,
        "merge": merge_section(root),
        "merge_page": PAGE if root.soup else None,
        "soup_verdicts": soup_verdicts(root.soup["soup"]) if root.soup.get("soup") else [],
        "stages": stages_table(root) if root.stages else None,
        "forecasts": forecast_table(root),
        "curves": [_curves(run, opened=position < 2) for position, run in enumerate(root.stages)],
        "gallery": gallery,
        "final": final_model(root.models),
        "ledger": ledger_table(root),
        "versions": root.versions,
        "recipes": [
            {"name": f"{run.name}/{runs.RECIPE}", "text": (run.folder / runs.RECIPE).read_text(encoding="utf-8")}
            for run in root.stages
            if (run.folder / runs.RECIPE).exists()
        ],
        "folder": str(root.folder),
    }
    labels = {
        "accuracy": ("results", "Results"),
        "retrieval": ("retrieval", "Retrieval"),
        "zeroshot": ("zeroshot", "Zero-shot"),
        "merge": ("merge", "Merge"),
        "stages": ("stages", "What ran"),
        "curves": ("curves", "Curves"),
        "gallery": ("gallery", "Samples"),
        "ledger": ("ledger", "Ledger"),
    }
    contents = [label for name, label in labels.items() if context[name]]
    return context | {"contents": [*contents, ("settings", "Settings")]}


def _about(root: RunRoot) -> str:
    parts = [_counted(len(root.stages), "training run")] if root.stages else []
    if root.models:
        parts.append(f"{_counted(len(root.models), 'model')} evaluated")
    if root.commit:
        parts.append(f"commit {root.commit[:12]}{' with changes' if root.commit.endswith('+changes') else ''}")
    started = min((str(run.manifest["started"]) for run in root.stages if "started" in run.manifest), default="")
    return ", ".join(parts + ([f"started {started}"] if started else []))


def _counted(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def _tiles(root: RunRoot) -> list[dict[str, str]]:
    tiles = []
    if root.stages:
        tokens, seconds = (sum(run.total(name) for run in root.stages) for name in ("tokens", "step_s"))
        tiles += [
            _tile("training time", clock(seconds), _counted(len(root.stages), "run")),
            _tile("steps", f"{sum(run.steps[-1] for run in root.stages if run.rows):,.0f}"),
            _tile("tokens", short(tokens), f"{short(tokens / seconds)} a second" if seconds else ""),
            _tile("samples", short(sum(run.total("samples") for run in root.stages))),
            _tile("left out", f"{sum(len(run.ledger) for run in root.stages):,}", "samples in the ledgers"),
        ]
    models = answering(root)
    if models:
        best = max(models, key=lambda model: model["mean_score"])
        tiles.append(_tile("best mean score", f"{100 * best['mean_score']:.1f} %", str(best["name"])))
    return tiles


def _tile(label: str, value: str, note: str = "") -> dict[str, str]:
    return {"label": label, "value": value, "note": note}


def _accuracy_chart(root: RunRoot) -> Markup:
    models, tasks = answering(root), root.results.get("tasks", [])
    if not models:
        return Markup("")
    rows = [Estimate(m["name"], m["mean_score"], m["mean_low"], m["mean_high"]) for m in models]
    chance = sum(task["chance"] for task in tasks) / len(tasks)
    return interval_chart(rows, "Mean score over all tasks (dashed: chance)", chance)


def _curves(run: StageRun, opened: bool) -> dict[str, Any]:
    parent = f"from {run.parent}" if run.parent else "from the start weights"
    parts = [str(run.manifest.get("stage", "")), parent, f"{len(run.rows)} logged steps", clock(run.wall_s)]
    refused = sum(row.get("applied") is False for row in run.rows)
    parts += [f"{_counted(refused, 'update')} refused"] if refused else []
    rolled_back = len(runs.read_json(run.folder / runs.LEFT_OUT)) if (run.folder / runs.LEFT_OUT).exists() else 0
    parts += [f"{_counted(rolled_back, 'loss spike')} rolled back"] if rolled_back else []
    return {
        "name": run.name,
        "about": ", ".join(part for part in parts if part),
        "open": opened,
        "charts": [chart for chart in _charts(run) if chart],
    }


def _charts(run: StageRun) -> list[Markup]:
    if not run.rows:
        return []
    return [
        line_chart(_raw_and_smooth(run, run.column("loss")), "Training loss"),
        line_chart(_family(run, "heldout_loss", smoothed=False), "Held-out loss by set"),
        line_chart(_family(run, "loss_by_source", smoothed=True), "Training loss by source, smoothed"),
        line_chart(_family(run, "loss_by_task", smoothed=True), "Training loss by task, smoothed"),
        line_chart(_family(run, "lr", smoothed=False), "Learning rate by module", from_zero=True),
        line_chart(_raw_and_smooth(run, run.column("grad_norm")), "Gradient norm before clipping", from_zero=True),
        line_chart(_family(run, "grad_norms", smoothed=True), "Gradient norm by module, smoothed", from_zero=True),
        line_chart(_raw_and_smooth(run, run.column("tokens_per_s")), "Tokens a second, all ranks", from_zero=True),
        line_chart(_raw_and_smooth(run, run.column("mfu")), "Model FLOPs utilisation (MFU)", percent, from_zero=True),
        line_chart(_fills(run), "Fill of the two budgets of a pack, smoothed", percent, (0.0, 1.0)),
        line_chart(_raw_and_smooth(run, run.column("balance")), "Balance: mean rank over slowest", percent, (0.0, 1.0)),
        line_chart(_raw_and_smooth(run, _waits(run)), "Share of the step waiting for data", percent, from_zero=True),
        line_chart(_stragglers(run), "Slowest rank behind the median, seconds a step", from_zero=True),
        line_chart(_memory(run), "Memory of the rank that has most", _bytes, from_zero=True),
        line_chart(_raw_and_smooth(run, run.column("retrieval_accuracy")), "Retrieval within the batch", percent),
    ]


def _raw_and_smooth(run: StageRun, values: list[float | None]) -> list[Series]:
    return [Series("each step", run.steps, values, faint=True), Series("smoothed", run.steps, smooth(values))]


def _waits(run: StageRun) -> list[float | None]:
    """Share of each step in which the slowest rank waited for data; reckoned where an older run has no such column."""
    pairs = zip(run.column("data_wait_s"), run.column("step_s"), strict=True)
    return [wait / step if wait is not None and step else None for wait, step in pairs]


def _stragglers(run: StageRun) -> list[Series]:
    """By phase, what the slowest rank takes longer than the median of the ranks; runs of several ranks have it."""
    lines = []
    for colour, phase in enumerate(run.names_below("slowest_ranks")):
        pairs = zip(
            run.column("slowest_ranks", phase, "s"), run.column("slowest_ranks", phase, "median_s"), strict=True
        )
        behind = [worst - middle if worst is not None and middle is not None else None for worst, middle in pairs]
        lines.append(Series(phase.replace("_", " "), run.steps, behind, colour))
    return lines


def _memory(run: StageRun) -> list[Series]:
    columns = (("device, peak", "device_memory_bytes"), ("host", "host_memory_bytes"))
    lines = [(label, run.column(name)) for label, name in columns]
    return [Series(label, run.steps, ys, number) for number, (label, ys) in enumerate(lines) if any(ys)]


def _bytes(value: float) -> str:
    return f"{short(value)}B"


def _fills(run: StageRun) -> list[Series]:
    return [
        Series("language tokens", run.steps, smooth(run.column("fill")), colour=0),
        Series("vision patches", run.steps, smooth(run.column("patch_fill")), colour=1),
    ]


def _family(run: StageRun, key: str, smoothed: bool) -> Sequence[Series]:
    lines = []
    for colour, name in enumerate(run.names_below(key)):
        values = run.column(key, name)
        lines.append(Series(name, run.steps, smooth(values) if smoothed else values, colour))
    return lines
