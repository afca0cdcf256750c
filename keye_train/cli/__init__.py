"""The commands: keye-train, keye-pipeline, keye-merge, keye-eval, keye-report, keye-convert.

These modules only read the command line, compose the recipe and call the part that works. All but the last two commands
take Hydra overrides; ``keye-train`` also has commands about runs (``train.COMMANDS``).
"""

from keye_train.cli.chain import eval_main, merge_main, pipeline_main, report_main
from keye_train.cli.convert import convert_main, convert_parser
from keye_train.cli.train import train_main

__all__ = [
    "convert_main",
    "convert_parser",
    "eval_main",
    "merge_main",
    "pipeline_main",
    "report_main",
    "train_main",
]
