"""From recipes and command-line overrides to typed settings.

``recipes/`` holds one primary recipe per command (train, merge, eval, pipeline, ...) and the groups they choose from.
Hydra composes them; the result is checked against the dataclasses of ``keye_train.settings``: unknown keys and wrong
types stop here with the key named.
"""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml
from hydra import compose, initialize_config_dir, initialize_config_module
from hydra.core.config_store import ConfigStore
from hydra.errors import ConfigCompositionException, HydraException, MissingConfigException, OverrideParseException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from keye_train.settings import (
    CurveSettings,
    DiagnosisSettings,
    EvaluationSettings,
    ForecastSettings,
    MergeSettings,
    PipelineSettings,
    ReplaySettings,
    ResolutionSettings,
    SettingsError,
    SoupSettings,
    TrainSettings,
)

T = TypeVar("T")

RECIPES_VARIABLE = "KEYE_RECIPES"

# Each primary recipe starts from its schema, so that every key of the dataclasses can be overridden without "+",
# and a wrong one is refused while composing.
_SCHEMAS = {
    "train": TrainSettings,
    "replay": ReplaySettings,
    "merge": MergeSettings,
    "diagnose": DiagnosisSettings,
    "curve": CurveSettings,
    "search": SoupSettings,
    "forecast": ForecastSettings,
    "eval": EvaluationSettings,
    "pipeline": PipelineSettings,
}
for _name, _schema in _SCHEMAS.items():
    ConfigStore.instance().store(name=f"{_name}_schema", node=_schema)


def compose_recipe(primary: str, overrides: Sequence[str], recipes: str | None = None) -> DictConfig:
    """Compose the primary recipe ``primary`` with Hydra overrides such as ``stage=1_align`` or ``seed=3``.

    Args:
        primary: name of a file in the recipes folder, without ``.yaml``.
        overrides: Hydra override expressions.
        recipes: another recipes folder; None takes the one that is installed with the package.

    Raises:
        SettingsError: an override names a key, group or value that does not exist.
    """
    if recipes is not None and not Path(recipes).is_dir():
        raise SettingsError(f"recipes folder {recipes} does not exist")
    context = (
        initialize_config_dir(str(Path(recipes).resolve()), version_base="1.3")
        if recipes is not None
        else initialize_config_module("recipes", version_base="1.3")
    )
    try:
        with context:
            return compose(primary, overrides=list(overrides))
    except (HydraException, OmegaConfBaseException, ValueError) as error:  # ValueError: stage=9 and the like
        if isinstance(error, ValueError) and not isinstance(error, OmegaConfBaseException):
            raise SettingsError(f"{' '.join(overrides)}: {error}; recipes have names, see --help") from error
        raise SettingsError(_readable(error)) from error


def load_settings(schema: type[T], primary: str, overrides: Sequence[str], recipes: str | None = None) -> T:
    """Compose a recipe and turn it into ``schema``, checked.

    Raises:
        SettingsError: unknown key, wrong type, missing value, or a pair of values that cannot work together.
    """
    composed = compose_recipe(primary, overrides, recipes)
    return to_settings(schema, OmegaConf.to_container(composed, resolve=False))


def load_resolution(name: str, recipes: str | None = None) -> ResolutionSettings:
    """The budgets of a recipe of the group ``resolution``.

    Raises:
        SettingsError: there is no such recipe, or it is none.
    """
    known = choices("resolution", recipes)
    if name not in known:
        raise SettingsError(f"resolution={name}: there is no such recipe; choose one of {', '.join(known)}")
    folder = Path(recipes) if recipes is not None else _installed_recipes()
    return to_settings(ResolutionSettings, OmegaConf.load(folder / "resolution" / f"{name}.yaml"))


def to_settings(schema: type[T], values: Any) -> T:
    """Turn plain values (of a recipe or of a stored ``recipe.yaml``) into the dataclass ``schema``, checked.

    Raises:
        SettingsError: as for :func:`load_settings`.
    """
    try:
        merged = OmegaConf.merge(OmegaConf.structured(schema), OmegaConf.create(values))
        OmegaConf.resolve(merged)
        settings = OmegaConf.to_object(merged)
    except OmegaConfBaseException as error:
        raise SettingsError(_readable(error)) from error
    assert isinstance(settings, schema)
    check = getattr(settings, "check", None)
    if check is not None:
        check()
    return settings


