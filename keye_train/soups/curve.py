"""``keye-merge curve``: held-out loss along the line between two models, (1 - t) A + t B, without a model on the disk.

A barrier is how far the curve rises above the straight line between its ends: Frankle et al. 2020, "Linear mode
connectivity and the lottery ticket hypothesis", section 2 (there with the mean of both ends). No barrier: the models
lie in one basin, as far as these samples can tell.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from keye_train.evaluation.candidates import Values
from keye_train.evaluation.heldout import read_tasks
from keye_train.runs import commit, versions, write_json_atomic
from keye_train.settings import CurveSettings, EvaluationSettings, SettingsError, SoupMetric
from keye_train.soups.bootstrap import interval, resample
from keye_train.soups.scoreboard import Scoreboard, opened_models

CURVE = "curve.json"


def draw_curve(settings: CurveSettings, progress: bool = True) -> Path:
    """Score every point and write ``OUT/curve.json``; points that are known are kept in ``OUT/cache``.

    Raises:
        SettingsError: impossible settings, or data that cannot be read.
        FileNotFoundError, ExportError: a model is absent or broken.
        MergeError: the models cannot be averaged.
    """
    settings.check()
    out = Path(settings.out)
    named = EvaluationSettings(models=settings.models, data=settings.data, out=settings.out).named_models()
    tasks = read_tasks(settings.data, settings.samples_per_task, settings.seed)
    if not tasks:
        raise SettingsError(f"data={settings.data.name} has no held-out tasks: set data.heldout")
    places = line_places(settings.points, settings.beyond)
    with opened_models(named, out) as models:
        board = Scoreboard(models, tasks, settings.data, settings, out, progress)
        values = [board.values((1 - t, t)) for t in places]
    write_json_atomic(
        out / CURVE,
        {
            "models": models.names,
            "fingerprints": models.fingerprints,
            "data": settings.data.name,
            "metric": settings.metric.value,
            "samples": board.samples,
            "fingerprint": board.fingerprint,
            **describe(places, values, settings),
            "versions": versions(),
            "commit": commit(),
        },
    )
    return out / CURVE


def line_places(points: int, beyond: float) -> list[float]:
    """Values of t: ``points`` from 0 to 1, and as far apart behind both ends, up to ``beyond``."""
    step = 1 / (points - 1)
    more = int(beyond / step + 1e-9)
    return [round(number * step, 9) for number in range(-more, points + more)]


def describe(places: list[float], values: list[Values], settings: CurveSettings) -> dict[str, Any]:
    """Points with their intervals, and the barrier: its height, its place, and its interval at that place."""
    sign = 1.0 if settings.metric == SoupMetric.loss else -1.0
    means = np.array([one.mean() for one in values])
    draws = resample(values, settings.bootstrap_draws, settings.seed)
    left, right = places.index(0.0), places.index(1.0)
    inside = range(left + 1, right)

    def rise(at: int) -> float:
        return float(sign * (means[at] - (1 - places[at]) * means[left] - places[at] * means[right]))

    top = max(inside, key=rise)
    drawn = sign * (draws[:, top] - (1 - places[top]) * draws[:, left] - places[top] * draws[:, right])
    low, high = interval(drawn)
    points = []
    for column, t in enumerate(places):
        point_low, point_high = interval(draws[:, column])
        tasks = {task: float(v.sum() / values[column].weight[task].sum()) for task, v in values[column].value.items()}
        points.append({"t": t, "metric": float(means[column]), "low": point_low, "high": point_high, "tasks": tasks})
    return {"points": points, "barrier": {"t": places[top], "height": rise(top), "low": low, "high": high}}
