"""When the state of a training is saved, and which of these checkpoints stay."""

from __future__ import annotations

from dataclasses import dataclass

from keye_train.settings.basics import SettingsError


@dataclass
class CheckpointSettings:
    """When the state of the training is saved."""

    every_steps: int = 500
    keep: int = 2
    """Newest checkpoints kept; older ones are deleted once a newer one is whole, unless marked."""
    mark_every_steps: int = 0
    """Checkpoints of these steps are never deleted, a multiple of every_steps; 0: none. ``touch step-N/KEEP`` marks one
    by hand."""
    background: bool = True
    """Copy the state into host memory and write it while training goes on; false: write it first. The copy costs 12
    bytes of host memory for each trained parameter over all ranks, 16 with optimizer.ema_decay."""


def check_checkpoint(settings: CheckpointSettings) -> None:
    """Raise SettingsError for values that cannot work together."""
    if settings.every_steps < 1 or settings.keep < 1:
        raise SettingsError("checkpoint.every_steps and checkpoint.keep must be at least 1")
    if settings.mark_every_steps < 0 or settings.mark_every_steps % settings.every_steps:
        raise SettingsError(
            f"checkpoint.mark_every_steps={settings.mark_every_steps} is no multiple of checkpoint.every_steps="
            f"{settings.every_steps}, when checkpoints are saved: use one, or 0 to mark none"
        )