def stored_values(path: Path) -> Any:
    """Plain values of a stored ``recipe.yaml``.

    Raises:
        SettingsError: it is damaged.
    """
    try:
        return OmegaConf.to_container(OmegaConf.load(path))
    except (yaml.YAMLError, OmegaConfBaseException, OSError, UnicodeDecodeError) as error:
        raise SettingsError(f"{path} cannot be read ({error}): restore it") from error


def stored_settings(schema: type[T], path: Path) -> T:
    """Inverse of :func:`to_yaml`, from a file.

    Raises:
        SettingsError: it is damaged, or has keys or values that this version does not know; the message names it.
    """
    values = stored_values(path)
    try:
        return to_settings(schema, values)
    except SettingsError as error:
        raise SettingsError(f"{path}: {error}") from error


def to_yaml(settings: Any) -> str:
    """The settings as YAML, every value resolved; :func:`to_settings` reads it back."""
    return OmegaConf.to_yaml(OmegaConf.structured(settings), resolve=True)


def choices(group: str, recipes: str | None = None) -> list[str]:
    """Names of the recipes in a group."""
    root = Path(recipes) if recipes is not None else _installed_recipes()
    return sorted(path.stem for path in (root / group).glob("*.yaml"))


def recipes_folder() -> str | None:
    """The recipes folder named by the environment (``KEYE_RECIPES``), if any."""
    return os.environ.get(RECIPES_VARIABLE)


def _installed_recipes() -> Path:
    import recipes as package

    assert package.__file__ is not None
    return Path(package.__file__).parent


def _head(error: BaseException) -> str:
    """The first line of what an error says; where that only announces the next one, both."""
    lines = str(error).split("\n")
    return " ".join(line.strip() for line in lines[: 2 if lines[0].endswith(":") else 1])


def _readable(error: Exception) -> str:
    """One line: what is wrong, at which key, and what a mistyped key was probably meant to be."""
    cause: BaseException = error
    while cause.__cause__ is not None and isinstance(cause, ConfigCompositionException):
        cause = cause.__cause__
    parts = [_head(error)]
    if cause is not error:
        parts.append(_head(cause))
    text = re.sub(r" To append to your \w+( \w+)? use \+\S+", "", ": ".join(parts))
    if isinstance(error, OverrideParseException):
        return (
            f"{error.override}: an override reads KEY=VALUE, as in stage=2_multitask or stage.steps=100; a value with "
            f"spaces or signs needs quotes of its own, as in 'data.sources.web.filter=\"images == 1\"' ({text})"
        )
    if isinstance(error, MissingConfigException) and error.options:
        return f"{text}; there are: {', '.join(sorted(error.options))}"
    full_key = getattr(cause, "full_key", None)
    missing = re.search(r"missing mandatory value: (\S+)", text, flags=re.IGNORECASE)
    if missing is not None:
        key = full_key or missing.group(1)
        return f"{key} has no value: set {key}=..."
    entry = re.search(rf"override \+*(([\w.]+)\.{re.escape(str(full_key))})\b.*dict is not a subclass", text)
    if entry is not None:
        key, group = entry.groups()
        whole = f"'+{group}={{{full_key}:{{KEY:VALUE,...}}}}'"
        return f"{key} is a new entry: write it with its group, whole, as in {whole}"
    if full_key and full_key not in text:
        text = f"{full_key}: {text}"
    wrong, parent = re.search(r"Key '([^']+)'", text), getattr(cause, "parent_node", None)
    if wrong is not None and parent is not None and OmegaConf.is_dict(parent):
        close = difflib.get_close_matches(wrong.group(1), [str(key) for key in parent], n=1)
        if close:
            text += f". Did you mean '{close[0]}'?"
        elif "is not in struct" in text:  # entries that recipes name, such as sources
            there = ", ".join(map(str, parent))
            text = f"{full_key} is not there ({there}); to add it, write +{full_key}=..."
    return text
