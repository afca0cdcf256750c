"""Scores put together: of a task, of a model, and the table that ``keye-eval`` prints."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich import box
from rich.table import Table

from keye_train.evaluation.scoring import Target, chance_level, interval, mean_interval


def task_result(targets: Sequence[Target], scores: Sequence[float], loss: tuple[float, int]) -> dict[str, Any]:
    """Result of one model on one task.

    Args:
        targets: what was expected.
        scores: of each answer, in [0, 1].
        loss: sum over the answers' tokens and their number.
    """
    low, high = interval(scores)
    metrics = list(dict.fromkeys(target.metric.value for target in targets))
    return {
        "score": sum(scores) / len(scores),
        "low": low,
        "high": high,
        "n": len(scores),
        "loss": loss[0] / max(1, loss[1]),
        "loss_tokens": loss[1],
        "metric": " / ".join(metrics),
        "chance": chance_level(targets),
    }


def summarise(models: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Add each model's means over its tasks, in place; returns what the tasks are, for the head of the table."""
    for model in models:
        tasks = model["tasks"]
        if not tasks:
            continue
        by_task: dict[str, list[float]] = {task: [] for task in tasks}
        for sample in model["samples"]:
            by_task[sample["task"]].append(sample["score"])
        low, high = mean_interval(list(by_task.values()))
        model["mean_score"] = sum(result["score"] for result in tasks.values()) / len(tasks)
        model["mean_low"], model["mean_high"] = low, high
        model["mean_loss"] = sum(result["loss"] for result in tasks.values()) / len(tasks)
    answered: Mapping[str, Any] = next((model["tasks"] for model in models if model["tasks"]), {})
    return [
        {"name": name, **{key: result[key] for key in ("metric", "n", "chance", "skipped")}}
        for name, result in answered.items()
    ]


def results_table(results: Mapping[str, Any]) -> Table:
    """Models as rows: the mean score with its 95 % interval, the tasks, the held-out loss, then what Stage 0 has. The
    level of chance stands below; the best of each column is bold."""
    table = Table(title="Held-out results (%)", box=box.SIMPLE_HEAD, padding=(0, 0, 0, 1))
    table.add_column("model", no_wrap=True)
    tasks = results["tasks"]
    towers = tower_columns(results["models"])
    answering = [model for model in results["models"] if model["tasks"]]
    heads = ["mean", "95 %", *(task["name"] for task in tasks), "loss"] if tasks else []
    for head in (*heads, *towers):
        table.add_column(head, justify="right", overflow="fold", min_width=5, no_wrap=head == "95 %")
    for model in results["models"]:
        cells = ["–"] * len(heads)
        if model["tasks"]:
            cells = [_cell(model["mean_score"], [m["mean_score"] for m in answering])]
            cells.append(f"{100 * model['mean_low']:.1f}–{100 * model['mean_high']:.1f}")
            for task in tasks:
                column = [m["tasks"][task["name"]]["score"] for m in answering]
                cells.append(_cell(model["tasks"][task["name"]]["score"], column))
            loss, losses = model["mean_loss"], [m["mean_loss"] for m in answering]
            best = len(losses) > 1 and loss == min(losses) < max(losses)
            cells.append(f"[bold]{loss:.4f}[/bold]" if best else f"{loss:.4f}")
        own = tower_columns([model])
        cells += [f"{100 * own[head]['score']:.1f}" if head in own else "–" for head in towers]
        table.add_row(model["name"], *cells)
    if tasks or towers:
        table.add_section()
        chances = [task["chance"] for task in tasks]
        cells = [f"{100 * level:.1f}" for level in chances]
        if tasks:
            cells = [f"{100 * sum(chances) / len(chances):.1f}", "", *cells, ""]
        cells += [f"{100 * column['chance']:.1f}" for column in towers.values()]
        table.add_row("chance", *cells, style="dim")
    return table


def tower_columns(models: Sequence[Mapping[str, Any]]) -> dict[str, Mapping[str, float]]:
    """Head of a column -> result (score, chance) of the first of these models that has it: recalls, then zero-shot."""
    columns: dict[str, Mapping[str, float]] = {}
    for model in models:
        for head, way in (("R@1 i>t", "image_to_text"), ("R@1 t>i", "text_to_image")):
            if model["retrieval"]:
                columns.setdefault(head, model["retrieval"][way]["r1"])
    for model in models:
        for name, result in (model["zeroshot"] or {}).items():
            columns.setdefault(f"0-shot {name}", result)
    return columns


def _cell(value: float, column: Sequence[float]) -> str:
    text = f"{100 * value:.1f}"
    return f"[bold]{text}[/bold]" if len(column) > 1 and value == max(column) > min(column) else text
