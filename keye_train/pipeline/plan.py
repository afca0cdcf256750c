"""What each part of a pipeline gets: settings of the commands, composed and checked before the first of them runs."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

from keye_train import compose
from keye_train.pipeline.branches import record, recorded_mixtures
from keye_train.settings import (
    CurveSettings,
    DataSettings,
    DiagnosisSettings,
    EvaluationSettings,
    MergeSettings,
    PipelineRun,
    PipelineSettings,
    SettingsError,
    SoupSettings,
    TrainSettings,
    mixture_overrides,
)

START = "start"  # folder of the untrained model
MERGE = "merge"
SOUP = "soup"  # folder of diagnosis, curve and search
DIAGNOSIS, CURVE = "diagnosis", "curve"
EVALUATION = "evaluation"


def part_names(settings: PipelineSettings) -> list[str]:
    """Every part, in order."""
    names = ["data"] * bool(settings.prepare) + [run.name for run in settings.runs()] + [MERGE] * bool(settings.merged)
    if settings.soup is not None:
        names += [DIAGNOSIS] * settings.soup.diagnose + [CURVE] * bool(settings.soup.curve_points) + [SOUP]
    return [*names, EVALUATION]


def stage_settings(settings: PipelineSettings, run: PipelineRun) -> TrainSettings:
    """The settings that ``keye-train`` gets for one stage, checked."""
    return _composed(tuple(stage_overrides(settings, run)), compose.recipes_folder())


def stage_overrides(settings: PipelineSettings, run: PipelineRun) -> list[str]:
    """The command line of ``keye-train`` for one run."""
    overrides = _plain_overrides(settings, run)
    if run.drawn is not None:
        name = f"drawn{run.drawn}"
        overrides += mixture_overrides(name, drawn_mixtures(settings, run.entry)[name])
    return overrides


def drawn_mixtures(settings: PipelineSettings, entry: str) -> dict[str, dict[str, float]]:
    """Name -> weights of the mixtures drawn for an entry."""
    drawn = settings.stages[entry].drawn
    return recorded_mixtures(Path(settings.out), entry, _base_weights(settings, entry), drawn)


def record_draws(settings: PipelineSettings) -> None:
    """Keep every drawn mixture in ``OUT/branches.json``."""
    for name, entry in settings.stages.items():
        if entry.enabled and entry.drawn.count:
            record(Path(settings.out), name, _base_weights(settings, name), entry.drawn)


def _base_weights(settings: PipelineSettings, entry: str) -> dict[str, float]:
    drawn = settings.stages[entry].drawn
    run = next(run for run in settings.runs() if run.entry == entry and run.drawn is not None)
    overrides = (*_plain_overrides(settings, run), f"stage.mixture={drawn.base}")
    return _composed(overrides, compose.recipes_folder()).data.mixtures[drawn.base]


def _plain_overrides(settings: PipelineSettings, run: PipelineRun) -> list[str]:
    out = Path(settings.out)
    parent = "null" if run.parent is None else str(out / run.parent)
    return [
        f"stage={run.stage}",
        f"model={settings.model}",
        f"data={settings.data}",
        f"run_dir={out / run.name}",
        f"parent={parent}",
        *settings.overrides,
        *run.overrides,
    ]


@lru_cache(maxsize=64)
def _composed(overrides: tuple[str, ...], recipes: str | None) -> TrainSettings:
    """Composing takes a good part of a second, and every part asks for the same few; nobody changes the result."""
    return compose.load_settings(TrainSettings, "train", overrides, recipes)


def merge_settings(settings: PipelineSettings) -> MergeSettings:
    """The settings that ``keye-merge`` gets, checked."""
    out = Path(settings.out)
    return compose.load_settings(
        MergeSettings,
        "merge",
        [
            f"merge={settings.merge_recipe}",
            f"models=[{','.join(merged_folders(settings))}]",
            f"out={out / MERGE}",
            *settings.merge_overrides,
        ],
        compose.recipes_folder(),
    )


def merged_folders(settings: PipelineSettings) -> list[str]:
    """Folders of the runs that are averaged."""
    return [str(Path(settings.out) / name) for name in settings.merged_runs()]


def check_merged_budgets(settings: PipelineSettings) -> None:
    """Raise SettingsError where the merge would refuse its models for their budgets, hours later."""
    merged = settings.merged_runs()
    budgets = {run.name: stage_settings(settings, run).data.resolution for run in settings.runs() if run.name in merged}
    for name, resolution in budgets.items():
        if resolution != budgets[merged[0]]:
            raise SettingsError(
                f"merged: {merged[0]} and {name} train with different budgets, and their average would have neither: "
                "give both the same data.resolution"
            )


def diagnosis_settings(settings: PipelineSettings) -> DiagnosisSettings:
    """The settings that ``keye-merge diagnose`` gets: against the parent, where all merged runs have the same one."""
    out = Path(settings.out)
    parents = {run.parent for run in settings.runs() if run.name in settings.merged_runs()}
    parent = parents.pop() if len(parents) == 1 else None
    return DiagnosisSettings(
        models=merged_folders(settings), base=None if parent is None else str(out / parent), out=str(out / SOUP)
    )


def curve_settings(settings: PipelineSettings) -> CurveSettings:
    """The settings that ``keye-merge curve`` gets: the line between the first two merged runs."""
    assert settings.soup is not None, "asked where there is a curve"
    wanted = CurveSettings(
        models=merged_folders(settings)[:2],
        data=_data_of_last(settings),
        out=str(Path(settings.out) / SOUP),
        points=settings.soup.curve_points,
        metric=settings.soup.metric,
        bootstrap_draws=settings.soup.bootstrap_draws,
        **vars(settings.evaluation),
    )
    wanted.check()
    return wanted


def soup_settings(settings: PipelineSettings) -> SoupSettings:
    """The settings that ``keye-merge search`` gets; it is confirmed by the samples of the evaluation."""
    assert settings.soup is not None, "asked where there is a search"
    search = {key: value for key, value in vars(settings.soup).items() if key not in ("diagnose", "curve_points")}
    wanted = SoupSettings(
        models=merged_folders(settings),
        data=_data_of_last(settings),
        out=str(Path(settings.out) / SOUP),
        **search,
        **vars(settings.evaluation),
    )
    wanted.check()
    return wanted


def evaluation_settings(settings: PipelineSettings, soups: list[str] | None = None) -> EvaluationSettings:
    """The settings that ``keye-eval`` gets, checked.

    Args:
        soups: folders of the soups that were accepted.
    """
    out = Path(settings.out)
    names = [START, *(run.name for run in settings.runs())] + [MERGE] * bool(settings.merged)
    wanted = EvaluationSettings(
        models=[str(out / name) for name in names] + (soups or []),
        data=_data_of_last(settings),
        out=str(out / EVALUATION),
        **vars(settings.evaluation),
    )
    wanted.check()
    return wanted


def _data_of_last(settings: PipelineSettings) -> DataSettings:
    return stage_settings(settings, settings.runs()[-1]).data
