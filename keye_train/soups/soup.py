"""``keye-merge search``: weights found on selection samples, judged on others, written only where they are worth it.

Selection and confirmation samples are drawn one behind the other and have none in common, so the search does not grade
itself; the confirmation samples are those of ``keye-eval`` with the same number and seed. A soup is accepted where the
lower end of its 95 % interval of the gain over the parts' mean lies above 0.
"""

from __future__ import annotations

import logging
import shutil
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from keye_train.evaluation.candidates import Values
from keye_train.evaluation.heldout import Heldout, content_sha256, read_tasks
from keye_train.merging import merge
from keye_train.merging.merge import OtherOutput
from keye_train.runs import commit, versions, write_json_atomic
from keye_train.settings import (
    EvaluationSettings,
    MergeMethod,
    MergeSettings,
    SettingsError,
    SoupMethod,
    SoupMetric,
    SoupSettings,
)
from keye_train.soups.bootstrap import interval, resample
from keye_train.soups.scoreboard import Models, Scoreboard, opened_models
from keye_train.soups.search import BudgetSpentError, Trials, exact, greedy, nelder_mead, normalised, one_hot

logger = logging.getLogger(__name__)

RESULT = "soup.json"
UNIFORM = "uniform"
FOLDERS = {SoupMethod.greedy: "soup_greedy", SoupMethod.weights: "soup_weights"}
"""Below ``out``; a folder is there exactly where its soup was accepted."""


def search_soup(settings: SoupSettings, progress: bool = True) -> Path:
    """Search, judge, and write every accepted soup as an export; ``OUT/soup.json`` holds everything that was found.

    Stopped at any time, the same call goes on: each value is kept as soon as it is known.

    Returns:
        The file.

    Raises:
        SettingsError: impossible settings, too few held-out samples, or data that cannot be read.
        FileNotFoundError, ExportError: a model is absent or broken.
        MergeError: the models cannot be averaged.
    """
    settings.check()
    out = Path(settings.out)
    named = EvaluationSettings(models=settings.models, data=settings.data, out=settings.out).named_models()
    with opened_models(named, out) as models:
        return _search_and_judge(settings, models, out, progress)


def _search_and_judge(settings: SoupSettings, models: Models, out: Path, progress: bool) -> Path:
    confirming, selecting = split(settings)
    selection = Scoreboard(models, selecting, settings.data, settings, out, progress)
    trials, found = _search(settings, selection, len(models.exports))
    confirmation = Scoreboard(models, confirming, settings.data, settings, out, progress)
    candidates = _candidates(models.names, found)
    judged = judge(
        candidates,
        [confirmation.values(weights) for weights in candidates.values()],
        len(models.exports),
        _best_part(trials, models.names),
        settings,
    )
    result = {
        "models": models.names,
        "paths": models.paths,
        "fingerprints": models.fingerprints,
        "data": settings.data.name,
        "metric": settings.metric.value,
        "settings": {key: value for key, value in asdict(settings).items() if key not in ("data", "models", "out")},
        "selection": {"samples": selection.samples, "fingerprint": selection.fingerprint},
        "confirmation": {"samples": confirmation.samples, "fingerprint": confirmation.fingerprint},
        "stopped": trials.stopped,
        "trials": [asdict(trial) for trial in trials.done],
        **judged,
        "written": {},
        "versions": versions(),
        "commit": commit(),
    }
    for method in SoupMethod:
        accepted = any(row["name"] == FOLDERS[method] and row["accepted"] for row in judged["rows"])
        folder = _place(out / FOLDERS[method], settings, found.get(method) if accepted else None, progress)
        if folder is not None:
            result["written"][FOLDERS[method]] = str(folder)
    logger.info(
        "%d candidates, %d of their values computed now", len(trials.done), selection.computed + confirmation.computed
    )
    write_json_atomic(out / RESULT, result)
    return out / RESULT


def split(settings: SoupSettings) -> tuple[dict[str, Heldout], dict[str, Heldout]]:
    """Confirmation and selection samples of each task, with none in common, not even by content.

    Raises:
        SettingsError: a task has no sample left to select by.
    """
    confirming = read_tasks(settings.data, settings.samples_per_task, settings.seed)
    if not confirming:
        raise SettingsError(f"data={settings.data.name} has no held-out tasks: set data.heldout")
    try:
        selecting = read_tasks(settings.data, settings.selection_per_task, settings.seed, settings.samples_per_task)
    except SettingsError as error:
        raise SettingsError(
            f"{error}: samples_per_task={settings.samples_per_task} leaves nothing to select by; lower it"
        ) from error
    for task, heldout in selecting.items():
        taken = {content_sha256(question) for question in confirming[task].questions}
        own = len(heldout.questions)
        heldout.questions = [one for one in heldout.questions if content_sha256(one) not in taken]
        if len(heldout.questions) < own:
            logger.warning("%s: %d selection samples also confirm; left out", task, own - len(heldout.questions))
        if not heldout.questions:
            raise SettingsError(f"data.heldout.{task}: every selection sample also confirms: it repeats its samples")
    return confirming, selecting


