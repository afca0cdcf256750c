"""``keye-train diff``: two runs beside each other."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from keye_train.command import guarded

HELP = """\
What two runs have in common, and what not: recipes, data, code, results, speed.

  keye-train diff runs/a runs/b
  keye-train diff runs/a runs/b --json

Leaves with 0 where nothing but the speed differs, with 1 where something does, with 2 on an error.
"""
PLAIN_WIDTH = 160  # columns where the output is no terminal


def main(argv: Sequence[str]) -> None:
    """Compare, print, leave."""
    arguments = parser().parse_args(argv)

    def work() -> int:
        from rich.console import Console

        from keye_train.report.difference import compare_runs, print_comparison

        comparison = compare_runs(arguments.run_a, arguments.run_b)
        if arguments.json:
            print(json.dumps(comparison.to_json(), indent=2, ensure_ascii=False))
        else:
            print_comparison(comparison, Console(width=None if sys.stdout.isatty() else PLAIN_WIDTH, markup=False))
        return 0 if comparison.same else 1

    guarded("keye-train diff", work)


def parser() -> argparse.ArgumentParser:
    """The command line."""
    built = argparse.ArgumentParser(
        prog="keye-train diff", description=HELP, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    built.add_argument("run_a", type=Path, help="folder of a run")
    built.add_argument("run_b", type=Path, help="folder of another")
    built.add_argument("--json", action="store_true", help="as JSON")
    return built
