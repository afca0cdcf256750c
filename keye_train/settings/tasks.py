"""What comes after training: evaluation, and the pipeline that joins everything."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import PurePath
from typing import Any

from keye_train.settings.basics import SettingsError, mixture_tables
from keye_train.settings.branches import DrawnMixturesSettings
from keye_train.settings.data import DataSettings, check_data
from keye_train.settings.soups import PipelineSoupSettings


@dataclass
class AnswerSettings:
    """How held-out samples are drawn and answered."""

    samples_per_task: int = 100
    batch_size: int = 32
    max_new_tokens: int = 48
    seed: int = 0


@dataclass(kw_only=True)  # required keys may follow those with a value
class EvaluationSettings(AnswerSettings):
    """One run of ``keye-eval``."""

    models: list[str]
    """Run folders or exports; each is named after its folder."""
    data: DataSettings
    out: str

    def named_models(self) -> dict[str, str]:
        """Name in the tables -> run folder, export or checkpoint.

        Raises:
            SettingsError: two models would share a name.
        """
        named: dict[str, str] = {}
        for model in self.models:
            name = model_name(model)
            if name in named:
                raise SettingsError(f"models: {named[name]} and {model} share the name '{name}'; rename a folder")
            named[name] = model
        return named

    def check(self) -> None:
        """Raise SettingsError for values that cannot work together."""
        check_data(self.data)
        if not self.models:
            raise SettingsError("models is empty: name at least one, e.g. models=[runs/demo/merge]")
        self.named_models()
        for name in ("samples_per_task", "batch_size", "max_new_tokens"):
            if getattr(self, name) < 1:
                raise SettingsError(f"{name} must be at least 1")


def model_name(model: str) -> str:
    """Name in the tables of a run folder, an export (its run's), a checkpoint (RUN/step-N) or another folder."""
    folder = PurePath(model)
    if folder.parent.name == "checkpoints":
        return f"{folder.parent.parent.name}/{folder.name}"
    return folder.parent.name if folder.name == "export" else folder.name


def mixture_overrides(name: str, shares: Mapping[str, float]) -> tuple[str, str]:
    """Overrides of ``keye-train`` that add a mixture to the data recipe and train on it."""
    written = ",".join(f"{source}:{share!r}" for source, share in shares.items())
    return f"+data.mixtures.{name}={{{written}}}", f"stage.mixture={name}"


@dataclass
class PipelineStageSettings:
    """One entry of the chain: one run, or one for each of its branches."""

    stage: str
    """Recipe of the group ``stage``."""
    parent: str | None = None
    """Name of an earlier run whose export this one starts from."""
    overrides: list[str] = field(default_factory=list)
    mixtures: list[str] = field(default_factory=list)
    """Branches: one run for each of these mixtures, all from the same parent, named NAME_MIXTURE."""
    tables: dict[str, Any] = field(default_factory=dict)
    """Further branches by mixtures given here: name -> source -> weight."""
    drawn: DrawnMixturesSettings = field(default_factory=DrawnMixturesSettings)
    """Further branches by mixtures drawn around one of the data recipe."""
    enabled: bool = True

    def __post_init__(self) -> None:
        self.tables = mixture_tables("tables", self.tables)


@dataclass(frozen=True)
class PipelineRun:
    """One run of the chain, branches written out."""

    name: str  # folder below the pipeline's ``out``
    stage: str
    parent: str | None
    overrides: tuple[str, ...]
    entry: str = ""  # of ``PipelineSettings.stages``
    drawn: int | None = None  # number of the mixture drawn for it


@dataclass
class PipelineSettings:
    """The chain stage 0 -> 1 -> 2 -> 3 x K -> merge -> evaluate -> report."""

    name: str
    out: str
    model: str
    """Recipe of the group ``model``."""
    data: str
    """Recipe of the group ``data``."""
    stages: dict[str, PipelineStageSettings]
    """Name -> entry, in the order in which they run."""
    merged: list[str]
    """Entries whose exports are averaged; one with branches stands for all of them. Empty: no merge."""
    merge_recipe: str = "uniform"
    prepare: list[str] = field(default_factory=list)
    """Command that makes the data; it is called each time and returns at once when nothing is missing."""
    launcher: list[str] = field(default_factory=list)
    """Words put before ``-m keye_train``, e.g. [torchrun, --nproc-per-node, "8"]; empty: one process. ``{run}`` in a
    word is the name of the run; a word ``{arguments}`` is replaced by the overrides alone, for launchers that name the
    module themselves: [sbatch, --wait, "--job-name={run}", launch/slurm.sbatch, "{arguments}"]."""
    parallel_branches: int = 1
    """Branches of one entry that train at the same time, each behind a launcher of its own; their output goes to
    OUT/logs/RUN.log. On one machine the launchers must share its devices; with srun or sbatch --wait each is a job."""
    overrides: list[str] = field(default_factory=list)
    """Overrides that every stage gets."""
    merge_overrides: list[str] = field(default_factory=list)
    """Overrides that the merge gets, e.g. ``weights=[0.5,0.3,0.2]`` with merge_recipe=weighted."""
    soup: PipelineSoupSettings | None = None
    """Diagnosis, interpolation curve and soup search of the merged runs; null: none of them."""
    evaluation: AnswerSettings = field(default_factory=AnswerSettings)
    """What the pipeline passes on to the evaluation."""

    def runs(self) -> list[PipelineRun]:
        """Every run in order, with branches written out."""
        return [run for name in self.stages for run in self._runs_of(name)]

    def merged_runs(self) -> list[str]:
        """Names of the runs that are averaged."""
        return [run.name for name in self.merged for run in self._runs_of(name)]

    def _runs_of(self, name: str) -> list[PipelineRun]:
        entry = self.stages[name]
        if not entry.enabled:
            return []

        def run(mixture: str, *more: str, drawn: int | None = None) -> PipelineRun:
            overrides = (*entry.overrides, *more)
            return PipelineRun(f"{name}_{mixture}", entry.stage, entry.parent, overrides, name, drawn)

        found = [run(mixture, f"stage.mixture={mixture}") for mixture in entry.mixtures]
        found += [run(mixture, *mixture_overrides(mixture, shares)) for mixture, shares in entry.tables.items()]
        found += [run(f"drawn{number}", drawn=number) for number in range(1, entry.drawn.count + 1)]
        return found or [PipelineRun(name, entry.stage, entry.parent, tuple(entry.overrides), name)]

    def check(self) -> None:
        """Raise SettingsError for values that cannot work together."""
        for name in self.merged:
            if name not in self.stages:
                raise SettingsError(f"merged: '{name}' is not an entry of stages; entries: {list(self.stages)}")
        if len(self.merged_runs()) == 1:
            raise SettingsError(f"merged={self.merged}: name at least two runs to average, or none")
        if self.parallel_branches < 1:
            raise SettingsError(f"parallel_branches={self.parallel_branches}: at least 1")
        for name, entry in self.stages.items():
            entry.drawn.check(name)
        if self.soup is not None:
            self.soup.check(len(self.merged_runs()))
        names: list[str] = []
        for run in self.runs():
            if run.name in names:
                raise SettingsError(f"stages: two runs share the name {run.name}")
            if run.parent is not None and run.parent not in names:
                raise SettingsError(
                    f"stages.{run.name} starts from parent={run.parent}, which is not an earlier run; earlier: {names}"
                )
            names.append(run.name)
        if not names:
            raise SettingsError("stages: every entry is disabled")
