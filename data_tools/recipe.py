"""Commands that take a training recipe: ``keye-data plan`` and ``keye-data view``.

Their words are KEY=VALUE. Keys of the command's own options go to it, all others compose the recipe as ``keye-train``
does, so a command line of a training can be looked at before it runs.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import fields
from typing import Any, TypeVar

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from keye_train import compose
from keye_train.settings import SettingsError, TrainSettings

T = TypeVar("T")

# No weights are read here, so a model without any must not stop us; a value of the command line still wins.
_DEFAULTS = ("model.start.random=true",)


def add_recipe_words(parser: argparse.ArgumentParser) -> None:
    """Add the positional KEY=VALUE words and ``--recipes``."""
    parser.add_argument("words", nargs="*", metavar="KEY=VALUE", help="options of this command, and recipe overrides")
    parser.add_argument("--recipes", default=compose.recipes_folder(), metavar="DIR", help="another recipes folder")


def read_recipe(words: Sequence[str], options: type[T], recipes: str | None = None) -> tuple[TrainSettings, T]:
    """Split the words into the recipe and the command's own options.

    Args:
        words: KEY=VALUE.
        options: dataclass of the command's own keys; its ``check``, where it has one, is called. Its lists are of
            strings, which are taken as written: a key such as 000000012 is no number.
        recipes: another recipes folder.

    Raises:
        SettingsError: an unknown key, a wrong type, or values that cannot work together.
    """
    lists = {field.name: field.default_factory is list for field in fields(options)}  # type: ignore[arg-type]
    own = [word for word in words if word.partition("=")[0] in lists]
    overrides = [word for word in words if word not in own]
    values: dict[str, Any] = {}
    for word in own:
        name, _, value = word.partition("=")
        if not value:
            raise SettingsError(f"'{word}' has no value: write {name}=VALUE, or leave it out")
        if lists[name]:
            values[name] = [item.strip(" '\"") for item in value.strip("[]").split(",") if item.strip()]
        else:
            values |= _parsed(word)
    chosen = compose.to_settings(options, values)
    return compose.load_settings(TrainSettings, "train", [*_DEFAULTS, *overrides], recipes), chosen


def _parsed(word: str) -> dict[str, Any]:
    try:
        return dict(OmegaConf.to_container(OmegaConf.from_dotlist([word])))  # type: ignore[arg-type]
    except (OmegaConfBaseException, ValueError) as error:
        raise SettingsError(f"{word}: {error}") from error
