"""What a run tells about itself while it trains: logs, and losses on held-out samples."""

from __future__ import annotations

from dataclasses import dataclass

from keye_train.settings.basics import Objective, SettingsError
from keye_train.settings.data import DataSettings


@dataclass
class LoggingSettings:
    """Where the numbers of each step go. metrics.jsonl is always written."""

    every_steps: int = 1
    progress: bool = True
    """A line with the time left on rank 0's terminal; where there is none, a log line now and then."""
    tensorboard: bool = True
    wandb: bool = False
    wandb_project: str = "keye_train"
    peak_tflops: float | None = None
    """What one device can do at most, in TFLOP/s of matrix products in the run's precision: MFU is a share of it. null:
    from the name of the GPU; of a CPU, or a GPU that is not known, what a bare matrix product reaches at the start."""


@dataclass
class TrainEvaluationSettings:
    """Losses on held-out samples while a run trains. They change nothing in what it trains, and may be changed in a
    run that is resumed."""

    every_steps: int = 0
    """And at the last step; 0: never."""
    sets: list[str] | None = None
    """Names in ``data.heldout``; null: all of them. Stage 0 reads ``data.heldout_pairs`` instead."""
    max_samples: int = 64
    """Of each set, over all ranks: drawn with ``seed``, decoded at the start and kept in host memory."""


def check_train_evaluation(evaluation: TrainEvaluationSettings, objective: Objective, data: DataSettings) -> None:
    """Raise SettingsError for values that cannot work together."""
    if evaluation.every_steps < 0 or evaluation.max_samples < 1:
        raise SettingsError("evaluation.every_steps is at least 0 (never), evaluation.max_samples at least 1")
    if evaluation.every_steps == 0:
        if evaluation.sets is not None:
            raise SettingsError("evaluation.sets has no effect with evaluation.every_steps=0: set both or neither")
        return
    if objective == Objective.contrastive:
        if evaluation.sets is not None:
            raise SettingsError("evaluation.sets has no effect in Stage 0, which reads data.heldout_pairs: drop it")
        if data.heldout_pairs is None:
            raise SettingsError(
                f"evaluation.every_steps={evaluation.every_steps}: data={data.name} has no data.heldout_pairs; name "
                "shards there, or set evaluation.every_steps=0"
            )
        return
    if not (data.heldout if evaluation.sets is None else evaluation.sets):
        raise SettingsError(
            f"evaluation.every_steps={evaluation.every_steps}, and no held-out set to read: name shards in "
            f"data.heldout of data={data.name} and sets in evaluation.sets, or set evaluation.every_steps=0"
        )
    for name in evaluation.sets or ():
        if name not in data.heldout:
            raise SettingsError(f"evaluation.sets: '{name}' is not in data.heldout; sets: {sorted(data.heldout)}")


def check_logging(logging: LoggingSettings) -> None:
    """Raise SettingsError for values that cannot work together."""
    if logging.every_steps < 1:
        raise SettingsError("logging.every_steps must be at least 1")
    if logging.peak_tflops is not None and not logging.peak_tflops > 0:
        raise SettingsError(f"logging.peak_tflops={logging.peak_tflops} must be above 0, or null")
