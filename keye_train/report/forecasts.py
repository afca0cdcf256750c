"""Forecast against actual: what ``keye-train plan`` would have said of each run, beside what its steps show."""

from __future__ import annotations

import logging
from collections.abc import Callable

from keye_train import compose, runs
from keye_train.forecast import Forecast, forecast
from keye_train.report.charts import short
from keye_train.report.collect import RunRoot, StageRun
from keye_train.report.tables import EMPTY, Cell, Table, TableRow
from keye_train.settings import ClusterSettings, ForecastSettings

logger = logging.getLogger(__name__)

Figure = tuple[str, Callable[[Forecast], float], Callable[[StageRun], float | None]]


def _mean(run: StageRun, name: str) -> float | None:
    values = [value for value in run.column(name) if value is not None]
    return sum(values) / len(values) if values else None


def _flops(run: StageRun) -> float | None:
    per_s, seconds = run.column("flops_per_s"), run.column("step_s")
    steps = [a * b for a, b in zip(per_s, seconds, strict=True) if a is not None and b is not None]
    return sum(steps) / len(steps) if steps else None


def _checkpoint_bytes(run: StageRun) -> float | None:
    """Tensors of the newest checkpoint."""
    folders = sorted((run.folder / runs.CHECKPOINTS).glob("step-*"), key=lambda path: path.stat().st_mtime)
    sizes = [file.stat().st_size for file in folders[-1].glob("*.safetensors")] if folders else []
    return float(sum(sizes)) if sizes else None


def _device_bytes(run: StageRun) -> float | None:
    """Largest over the run; a CPU's tensors cannot be told from the rest of its process."""
    values = [value for value in run.column("device_memory_bytes") if value]
    return max(values) if values else None


FIGURES: tuple[Figure, ...] = (
    ("samples a step", lambda f: f.step.samples, lambda run: _mean(run, "samples")),
    ("tokens a step", lambda f: f.step.tokens, lambda run: _mean(run, "tokens")),
    ("patches a step", lambda f: f.step.patches, lambda run: _mean(run, "patches")),
    ("FLOPs a step", lambda f: f.step.flops, _flops),
    ("checkpoint, bytes", lambda f: f.checkpoint_bytes, _checkpoint_bytes),
    ("device memory, bytes", lambda f: f.device.total, _device_bytes),
)


def forecast_table(root: RunRoot) -> Table | None:
    """One row a run, one column a figure: what was, and below it what was forecast.

    Runs whose recipe this version does not read any more, or whose data are gone, are left out with a line in the log.
    """
    rows = []
    for run in root.stages:
        if not run.rows:
            continue
        try:
            found = _forecast(run)
        except (ValueError, FileNotFoundError) as error:
            logger.info("%s: no forecast: %s", run.name, error)
            continue
        rows.append(TableRow(run.name, [_cell(expected(found), actual(run)) for _, expected, actual in FIGURES]))
    return Table(["run", *(name for name, _, _ in FIGURES)], rows) if rows else None


def _forecast(run: StageRun) -> Forecast:
    values = {**run.recipe, "cluster": {"ranks_per_node": int(run.manifest.get("world_size", 1))}}
    settings = compose.to_settings(ForecastSettings, values)
    assert isinstance(settings.cluster, ClusterSettings)
    return forecast(settings)


def _cell(expected: float, actual: float | None) -> Cell:
    if actual is None:
        return EMPTY
    apart = f" ({expected / actual - 1:+.1%})" if actual else ""
    return Cell(short(actual), f"forecast {short(expected)}{apart}")
