"""What the commands share: a command line of recipe overrides."""

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
from keye_train.command import WRONG_USE, guarded
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
    ask_for: str = "",
) -> None:
    """Read the command line, compose the recipe, do the work, leave with its exit code.

    Args:
        name: of the command.
        text: of its help.
        schema: of the settings.
        primary: name of the primary recipe.
        groups: of recipes, for the help.
        work: returns the exit code.
        argv: words behind the name; None: those of this process.
        commands: words that could have stood first, for the user who mistypes one.
        ask_for: a word such as ``stage=...``. With it, a command line without any choice starts nothing: hours of
            work should not begin because somebody wanted to see what a command does.
    """
    parser = _parser(name, text, groups, argv)
    arguments = parser.parse_args(argv)
    if ask_for and not (arguments.overrides or arguments.show or arguments.recipes != compose.recipes_folder()):
        parser.print_help(sys.stderr)
        parser.exit(WRONG_USE, f"\n{name}: error: nothing is chosen: give {ask_for}; --show prints the defaults\n")
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


def _parser(name: str, text: str, groups: Sequence[str], argv: Sequence[str] | None) -> argparse.ArgumentParser:
    where = argparse.ArgumentParser(add_help=False)
    where.add_argument(
        "--recipes",
        default=compose.recipes_folder(),
        metavar="DIR",
        help="another recipes folder (or set KEYE_RECIPES)",
    )
    recipes = where.parse_known_args(argv)[0].recipes  # for the help, which lists what stands there
    listed = "\n".join(f"  {group + '=':<12}{' | '.join(compose.choices(group, recipes))}" for group in groups)
    parser = argparse.ArgumentParser(
        prog=name,
        description=text,
        epilog=f"Recipes to choose from:\n{listed}" if groups else None,
        parents=[where],
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="choice of a recipe or a value to change")
    parser.add_argument("--show", action="store_true", help="print the resolved recipe and leave")
    # The deepspeed launcher adds this to every rank's command line; the rank comes from the environment.
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)
    return parser


def _refuse_mistyped(name: str, first: Sequence[str], commands: Iterable[str]) -> None:
    """Raise SettingsError for a first word that was meant to be a command."""
    for word in first:
        close = difflib.get_close_matches(word, list(commands), n=1)
        if close and "=" not in word and not word.startswith("~"):  # ~KEY removes a value
            raise SettingsError(f"'{word}' is no KEY=VALUE; did you mean '{name} {close[0]}'?")
