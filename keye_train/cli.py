"""The commands: keye-train, keye-pipeline, keye-merge, keye-eval, keye-report, keye-convert.

All but the last two take Hydra overrides; this module only reads the command line, composes the recipe and calls the
part that works.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from keye_train import compose, runs
from keye_train.settings import (
    EvaluationSettings,
    MergeSettings,
    PipelineSettings,
    ResolutionSettings,
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
  keye-merge merge=ema models=[export-100,export-200,export-300] out=runs/merged       along one run, oldest first
  keye-merge models=[a,b] out=runs/merged '+modules={mlp_AR.*:[1.0,0.0]}'             the projector of a
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
CONVERT_HELP = """\
Weights in and out, a tensor at a time: no more than one file of the result is in memory.

  keye-convert start --siglip siglip-so400m-patch14-384 --qwen3 Qwen3-8B --tokenizer Keye-VL-8B-Preview --out runs/start
  keye-convert import Keye-VL-8B-Preview runs/published     the published checkpoint, for stages, merges, evaluation
  keye-convert export runs/demo/merge keye-vl               the published layout, with tokenizer and processor files
  keye-convert tower runs/demo/stage0 siglip                the vision tower (of Stage 0: both) as SigLIP
  keye-convert inspect runs/demo/merge/export               what a folder holds: modules, parameters, data types

All folders are local; `hf download NAME --local-dir FOLDER` fetches one. Only safetensors are read and no code of a
checkpoint is run. Each tensor of a source is used or listed as dropped in conversion.json; anything else stops the
command before the result exists.
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


def convert_main(argv: Sequence[str] | None = None) -> None:
    """``keye-convert``: weights in and out."""
    arguments = convert_parser().parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(message)s")
    _guarded("keye-convert", lambda: _convert(arguments))


def convert_parser() -> argparse.ArgumentParser:
    """The command line of ``keye-convert``."""
    parser = argparse.ArgumentParser(
        prog="keye-convert", description=CONVERT_HELP, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="start | import | export | tower | inspect")
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], help="of the result (default: as it is)")
    common.add_argument("--shard-gb", type=float, default=5.0, help="largest file in GB (default: %(default)s)")
    common.add_argument("--overwrite", action="store_true", help="replace a model that stands at the target")
    source: dict[str, Any] = {"type": Path, "metavar": "FOLDER"}

    start = commands.add_parser("start", parents=[common], help="Keye from SigLIP and Qwen3, the projector drawn")
    start.add_argument("--siglip", required=True, help="layout of google/siglip-so400m-patch14-384", **source)
    start.add_argument("--qwen3", required=True, help="layout of Qwen/Qwen3-8B, any size", **source)
    start.add_argument("--tokenizer", help="tokenizer and processor files of Keye (default: those of Qwen3)", **source)
    start.add_argument("--seed", type=int, default=0, help="of the projector (default: %(default)s)")
    start.add_argument(
        "--resolution",
        metavar="RECIPE",
        help="budgets of images and videos: a recipe of the group resolution, such as keye_v1 (default: those beside "
        "the tokenizer, or of the first report)",
    )
    start.add_argument("--untie", action="store_true", help="copy tied embeddings into an output matrix of its own")
    start.add_argument("--out", required=True, **source)

    come_in = commands.add_parser("import", parents=[common], help="the published layout into an export of ours")
    come_in.add_argument("source", **source)
    come_in.add_argument("out", type=Path)

    out = commands.add_parser("export", parents=[common], help="an export, or a run's, into the published layout")
    out.add_argument("source", **source)
    out.add_argument("out", type=Path)
    out.add_argument("--tokenizer", help="tokenizer and processor files (default: those of the export)", **source)
    out.add_argument(
        "--code",
        metavar="REPOSITORY",
        default="Kwai-Keye/Keye-VL-8B-Preview",
        help="where auto_map sends readers without a Keye of their own; none: no auto_map (default: %(default)s)",
    )

    tower = commands.add_parser("tower", parents=[common], help="the vision tower of an export as SigLIP")
    tower.add_argument("source", **source)
    tower.add_argument("out", type=Path)

    inspect = commands.add_parser("inspect", help="modules or tensors of a folder of safetensors")
    inspect.add_argument("source", **source)
    inspect.add_argument("--depth", type=int, default=3, help="parts of a name that make a module (default: 3)")
    inspect.add_argument("--tensors", action="store_true", help="every tensor with its shape and file")
    return parser


def _convert(arguments: argparse.Namespace) -> int:
    if arguments.command == "inspect":
        from keye_train.model.convert_inspect import describe

        export = arguments.source / runs.EXPORT
        folder = export if export.is_dir() else arguments.source
        print(describe(folder, arguments.depth, arguments.tensors))
        return 0
    import torch

    from keye_train.model import convert

    dtype = None if arguments.dtype is None else getattr(torch, arguments.dtype)
    options = convert.Options(dtype, int(arguments.shard_gb * 1e9), arguments.overwrite)
    if arguments.command == "start":
        result = convert.convert_start(
            arguments.siglip,
            arguments.qwen3,
            arguments.out,
            tokenizer=arguments.tokenizer,
            seed=arguments.seed,
            untie=arguments.untie,
            resolution=_resolution(arguments.resolution),
            options=options,
        )
    elif arguments.command == "import":
        result = convert.convert_import(arguments.source, arguments.out, options)
    elif arguments.command == "export":
        repository = None if arguments.code == "none" else arguments.code
        result = convert.convert_export(
            arguments.source, arguments.out, tokenizer=arguments.tokenizer, repository=repository, options=options
        )
    else:
        result = convert.convert_tower(arguments.source, arguments.out, options)
    print(f"{result.folder}: {result.tensors:,} tensors, {result.parameters:,} parameters")
    if result.dropped:
        shown = ", ".join(result.dropped[:4]) + (", ..." if len(result.dropped) > 4 else "")
        print(f"dropped on purpose: {len(result.dropped)} ({shown})")
    return 0


def _resolution(name: str | None) -> ResolutionSettings | None:
    return None if name is None else compose.load_resolution(name, compose.recipes_folder())


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
