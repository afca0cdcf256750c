"""The error and the choices that all settings share."""

from __future__ import annotations

import math
from collections.abc import Mapping
from enum import Enum
from typing import Any

MODULES = ("vision", "projector", "language", "text_tower", "caption_decoder")


class SettingsError(ValueError):
    """A setting that cannot work; the message names the setting and the way to mend it."""


def mixture_tables(setting: str, tables: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """Name -> source -> weight, with whole numbers as floats.

    OmegaConf cannot hold this type: in a dict of dicts it refuses whole numbers, and overrides of a whole table.

    Raises:
        SettingsError: a table is none, or a weight is no finite number at or above 0; names the key below ``setting``.
    """
    read: dict[str, dict[str, float]] = {}
    for name, table in tables.items():
        if not isinstance(table, Mapping):
            raise SettingsError(f"{setting}.{name}={table}: give each source its weight, as in {{web: 0.7, text: 0.3}}")
        for source, weight in table.items():
            number = isinstance(weight, int | float) and not isinstance(weight, bool)
            if not number or not math.isfinite(weight) or weight < 0:
                raise SettingsError(f"{setting}.{name}.{source}={weight}: weights are numbers >= 0")
        read[name] = {str(source): float(weight) for source, weight in table.items()}
    return read


class Objective(str, Enum):
    """What a stage minimises."""

    language = "language"  # next-token cross entropy on assistant turns
    contrastive = "contrastive"  # SigLIP loss between the vision tower and a text tower (Stage 0)


class LossWeighting(str, Enum):
    """What each labelled token of a sample with n of them weighs in the loss of the language objective."""

    per_token = "per_token"  # 1: long answers dominate
    per_sample = "per_sample"  # 1 / n: every answer counts alike
    square = "square"  # 1 / sqrt(n), "square averaging": between the two


class ActivationCheckpointing(str, Enum):
    """What the backward of a layer finds, and what it computes again. Losses and gradients are the same."""

    none = "none"  # every activation is kept
    selective = "selective"  # the input of each layer and the results of attention are kept
    full = "full"  # the input of each layer is kept


class ScheduleShape(str, Enum):
    """Shape of the learning rate after the linear warm-up."""

    cosine = "cosine"
    wsd = "wsd"  # warm-up, stable, decay (linear over the last ``decay_steps``)
    constant = "constant"


class Precision(str, Enum):
    """Arithmetic of forward and backward."""

    fp32 = "fp32"
    bf16 = "bf16"  # bf16 weights, fp32 master weights in the ZeRO optimizer
    bf16_autocast = "bf16_autocast"  # fp32 weights, bf16 matrix products


class MergeMethod(str, Enum):
    """How checkpoints are averaged."""

    uniform = "uniform"
    weighted = "weighted"
    lawa = "lawa"  # the mean of the last checkpoints of a run
    wma = "wma"  # weights 1, 2, ..., K along a trajectory
    ema = "ema"  # weights that decay into the past of a trajectory
    slerp = "slerp"  # along the arc between two models
    spherical = "spherical"  # the mean on the sphere of any number of models
    task_arithmetic = "task_arithmetic"  # base + weighted sum of the models' deltas to it
    ties = "ties"  # deltas trimmed, their signs elected, the agreeing ones averaged
    dare_linear = "dare_linear"  # deltas thinned at random and scaled up, then task arithmetic
    dare_ties = "dare_ties"  # the same, then TIES
    model_stock = "model_stock"  # from the mean towards the base, as far as the angles say
