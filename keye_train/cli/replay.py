"""``keye-train replay``."""

from __future__ import annotations

from collections.abc import Sequence

from keye_train.cli.common import recipe_command
from keye_train.settings import ReplaySettings

HELP = """\
Do one step of a run once more, in one process: from the newest whole checkpoint before it, training the steps between
again, up to its loss. Nothing is written into the run.

  keye-train replay run=runs/mine step=120
  keye-train replay run=runs/mine step=120 samples=50 out=step-120.json

Prints the loss beside the recorded one, the loss of each source, and the samples of the highest loss. A run of one
process is met exactly, one of several up to the rounding of its precision: a relative difference below 1e-5 in fp32,
below 2e-2 in bf16, more after many steps since the checkpoint. A contrastive step (Stage 0) of several ranks is
refused: its loss depends on the pairs of all ranks.
"""


def main(argv: Sequence[str]) -> None:
    """Entry point."""

    def work(settings: ReplaySettings) -> int:
        from keye_train.training.replay import describe, replay

        print(describe(replay(settings), settings.samples), end="")
        return 0

    recipe_command("keye-train replay", HELP, ReplaySettings, "replay", (), work, argv)
