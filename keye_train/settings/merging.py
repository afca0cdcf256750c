"""What ``keye-merge`` does in one run."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from keye_train.settings.basics import MergeMethod, SettingsError
from keye_train.settings.merge_methods import METHODS

TIES_DENSITY = 0.2
"""Share of a delta's values that TIES keeps: what its paper uses where nothing is tuned."""

ALLOWED_DIFFERENCES = {
    "missing": "a tensor of the first model that others lack: averaged over those that have it; where the base lacks "
    "it, the first model's",
    "extra": "a tensor that the first model lacks: dropped",
    "shape": "the first model's tensor",
    "dtype": "of float32, bfloat16 and float16: averaged, and written in the smallest type that holds all of them "
    "(torch.promote_types)",
    "integers": "tensors that are not averaged (integers, booleans, float64, 8-bit floats) in one of the models, and "
    "differ in values or type: the first's",
    "tied": "models that tie the output matrix to the embedding, beside others that do not: read as two equal tensors; "
    "and models that tie them but store two that differ: read as they are stored; the result has both and ties nothing",
    "tokenizer": "the first model's files",
    "processor": "the first model's budgets of images and videos",
    "rope": "the first model's position settings",
    "config": "the first model's other fields of config.json",
}
"""Differences that ``allow`` may name, and what becomes of them."""


