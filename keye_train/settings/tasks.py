"""What comes after training: merge, evaluation, and the pipeline that joins everything."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import PurePath

from keye_train.settings.basics import MergeMethod, SettingsError
from keye_train.settings.data import DataSettings, check_data


@dataclass
class MergeSettings:
    """One run of ``keye-merge``."""

    models: list[str]
    """Exports (folders with config.json and safetensors) to average."""
    out: str
    method: MergeMethod = MergeMethod.uniform
    weights: list[float] | None = None
    """One weight for each model. weighted, slerp: >= 0, normalised to sum to 1; task_arithmetic: factors of the deltas,
    of any sign, used as they are."""
    modules: dict[str, list[float]] = field(default_factory=dict)
    """method=uniform, weighted: pattern of tensor names (such as ``mlp_AR.*``) -> the weights of its tensors, in place
    of ``weights``; the first pattern that matches counts. [1, 0] takes the tensors of the first model as they are."""
    decay: float | None = None
    """method=ema: how much of the running average each later model keeps, 0 < decay < 1."""
    base: str | None = None
    """method=task_arithmetic: the export that all models were trained from."""
    dtype: str | None = None
    """Data type of the result (float32, bfloat16, float16); null: that of the first model."""
    max_shard_bytes: int = 5_000_000_000

    def check(self) -> None:
        """Raise SettingsError for values that cannot work together."""
        if len(self.models) < 2:
            raise SettingsError(f"models={self.models}: name at least two checkpoints to average")
        self._check_weights()
        if self.modules and self.method not in (MergeMethod.uniform, MergeMethod.weighted):
            raise SettingsError(
                f"modules has no effect with method={self.method.value}: drop it or set method=weighted"
            )
        for pattern, weights in self.modules.items():
            self._check_shares(f"modules: {pattern}", weights)
        if (self.method == MergeMethod.ema) != (self.decay is not None):
            raise SettingsError("method=ema needs decay=..., and no other method has one: set both or neither")
        if self.decay is not None and not 0 < self.decay < 1:
            raise SettingsError(f"decay={self.decay}: use a number between 0 and 1")
        if (self.method == MergeMethod.task_arithmetic) != (self.base is not None):
            raise SettingsError(
                "method=task_arithmetic needs base=..., and no other method has one: set both or neither"
            )
        if self.dtype not in (None, "float32", "bfloat16", "float16"):
            raise SettingsError(f"dtype={self.dtype}: use float32, bfloat16, float16 or null")

    def _check_weights(self) -> None:
        method = self.method.value
        if self.method in (MergeMethod.uniform, MergeMethod.wma, MergeMethod.ema):
            if self.weights is not None:
                raise SettingsError(f"weights has no effect with method={method}: drop it or set method=weighted")
            return
        if self.method == MergeMethod.slerp and len(self.models) != 2:
            raise SettingsError(f"method=slerp joins two models, models names {len(self.models)}: name two")
        if self.weights is None or len(self.weights) != len(self.models):
            raise SettingsError(
                f"method={method} needs one weight for each of the {len(self.models)} models: set weights=[...]"
            )
        if self.method != MergeMethod.task_arithmetic:
            self._check_shares("weights", self.weights)
        elif not all(math.isfinite(weight) for weight in self.weights):
            raise SettingsError(f"weights={self.weights}: use finite numbers")

    def _check_shares(self, name: str, weights: list[float]) -> None:
        if len(weights) != len(self.models):
            raise SettingsError(f"{name}={weights}: give one weight for each of the {len(self.models)} models")
        if not all(0 <= weight < math.inf for weight in weights) or sum(weights) <= 0:
            raise SettingsError(f"{name}={weights}: use finite numbers >= 0 with a positive sum")


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
        """Name in the tables -> run folder or export.

        Raises:
            SettingsError: two models would share a name.
        """
        named: dict[str, str] = {}
        for model in self.models:
            folder = PurePath(model)
            name = folder.parent.name if folder.name == "export" else folder.name
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
    enabled: bool = True


@dataclass(frozen=True)
class PipelineRun:
    """One run of the chain, branches written out."""

    name: str  # folder below the pipeline's ``out``
    stage: str
    parent: str | None
    overrides: tuple[str, ...]


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
    """Words put before ``-m keye_train``, e.g. [torchrun, --nproc-per-node, "8"]; empty: one process."""
    overrides: list[str] = field(default_factory=list)
    """Overrides that every stage gets."""
    merge_overrides: list[str] = field(default_factory=list)
    """Overrides that the merge gets, e.g. ``weights=[0.5,0.3,0.2]`` with merge_recipe=weighted."""
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
        if not entry.mixtures:
            return [PipelineRun(name, entry.stage, entry.parent, tuple(entry.overrides))]
        return [
            PipelineRun(f"{name}_{mixture}", entry.stage, entry.parent, (*entry.overrides, f"stage.mixture={mixture}"))
            for mixture in entry.mixtures
        ]

    def check(self) -> None:
        """Raise SettingsError for values that cannot work together."""
        for name in self.merged:
            if name not in self.stages:
                raise SettingsError(f"merged: '{name}' is not an entry of stages; entries: {list(self.stages)}")
        if len(self.merged_runs()) == 1:
            raise SettingsError(f"merged={self.merged}: name at least two runs to average, or none")
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