def _search(
    settings: SoupSettings, selection: Scoreboard, models: int
) -> tuple[Trials, dict[SoupMethod, tuple[float, ...]]]:
    deadline = None if settings.max_minutes is None else time.monotonic() + 60 * settings.max_minutes
    trials = Trials(lambda weights: selection.values(weights).mean(), settings.metric, settings.budget, deadline)
    found: dict[SoupMethod, tuple[float, ...]] = {}
    try:
        for model in range(models):
            trials.cost("part", one_hot(model, models))
        trials.cost(UNIFORM, [1.0] * models)
        if SoupMethod.greedy in settings.methods:
            found[SoupMethod.greedy] = greedy(trials, models)
        if SoupMethod.weights in settings.methods:
            nelder_mead(trials, models, settings.tolerance)
    except BudgetSpentError:
        raise SettingsError(
            f"max_minutes={settings.max_minutes} ended before every single model was scored; what is scored is kept: "
            "run again"
        ) from None
    if SoupMethod.weights in settings.methods:
        found[SoupMethod.weights] = trials.best().weights
    return trials, found


def _candidates(names: Sequence[str], found: dict[SoupMethod, tuple[float, ...]]) -> dict[str, tuple[float, ...]]:
    """Name -> weights: the parts, the uniform mean, then what was searched."""
    models = len(names)
    parts = {name: normalised(one_hot(i, models)) for i, name in enumerate(names)}
    searched = {FOLDERS[method]: weights for method, weights in found.items()}
    return parts | {UNIFORM: normalised([1.0] * models)} | searched


def _best_part(trials: Trials, names: Sequence[str]) -> int:
    """By the selection samples, so that the comparison on the others is fair to it."""
    costs = [trials.cost("part", one_hot(i, len(names))) for i in range(len(names))]
    return int(np.argmin(costs))


def judge(
    candidates: dict[str, tuple[float, ...]],
    values: Sequence[Values],
    parts: int,
    best_part: int,
    settings: SoupSettings,
) -> dict[str, Any]:
    """Rows of the table: metric with interval, and gains over the parts' mean, the best part and the uniform mean.

    ``against_uniform`` of a searched soup says what its interval of the gain over the uniform mean tells: "better",
    "worse", "no difference" (0 lies inside) or "same weights"; it decides nothing. None for parts and uniform mean.

    Args:
        candidates: name -> weights; the first ``parts`` are the parts, then the uniform mean.
        values: of each candidate on the confirmation samples.
        best_part: chosen on the selection samples.
    """
    sign = -1.0 if settings.metric == SoupMetric.loss else 1.0
    means = np.array([one.mean() for one in values])
    draws = resample(values, settings.bootstrap_draws, settings.seed)
    names = list(candidates)
    references = {
        "parts_mean": (means[:parts].mean(), draws[:, :parts].mean(axis=1)),
        "best_part": (means[best_part], draws[:, best_part]),
        "uniform": (means[parts], draws[:, parts]),
    }
    rows = []
    for column, name in enumerate(names):
        gains = {}
        for reference, (mean, drawn) in references.items():
            low, high = interval(sign * (draws[:, column] - drawn))
            gains[reference] = {"gain": float(sign * (means[column] - mean)), "low": low, "high": high}
        low, high = interval(draws[:, column])
        row = {
            "name": name,
            "weights": list(candidates[name]),
            "metric": float(means[column]),
            "low": low,
            "high": high,
            "gains": gains,
            "accepted": gains["parts_mean"]["low"] > 0 if column >= parts else None,
            "against_uniform": None,
        }
        if column > parts:
            same = candidates[name] == candidates[names[parts]]
            row["against_uniform"] = "same weights" if same else _told(gains["uniform"])
        rows.append(row)
    low, high = interval(references["parts_mean"][1])
    return {
        "rows": rows,
        "parts_mean": {"metric": float(references["parts_mean"][0]), "low": low, "high": high},
        "best_part": names[best_part],
    }


def _told(gain: dict[str, float]) -> str:
    """What an interval tells of a difference."""
    return "better" if gain["low"] > 0 else "worse" if gain["high"] < 0 else "no difference"


def _place(folder: Path, settings: SoupSettings, weights: Sequence[float] | None, progress: bool) -> Path | None:
    """Bring ``folder``, which is the search's own, to what was found: the export of an accepted soup, else nothing."""
    wanted = None
    if weights is not None:
        wanted = MergeSettings(
            models=settings.models, out=str(folder), method=MergeMethod.weighted, weights=exact(weights)
        )
    if folder.exists():
        try:
            if wanted is not None:
                return merge(wanted, progress)  # kept, where it is that very soup
        except OtherOutput as error:  # other weights, other models, or the same ones at another place
            logger.debug("%s", error)
        logger.info("%s: what an earlier search found is removed", folder)
        shutil.rmtree(folder)
    return None if wanted is None else merge(wanted, progress)
