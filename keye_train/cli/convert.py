"""``keye-convert``: weights in and out."""

from __future__ import annotations

import argparse
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from keye_train import compose, runs
from keye_train.command import guarded
from keye_train.settings import ResolutionSettings

CONVERT_HELP = """\
Weights in and out, a tensor at a time: no more than one file of the result is in memory.

  keye-convert start --siglip siglip-so400m-patch14-384 --qwen3 Qwen3-8B --tokenizer Keye-VL-8B-Preview --out runs/start
  keye-convert import Keye-VL-8B-Preview runs/published     the published checkpoint, for stages, merges, evaluation
  keye-convert export runs/demo/merge keye-vl               the published layout, with tokenizer and processor files
  keye-convert export runs/demo/stage2/checkpoints/step-200 runs/at-200    what the run would export at that step
  keye-convert tower runs/demo/stage0 siglip                the vision tower (of Stage 0: both) as SigLIP
  keye-convert inspect runs/demo/merge/export               what a folder holds: modules, parameters, data types

All folders are local; `hf download NAME --local-dir FOLDER` fetches one. Only safetensors are read and no code of a
checkpoint is run. Each tensor of a source is used or listed as dropped in conversion.json; anything else stops the
command before the result exists.
"""


def convert_main(argv: Sequence[str] | None = None) -> None:
    """``keye-convert``: weights in and out."""
    arguments = convert_parser().parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(message)s")
    guarded("keye-convert", lambda: _convert(arguments))


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

    out = commands.add_parser(
        "export", parents=[common], help="an export, or a run's, into the published layout; a checkpoint into an export"
    )
    out.add_argument("source", **source)
    out.add_argument("out", type=Path)
    out.add_argument("--tokenizer", help="tokenizer and processor files (default: those of the export)", **source)
    out.add_argument(
        "--code",
        metavar="REPOSITORY",
        help="where auto_map sends readers without a Keye of their own; none: no auto_map (default: "
        "Kwai-Keye/Keye-VL-8B-Preview)",
    )
    out.add_argument("--average", action="store_true", help="of a checkpoint, the moving average of the weights")

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

    from keye_train.checkpoints.layout import COMPLETE
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
    elif arguments.command == "export" and (arguments.source / COMPLETE).exists():
        if arguments.tokenizer is not None or arguments.code is not None:
            raise ValueError(
                f"{arguments.source} is a checkpoint, exported as its run would: --tokenizer and --code go with "
                "a second call, on that export"
            )
        result = convert.convert_checkpoint(arguments.source, arguments.out, average=arguments.average, options=options)
    elif arguments.command == "export":
        if arguments.average:
            raise ValueError(f"--average is for a checkpoint; of a run, name {runs.EXPORT_EMA} in {arguments.source}")
        code = convert.PUBLISHED_REPOSITORY if arguments.code is None else arguments.code
        repository = None if code == "none" else code
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
