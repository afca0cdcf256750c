"""The typed settings behind every recipe, and their cross-checks.

A recipe is YAML under ``recipes/``; ``keye_train.compose`` turns it, with the overrides of the command line, into
the dataclasses below. Unknown keys and wrong types are refused there; pairs of values that cannot work together are
refused here, in ``check``. No other module reads YAML, and this one imports nothing heavy.

Units stand in the names: ``_tokens`` are tokens of the language model (one token = 2 x 2 patches = 28 x 28 pixels),
``_patches`` are patches of the vision tower (14 x 14 pixels), ``_steps`` are optimizer steps.
"""

from keye_train.settings.basics import (
    MODULES,
    ActivationCheckpointing,
    LossWeighting,
    MergeMethod,
    Objective,
    Precision,
    ScheduleShape,
    SettingsError,
)
from keye_train.settings.branches import DrawnMixturesSettings
from keye_train.settings.checkpoint import CheckpointSettings
from keye_train.settings.cluster import ClusterSettings, ForecastSettings
from keye_train.settings.data import (
    CurriculumPoint,
    CurriculumSettings,
    DataSettings,
    MixtureUnit,
    Overlong,
    ResolutionSettings,
    SourceSettings,
    StorageSettings,
    VideoBackend,
    ZeroshotSettings,
)
from keye_train.settings.guards import (
    GuardSettings,
    HangPolicy,
    NonFiniteSettings,
    SpikePolicy,
    SpikeSettings,
    WatchdogSettings,
)
from keye_train.settings.logging import LoggingSettings, TrainEvaluationSettings
from keye_train.settings.merging import MergeSettings
from keye_train.settings.model import (
    CaptionDecoderSettings,
    LanguageModelSettings,
    ModelSettings,
    SpecialTokenSettings,
    StartWeightsSettings,
    TextTowerSettings,
    VisionTowerSettings,
)
from keye_train.settings.replay import ReplaySettings
from keye_train.settings.soups import (
    CurveSettings,
    DiagnosisSettings,
    PipelineSoupSettings,
    ScoringSettings,
    SearchSettings,
    SoupMethod,
    SoupMetric,
    SoupSettings,
)
from keye_train.settings.tasks import (
    AnswerSettings,
    EvaluationSettings,
    PipelineRun,
    PipelineSettings,
    PipelineStageSettings,
    mixture_overrides,
    model_name,
)
from keye_train.settings.training import (
    DeepSpeedSettings,
    ModuleRateSettings,
    OptimizerSettings,
    ScheduleSettings,
    StageSettings,
    TrainSettings,
)

__all__ = [
    "MODULES",
    "ActivationCheckpointing",
    "AnswerSettings",
    "CaptionDecoderSettings",
    "CheckpointSettings",
    "ClusterSettings",
    "CurriculumPoint",
    "CurriculumSettings",
    "CurveSettings",
    "DataSettings",
    "DeepSpeedSettings",
    "DiagnosisSettings",
    "DrawnMixturesSettings",
    "EvaluationSettings",
    "ForecastSettings",
    "GuardSettings",
    "HangPolicy",
    "LanguageModelSettings",
    "LoggingSettings",
    "LossWeighting",
    "MergeMethod",
    "MergeSettings",
    "MixtureUnit",
    "ModelSettings",
    "ModuleRateSettings",
    "NonFiniteSettings",
    "Objective",
    "OptimizerSettings",
    "Overlong",
    "PipelineRun",
    "PipelineSettings",
    "PipelineSoupSettings",
    "PipelineStageSettings",
    "Precision",
    "ReplaySettings",
    "ResolutionSettings",
    "ScheduleSettings",
    "ScheduleShape",
    "ScoringSettings",
    "SearchSettings",
    "SettingsError",
    "SoupMethod",
    "SoupMetric",
    "SoupSettings",
    "SourceSettings",
    "SpecialTokenSettings",
    "SpikePolicy",
    "SpikeSettings",
    "StageSettings",
    "StartWeightsSettings",
    "StorageSettings",
    "TextTowerSettings",
    "TrainEvaluationSettings",
    "TrainSettings",
    "VideoBackend",
    "VisionTowerSettings",
    "WatchdogSettings",
    "ZeroshotSettings",
    "mixture_overrides",
    "model_name",
]
