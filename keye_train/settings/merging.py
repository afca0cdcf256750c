"""What ``keye-merge`` does in one run."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from keye_train.settings.basics import MergeMethod, SettingsError


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
