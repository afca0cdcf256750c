"""``keye-train``: one stage, and the commands about runs that stand beside it."""

from __future__ import annotations

import gc
import sys
from collections.abc import Sequence
from importlib import import_module

from keye_train.cli.common import recipe_command
from keye_train.settings import TrainSettings

COMMANDS: dict[str, str] = {
    "plan": "what a run will take: memory, time, traffic",
    "diff": "what two runs have in common, and what not",
    "replay": "one step of a run once more, with the loss of each sample",
}
"""First word behind ``keye-train`` that is no override -> what it does. Its module in this folder, of the same name,
has a function ``main(argv)``."""

TRAIN_HELP = """\
Train one stage. Choose a recipe of each group, then change any value:

  keye-train stage=2_multitask model=tiny data=demo                       one process
  keye-train stage=1_align stage.optimizer.lr=2e-3 run_dir=runs/mine      other values
  torchrun --nproc-per-node 8 -m keye_train stage=2_multitask model=keye_8b data=... deepspeed=zero3
  deepspeed --num_gpus 8 --module keye_train stage=2_multitask ...

The same command continues an interrupted run. Ctrl-C finishes the step, saves a checkpoint and leaves.
"""


def train_main(argv: Sequence[str] | None = None) -> None:
    """``keye-train``: one stage, or where the first word names one, a command of ``COMMANDS``."""
    words = list(sys.argv[1:] if argv is None else argv)
    if words and words[0] in COMMANDS:
        import_module(f"keye_train.cli.{words[0]}").main(words[1:])
        return

    def work(settings: TrainSettings) -> int:
        from keye_train.training.trainer import train

        gc.freeze()  # what is imported stays: no collection walks through it again, which takes 0.3 s
        return train(settings) or 0

    text = TRAIN_HELP
    if COMMANDS:
        listed = "".join(f"  keye-train {name:<8}{purpose}\n" for name, purpose in COMMANDS.items())
        text += f"\nCommands about runs, each with a --help of its own:\n\n{listed}"
    groups = ("stage", "model", "data", "deepspeed", "logging", "guards")
    recipe_command("keye-train", text, TrainSettings, "train", groups, work, words, COMMANDS, ask_for="stage=...")
