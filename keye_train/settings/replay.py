"""``keye-train replay``: one step of a run once more."""

from __future__ import annotations

from dataclasses import dataclass

from keye_train.settings.basics import SettingsError


@dataclass
class ReplaySettings:
    """Which step of which run."""

    run: str
    """Folder of the run. Nothing is written there."""
    step: int
    """As in metrics.jsonl, from 1."""
    samples: int = 20
    """How many samples are listed, those of the highest loss first."""
    out: str | None = None
    """JSON file for the figures of all samples; null: none."""

    def check(self) -> None:
        """Raise SettingsError for values that cannot work."""
        if self.step < 1 or self.samples < 0:
            raise SettingsError("step is at least 1 and samples at least 0")