@dataclass
class MergeSettings:
    """One run of ``keye-merge``."""

    models: list[str]
    """Run folders, exports, checkpoints of a run (RUN/checkpoints/step-N), or folders of safetensors of any model."""
    out: str
    method: MergeMethod = MergeMethod.uniform
    weights: list[float] | None = None
    """One weight for each model. weighted, slerp, spherical, ties, dare_ties: >= 0, only their ratio counts;
    task_arithmetic, dare_linear: factors of the deltas, of any sign, used as they are."""
    modules: dict[str, Any] = field(default_factory=dict)
    """Pattern of tensor names (such as ``mlp_AR.*``) -> the weights of its tensors, in place of ``weights``; the first
    pattern that matches counts. With method=uniform, [1, 0] takes the tensors of the first model as they are."""
    decay: float | None = None
    """method=ema: how much of the running average each later model keeps, 0 < decay < 1."""
    base: str | None = None
    """The model that all were trained from, for the methods that work on deltas to it."""
    last: int | None = None
    """method=lawa, wma, ema: models names one run folder, and its last ``last`` checkpoints are averaged."""
    density: float | None = None
    """Share of each delta's values that is kept, 0 < density <= 1. ties: the largest of each tensor (null: 0.2);
    dare_linear, dare_ties: drawn at random."""
    scale: float | None = None
    """method=ties, dare_ties: factor of the merged delta (null: 1)."""
    seed: int | None = None
    """method=dare_linear, dare_ties: of the draw (null: 0)."""
    allow: list[str] = field(default_factory=list)
    """Differences that are no error: names of ALLOWED_DIFFERENCES."""
    dtype: str | None = None
    """Data type of the result (float32, bfloat16, float16); null: that of the models; where they differ
    (allow=[dtype]), the smallest that holds all. A checkpoint of a run, whose weights are float32, has the type of the
    run's export."""
    max_shard_bytes: int = 5_000_000_000
    threads: int = 0
    """Threads that read and average; 0: three times the processors. Fewer run where more would not fit in
    512 MiB. The result has the same bits for any number."""
    hash_inputs: bool = True
    """Put the SHA-256 of every input into the manifest. false saves that of weights, other than those of checkpoints,
    which are compared with what their writer noted; ``keye-merge verify`` then knows parents' weights by size alone."""

    def __post_init__(self) -> None:
        self.modules = _weights_by_pattern(self.modules)

    def check(self) -> None:
        """Raise SettingsError for values that cannot work together."""
        if self.last is not None:
            if len(self.models) != 1 or self.last < 2:
                raise SettingsError(f"last={self.last}: name one run folder in models, and a last of at least 2")
        elif len(self.models) < 2 and "last" not in METHODS[self.method].needs:
            raise SettingsError(
                f"models={self.models}: name at least two checkpoints to average, or one run and last=K"
            )
        self._check_effect()
        self._check_weights()
        if self.decay is not None and not 0 < self.decay < 1:
            raise SettingsError(f"decay={self.decay}: use a number between 0 and 1")
        if self.density is not None and not 0 < self.density <= 1:
            raise SettingsError(f"density={self.density}: use a share above 0, at most 1")
        if self.scale is not None and not math.isfinite(self.scale):
            raise SettingsError(f"scale={self.scale}: use a finite number")
        if self.seed is not None and self.seed < 0:
            raise SettingsError(f"seed={self.seed}: use a number >= 0")
        if self.dtype not in (None, "float32", "bfloat16", "float16"):
            raise SettingsError(f"dtype={self.dtype}: use float32, bfloat16, float16 or null")
        if unknown := sorted(set(self.allow) - set(ALLOWED_DIFFERENCES)):
            raise SettingsError(f"allow={unknown[0]}: choose among {', '.join(ALLOWED_DIFFERENCES)}")
        if self.threads < 0:
            raise SettingsError(f"threads={self.threads}: use 0 (three times the processors) or a number of threads")
        if self.max_shard_bytes < 1:
            raise SettingsError(f"max_shard_bytes={self.max_shard_bytes}: use a positive size")

    def _check_effect(self) -> None:
        """Each setting that belongs to some methods is there with these and with no other."""
        about = METHODS[self.method]
        for name in ("modules", "decay", "base", "last", "density", "scale", "seed"):
            is_set = getattr(self, name) not in (None, {})
            if is_set and name not in about.needs | about.may:
                fitting = [m.value for m, other in METHODS.items() if name in other.needs | other.may]
                raise SettingsError(
                    f"{name} has no effect with method={self.method.value}: drop it, or use one of {', '.join(fitting)}"
                )
            if not is_set and name in about.needs:
                raise SettingsError(f"method={self.method.value} needs {name}=...: set it")

    def _check_weights(self) -> None:
        method = self.method.value
        kind = METHODS[self.method].weights
        if kind == "none":
            if self.weights is not None:
                raise SettingsError(f"weights has no effect with method={method}: drop it or set method=weighted")
            kind = "share"
        elif self.weights is None or len(self.weights) != len(self.models):
            raise SettingsError(
                f"method={method} needs one weight for each of the {len(self.models)} models: set weights=[...]"
            )
        if self.method == MergeMethod.slerp and len(self.models) != 2:
            raise SettingsError(
                f"method=slerp joins two models, models names {len(self.models)}: name two, or set method=spherical"
            )
        given = {} if self.weights is None else {"weights": self.weights}
        for name, weights in (given | {f"modules: {key}": value for key, value in self.modules.items()}).items():
            if len(weights) != len(self.models):
                raise SettingsError(f"{name}={weights}: give one weight for each of the {len(self.models)} models")
            if kind == "share" and not (all(0 <= weight < math.inf for weight in weights) and sum(weights) > 0):
                raise SettingsError(f"{name}={weights}: use finite numbers >= 0 with a positive sum")
            if not all(math.isfinite(weight) for weight in weights):
                raise SettingsError(f"{name}={weights}: use finite numbers")


def _weights_by_pattern(modules: Mapping[str, Any]) -> dict[str, list[float]]:
    """Pattern -> weights, with whole numbers as floats; OmegaConf refuses those in a dict of lists."""
    for pattern, weights in modules.items():
        if not isinstance(weights, list) or not all(type(weight) in (int, float) for weight in weights):
            raise SettingsError(f"modules: {pattern}={weights}: give a list of weights, one for each model")
    return {pattern: [float(weight) for weight in weights] for pattern, weights in modules.items()}
