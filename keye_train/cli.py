"""The commands: keye-train, keye-pipeline, keye-merge, keye-eval, keye-report.

Each takes Hydra overrides; this module only reads the command line, composes the recipe and calls the part that works.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

from keye_train import compose
from keye_train.settings import (
    EvaluationSettings,
    MergeSettings,
    PipelineSettings,
    TrainSettings,
)

T = TypeVar("T")

TRAIN_HELP = """\
Train one stage. Choose a recipe of each group, then change any value:

  keye-train stage=2_multitask model=tiny data=demo                       one process
  keye-train stage=1_align stage.optimizer.lr=2e-3 run_dir=runs/mine      other values
  torchrun --nproc-per-node 8 -m keye_train stage=2_multitask model=keye_8b data=... deepspeed=zero3
  deepspeed --num_gpus 8 --module keye_train stage=2_multitask ...

The same command continues an interrupted run. Ctrl-C finishes the step, saves a checkpoint and leaves.
"""
PIPELINE_HELP = """\
Run the whole chain of a pipeline recipe: stages, merge, evaluation, report. Finished parts are kept: run the same
command again to go on after an interruption.

  keye-pipeline pipeline=demo
  keye-pipeline pipeline=demo out=runs/other
"""
MERGE_HELP = """\
Average checkpoints, one tensor at a time, in fp32 or better.

  keye-merge models=[runs/demo/stage3_a,runs/demo/stage3_b] out=runs/merged
  keye-merge merge=weighted models=[a,b] weights=[0.7,0.3] out=runs/merged dtype=bfloat16
"""
EVAL_HELP = """\
Answer held-out samples and score them per task.

  keye-eval data=demo models=[runs/demo/merge] out=runs/demo/evaluation
  keye-eval data=demo models=[runs/a,runs/b] out=runs/compare samples_per_task=50
"""
REPORT_HELP = """\
Write one self-contained HTML page about a pipeline's folder or a single run.

  keye-report runs/demo
  keye-report runs/demo --out report.html
"""


def train_main(argv: Sequence[str] | None = None) -> None:
    """``keye-train``: one stage."""

    def work(settings: TrainSettings) -> int:
        from keye_train.training.trainer import train

        return train(settings) or 0

    _command(
        "keye-train", TRAIN_HELP, TrainSettings, "train", ("stage", "model", "data", "deepspeed", "logging"), work, argv
    )


def pipeline_main(argv: Sequence[str] | None = None) -> None:
    """``keye-pipeline``: the whole chain."""

    def work(settings: PipelineSettings) -> int:
        from keye_train.pipeline import run_pipeline

        return run_pipeline(settings)

    _command("keye-pipeline", PIPELINE_HELP, PipelineSettings, "pipeline", ("pipeline",), work, argv)


def merge_main(argv: Sequence[str] | None = None) -> None:
    """``keye-merge``: average checkpoints."""

    def work(settings: MergeSettings) -> int:
        from keye_train.merging import merge

        print(f"merged model: {merge(settings)}")
        return 0

    _command("keye-merge", MERGE_HELP, MergeSettings, "merge", ("merge",), work, argv)


def eval_main(argv: Sequence[str] | None = None) -> None:
    """``keye-eval``: scores on held-out samples."""

    def work(settings: EvaluationSettings) -> int:
        from keye_train.evaluation import evaluate

        print(f"results: {evaluate(settings)}")
        return 0

    _command("keye-eval", EVAL_HELP, EvaluationSettings, "eval", ("data",), work, argv)


def report_main(argv: Sequence[str] | None = None) -> None:
    """``keye-report``: one HTML page about a run or a pipeline."""
    parser = argparse.ArgumentParser(
        prog="keye-report", description=REPORT_HELP, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path, help="folder of a pipeline or of one run")
    parser.add_argument("--out", type=Path, default=None, help="file to write (default: RUN/report.html)")
    arguments = parser.parse_args(argv)
    from keye_train.report import write_report

    _guarded(
        "keye-report",
        lambda: _print_report(write_report(arguments.run, arguments.out or arguments.run / "report.html")),
    )


def _print_report(page: Path) -> int:
    print(f"report: {page}")
    return 0


def _command(
    name: str,
    text: str,
    schema: type[T],
    primary: str,
    groups: Sequence[str],
    work: Callable[[T], int],
    argv: Sequence[str] | None,
) -> None:
    """Read the command line, compose the recipe, do the work, leave with its exit code."""
    recipes = compose.recipes_folder()
    listed = "\n".join(f"  {group + '=':<12}{' | '.join(compose.choices(group, recipes))}" for group in groups)
    parser = argparse.ArgumentParser(
        prog=name,
        description=text,
        epilog=f"Recipes to choose from:\n{listed}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="choice of a recipe or a value to change")
    parser.add_argument(
        "--recipes", default=recipes, metavar="DIR", help="another recipes folder (or set KEYE_RECIPES)"
    )
    parser.add_argument("--show", action="store_true", help="print the resolved recipe and leave")
    # The deepspeed launcher adds this to every rank's command line; the rank comes from the environment.
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    logging.basicConfig(
        level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s", datefmt="%H:%M:%S"
    )

    def composed() -> int:
        if arguments.recipes is not None:  # the processes that a pipeline starts read the same recipes
            os.environ[compose.RECIPES_VARIABLE] = str(Path(arguments.recipes).resolve())
        settings = compose.load_settings(schema, primary, arguments.overrides, arguments.recipes)
        if arguments.show:
            print(compose.to_yaml(settings), end="")
            return 0
        return work(settings)

    _guarded(name, composed)


def _guarded(name: str, work: Callable[[], int]) -> None:
    """Run ``work``; what the user can mend becomes one line, everything else keeps its traceback.

    By the convention of this package ValueError and FileNotFoundError are about input: a recipe, data, a checkpoint.
    KEYE_TRACEBACK=1 shows where they came from.
    """
    try:
        sys.exit(work())
    except (ValueError, FileNotFoundError) as error:
        if os.environ.get("KEYE_TRACEBACK"):
            raise
        print(f"{name}: error: {error}", file=sys.stderr)
        sys.exit(2)
