"""When the state of a training is saved, and which of these checkpoints stay."""

from __future__ import annotations

from dataclasses import dataclass

from keye_train.settings.basics import SettingsError


@dataclass
class CheckpointSettings:
    """When the state of the training is saved."""

    every_steps: int = 500
    keep: int = 2
    """Newest checkpoints kept; older ones are deleted once a newer one is whole."""


def check_checkpoint(settings: CheckpointSettings) -> None:
    """Raise SettingsError for values that cannot work together."""
    if settings.every_steps < 1 or settings.keep < 1:
        raise SettingsError("checkpoint.every_steps and checkpoint.keep must be at least 1")
