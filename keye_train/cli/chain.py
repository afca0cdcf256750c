"""``keye-pipeline``, ``keye-merge``, ``keye-eval`` and ``keye-report``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from keye_train.cli import soups
from keye_train.cli.common import recipe_command
from keye_train.command import guarded
from keye_train.settings import EvaluationSettings, MergeSettings, PipelineSettings
from keye_train.settings.merge_methods import method_table
from keye_train.settings.merging import ALLOWED_DIFFERENCES

PIPELINE_HELP = """\
Run the whole chain of a pipeline recipe: stages, merge, evaluation, report. Finished parts are kept: run the same
command again to go on after an interruption.

  keye-pipeline pipeline=demo
  keye-pipeline pipeline=demo out=runs/other
"""
MERGE_HELP = """\
Average models, a piece of a tensor at a time: float64 sums, rounded once. As many threads run as
fit in 512 MiB, whatever the size of the models; from about 400 models (75 with a base) on, one thread takes more.

  keye-merge models=[runs/demo/stage3_anneal_a,runs/demo/stage3_anneal_b] out=runs/merged
  keye-merge merge=weighted models=[a,b] weights=[0.7,0.3] out=runs/merged dtype=bfloat16
  keye-merge merge=lawa models=[runs/mine] last=5 out=runs/merged            the last 5 checkpoints of a run
  keye-merge merge=ties models=[ocr,math] weights=[1,1] base=start out=runs/merged
  keye-merge models=[a,b] out=runs/merged '+modules={{mlp_AR.*:[1,0]}}'    the projector of a, the mean of the rest

A model is a run folder, an export, RUN/checkpoints/step-N, or any folder of safetensors in Hugging Face's layout. The
same command goes on after an interruption. SHA-256 of all inputs and outputs stands in the manifest of the result.

Methods: x_i is a tensor of model i of K, b the base's, w_i weights; each tensor by itself.

{methods}

Models that differ are refused, with every difference. Allow some by kind: --allow=missing,dtype (or allow=[...]):

{differences}

Before and around it (each has its own --help):

  keye-merge verify runs/merged              checksums, tensors, values and parents against the manifest
  keye-merge diagnose models=[a,b] base=parent out=runs/diagnosis        are these siblings in one basin?
  keye-merge curve data=demo models=[a,b] out=runs/curve                 held-out loss along the line between two
  keye-merge search data=demo models=[a,b,c] out=runs/soup               greedy soup and weights by held-out loss
"""
EVAL_HELP = """\
Answer held-out samples and score them per task.

  keye-eval data=demo models=[runs/demo/merge] out=runs/demo/evaluation
  keye-eval data=demo models=[runs/a,runs/b] out=runs/compare samples_per_task=50
  keye-eval data=demo models=[runs/a/checkpoints/step-400] out=runs/early

A model is a run folder, an export or a checkpoint of a run; of a checkpoint an export lies below out meanwhile.
Samples are those of data.heldout; their JSON has the expected "answer" and how it is scored (docs/data.md, "Held-out
samples").
"""
REPORT_HELP = """\
Write one self-contained HTML page about a pipeline's folder or a single run.

  keye-report runs/demo
  keye-report runs/demo --out report.html
"""


def pipeline_main(argv: Sequence[str] | None = None) -> None:
    """``keye-pipeline``: the whole chain."""

    def work(settings: PipelineSettings) -> int:
        from keye_train.pipeline import run_pipeline

        return run_pipeline(settings)

    groups = ("pipeline",)
    recipe_command(
        "keye-pipeline", PIPELINE_HELP, PipelineSettings, "pipeline", groups, work, argv, ask_for="pipeline=..."
    )


def merge_main(argv: Sequence[str] | None = None) -> None:
    """``keye-merge``: average checkpoints; its first word may be another command about averages."""
    words = list(sys.argv[1:] if argv is None else argv)
    if words[:1] == ["verify"]:
        _verify_command(words[1:])
        return
    if words and words[0] in soups.COMMANDS:
        command = soups.COMMANDS[words[0]]
        name = f"keye-merge {words[0]}"
        recipe_command(name, command.text, command.schema, words[0], command.groups, command.work, words[1:])
        return

    def work(settings: MergeSettings) -> int:
        from keye_train.merging import merge

        print(f"merged model: {merge(settings)}")
        return 0

    allowed = "--allow="
    words = [f"allow=[{word.removeprefix(allowed)}]" if word.startswith(allowed) else word for word in words]
    commands = ("verify", *soups.COMMANDS)
    recipe_command("keye-merge", merge_help(), MergeSettings, "merge", ("merge",), work, words, commands)


def merge_help() -> str:
    """The text of ``keye-merge --help``, with the table of methods."""
    differences = "\n".join(f"  {name:<12}{text}" for name, text in ALLOWED_DIFFERENCES.items())
    return MERGE_HELP.format(methods=method_table(), differences=differences)


def verify_parser() -> argparse.ArgumentParser:
    """The command line of ``keye-merge verify``."""
    parser = argparse.ArgumentParser(
        prog="keye-merge verify", description="Check a merged model against its manifest; exit code 1 for any fault."
    )
    parser.add_argument("out", type=Path, help="folder that keye-merge wrote")
    return parser


def _verify_command(words: Sequence[str]) -> None:
    arguments = verify_parser().parse_args(words)

    def work() -> int:
        from keye_train.merging.verify import verify

        verdict = verify(arguments.out)
        for word, lines in (("ok", verdict.checked), ("not checked", verdict.unchecked), ("FAULT", verdict.faults)):
            for line in lines:
                print(f"{word}: {line}")
        return 1 if verdict.faults else 0

    guarded("keye-merge verify", work)


def eval_main(argv: Sequence[str] | None = None) -> None:
    """``keye-eval``: scores on held-out samples."""

    def work(settings: EvaluationSettings) -> int:
        from keye_train.evaluation import evaluate

        print(f"results: {evaluate(settings)}")
        return 0

    recipe_command("keye-eval", EVAL_HELP, EvaluationSettings, "eval", ("data",), work, argv)


def report_main(argv: Sequence[str] | None = None) -> None:
    """``keye-report``: one HTML page about a run or a pipeline."""
    parser = argparse.ArgumentParser(
        prog="keye-report", description=REPORT_HELP, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path, help="folder of a pipeline or of one run")
    parser.add_argument("--out", type=Path, default=None, help="file to write (default: RUN/report.html)")
    arguments = parser.parse_args(argv)

    def work() -> int:
        from keye_train.report.page import write_report

        print(f"report: {write_report(arguments.run, arguments.out or arguments.run / 'report.html')}")
        return 0

    guarded("keye-report", work)
