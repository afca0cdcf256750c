"""What the commands share: a command line of recipe overrides, and errors in one line."""

from __future__ import annotations

import argparse
import difflib
import logging
import os
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TypeVar

from keye_train import compose
from keye_train.settings import SettingsError

T = TypeVar("T")


def recipe_command(
    name: str,
    text: str,
    schema: type[T],
    primary: str,
    groups: Sequence[str],
    work: Callable[[T], int],
    argv: Sequence[str] | None,
    commands: Iterable[str] = (),
) -> None:
    """Read the command line, compose the recipe, do the work, leave with its exit code.

    ``commands``: words that could have stood first, for the user who mistypes one.
    """
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
        _refuse_mistyped(name, arguments.overrides[:1], commands)
        if arguments.recipes is not None:  # the processes that a pipeline starts read the same recipes
            os.environ[compose.RECIPES_VARIABLE] = str(Path(arguments.recipes).resolve())
        settings = compose.load_settings(schema, primary, arguments.overrides, arguments.recipes)
        if arguments.show:
            print(compose.to_yaml(settings), end="")
            return 0
        return work(settings)

    guarded(name, composed)


def _refuse_mistyped(name: str, first: Sequence[str], commands: Iterable[str]) -> None:
    """Raise SettingsError for a first word that was meant to be a command."""
    for word in first:
        close = difflib.get_close_matches(word, list(commands), n=1)
        if close and "=" not in word and not word.startswith("~"):  # ~KEY removes a value
            raise SettingsError(f"'{word}' is no KEY=VALUE; did you mean '{name} {close[0]}'?")


def guarded(name: str, work: Callable[[], int]) -> None:
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
