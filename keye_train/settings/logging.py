"""What a run tells about itself while it trains: logs, and losses on held-out samples."""

from __future__ import annotations

from dataclasses import dataclass

from keye_train.settings.basics import SettingsError


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


def check_logging(logging: LoggingSettings) -> None:
    """Raise SettingsError for values that cannot work together."""
    if logging.every_steps < 1:
        raise SettingsError("logging.every_steps must be at least 1")
    if logging.peak_tflops is not None and not logging.peak_tflops > 0:
        raise SettingsError(f"logging.peak_tflops={logging.peak_tflops} must be above 0, or null")
