"""What ``keye-merge diagnose``, ``curve`` and ``search`` do: settings of everything that judges an average."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum

from keye_train.settings.basics import SettingsError
from keye_train.settings.data import DataSettings, check_data


class SoupMetric(str, Enum):
    """What a candidate is scored by."""

    loss = "loss"  # mean over tasks of the held-out loss of a token; lower is better
    score = "score"  # mean over tasks of keye-eval's score of an answer; higher is better


class SoupMethod(str, Enum):
    """How weights are searched."""

    greedy = "greedy"  # Wortsman et al. 2022, recipe 1: best first, a model stays in if it improves the mean
    weights = "weights"  # Nelder-Mead over convex weights


@dataclass(kw_only=True)
class DiagnosisSettings:
    """One run of ``keye-merge diagnose``."""

    models: list[str]
    """Models to compare, each as ``keye-merge`` takes it: run folders, exports, checkpoints, folders of safetensors."""
    out: str
    base: str | None = None
    """The common parent. Without it distances are compared, but no deltas."""

    def check(self) -> None:
        """Raise SettingsError for values that cannot work together."""
        if len(self.models) < 2:
            raise SettingsError(f"models={self.models}: name at least two models to compare")


@dataclass(kw_only=True)
class ScoringSettings:
    """How candidates are scored on held-out samples, without being written to the disk."""

    metric: SoupMetric = SoupMetric.loss
    samples_per_task: int = 100
    """Held-out samples of each task that confirm: the very ones that ``keye-eval`` draws with this number and seed."""
    seed: int = 0
    batch_size: int = 32
    """metric=score: prompts answered together."""
    max_new_tokens: int = 48
    """metric=score: longest answer."""
    bootstrap_draws: int = 2000
    """Resamples behind each interval."""

    def check_scoring(self) -> None:
        """Raise SettingsError for values out of range."""
        for name in ("samples_per_task", "batch_size", "max_new_tokens"):
            if getattr(self, name) < 1:
                raise SettingsError(f"{name} must be at least 1")
        if self.bootstrap_draws < 100:
            raise SettingsError(f"bootstrap_draws={self.bootstrap_draws}: an interval needs at least 100")


@dataclass(kw_only=True)
class CurveSettings(ScoringSettings):
    """One run of ``keye-merge curve``: loss along the line between two models."""

    models: list[str]
    """Two models as ``keye-merge`` takes them, t = 0 and t = 1; Keye models with their tokenizer."""
    data: DataSettings
    out: str
    points: int = 11
    """Places between the ends, both included, at equal distances."""
    beyond: float = 0.0
    """How far the line goes on behind either end, as a share of its length; the points in between are as far apart."""

    def check(self) -> None:
        """Raise SettingsError for values that cannot work together."""
        check_data(self.data)
        self.check_scoring()
        if len(self.models) != 2:
            raise SettingsError(f"models={self.models}: a line has two ends, name two models")
        if self.points < 3:
            raise SettingsError(f"points={self.points}: at least 3, the ends and one between them")
        if not 0 <= self.beyond <= 1:
            raise SettingsError(f"beyond={self.beyond}: use 0 to 1, in lengths of the line")


@dataclass(kw_only=True)
class SearchSettings:
    """How a soup is searched: shared by ``keye-merge search`` and the pipeline."""

    methods: list[SoupMethod] = field(default_factory=lambda: [SoupMethod.greedy, SoupMethod.weights])
    selection_per_task: int = 100
    """Held-out samples of each task that the search looks at: those drawn behind ``samples_per_task``, so that none of
    them confirms. Fewer where a task has no more."""
    budget: int = 40
    """Candidates that may be scored on the selection samples, the single models and the uniform mean included;
    cached ones count as well, so that a resumed search takes the same course."""
    max_minutes: float | None = None
    """No new candidate is begun after this time of this call; null: no limit. Run again to go on."""
    tolerance: float = 1.0e-4
    """methods=weights ends early where the candidates at hand differ by less than this in the metric."""

    def check_search(self, models: int) -> None:
        """Raise SettingsError for values that cannot work together.

        Args:
            models: how many there are to mix.
        """
        if not self.methods or len(set(self.methods)) < len(self.methods):
            raise SettingsError(f"methods={[m.value for m in self.methods]}: name greedy, weights or both, once each")
        if self.selection_per_task < 1:
            raise SettingsError("selection_per_task must be at least 1")
        least = 2 * models + (models if SoupMethod.weights in self.methods else 0)
        if self.budget < least:
            raise SettingsError(f"budget={self.budget}: {models} models need at least {least} candidates")
        if self.max_minutes is not None and self.max_minutes <= 0:
            raise SettingsError(f"max_minutes={self.max_minutes}: use a number above 0, or null")
        if self.tolerance <= 0:
            raise SettingsError(f"tolerance={self.tolerance}: use a number above 0")


@dataclass(kw_only=True)
class SoupSettings(SearchSettings, ScoringSettings):
    """One run of ``keye-merge search``."""

    models: list[str]
    """Models to mix, as ``keye-merge`` takes them; Keye models with their tokenizer."""
    data: DataSettings
    out: str
    """Folder of the results and of the cache; an accepted soup is written below it as soup_greedy/ and
    soup_weights/."""

    def check(self) -> None:
        """Raise SettingsError for values that cannot work together."""
        check_data(self.data)
        if len(self.models) < 2:
            raise SettingsError(f"models={self.models}: name at least two models to mix")
        self.check_scoring()
        self.check_search(len(self.models))


@dataclass(kw_only=True)
class PipelineSoupSettings(SearchSettings):
    """What a pipeline does with its merged runs besides merging them. Samples, seed and answers are those of
    ``evaluation``, so the soups are confirmed by the samples of the table."""

    metric: SoupMetric = SoupMetric.loss
    diagnose: bool = True
    """Compare the runs, against their parent where they share one."""
    curve_points: int = 11
    """Places on the line between the first two runs; 0: no curve."""
    bootstrap_draws: int = 2000

    def check(self, models: int) -> None:
        """Raise SettingsError for values that cannot work together.

        Args:
            models: how many runs are merged.
        """
        if models < 2:
            raise SettingsError("soup needs runs to mix: name them in merged, or set soup=null")
        if self.curve_points and self.curve_points < 3:
            raise SettingsError(f"soup.curve_points={self.curve_points}: at least 3, or 0 for no curve")
        self.check_search(models)
