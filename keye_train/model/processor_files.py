"""The files beside the weights with which an export can be used on its own: tokenizer, chat template and budgets."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from keye_train.model.chat import CHAT_TEMPLATE
from keye_train.model.media_options import image_limits, video_limits
from keye_train.runs import read_json
from keye_train.settings import ResolutionSettings

PREPROCESSOR = "preprocessor_config.json"  # budgets of images, as published
PROCESSOR = "processor_config.json"  # budgets of videos, which the published layout has no place for
CHAT_TEMPLATE_FILE = "chat_template.json"
STORED_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    CHAT_TEMPLATE_FILE,
    "chat_template.jinja",
    "vocab.json",
    "merges.txt",
    "generation_config.json",
    PREPROCESSOR,
    PROCESSOR,
)

PROCESSOR_CLASS = "KeyeProcessor"
PUBLISHED_PREPROCESSOR: Mapping[str, Any] = {
    "min_pixels": 3136,
    "max_pixels": 1003520,
    "patch_size": 14,
    "temporal_patch_size": 1,
    "merge_size": 2,
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.5, 0.5, 0.5],
    "processor_class": PROCESSOR_CLASS,
}


def stored_files(folder: Path) -> dict[str, Path | dict[str, Any]]:
    """Those of ``STORED_FILES`` that a folder has, without ``auto_map``, which names code in a repository."""
    files: dict[str, Path | dict[str, Any]] = {name: folder / name for name in STORED_FILES if (folder / name).exists()}
    for name in (PREPROCESSOR, "tokenizer_config.json"):
        path = files.get(name)
        if isinstance(path, Path) and "auto_map" in (fields := read_json(path)):
            files[name] = {key: value for key, value in fields.items() if key != "auto_map"}
    return files


def trained_files(tokenizer: Path, resolution: ResolutionSettings) -> dict[str, Path | dict[str, Any]]:
    """What an export of the training carries: its tokenizer, and the template and budgets that it read its data with.

    Template and budgets of the tokenizer's folder are another model's: training follows the recipe and Keye's template.
    """
    return {**stored_files(tokenizer), **template_file(), **budget_files(resolution)}


def budget_files(resolution: ResolutionSettings) -> dict[str, dict[str, Any]]:
    """Both files with budgets: ``KeyeProcessor.from_pretrained`` gets ``resolution`` back from them."""
    return {
        PREPROCESSOR: {**PUBLISHED_PREPROCESSOR, **image_limits(resolution)},
        PROCESSOR: processor_fields(video_limits(resolution)),
    }


def processor_fields(video: Mapping[str, float]) -> dict[str, Any]:
    """Content of ``processor_config.json``.

    Args:
        video: limits of videos, see ``media_options.video_limits``.
    """
    return {"processor_class": PROCESSOR_CLASS, "video": dict(video)}


def template_file(template: str | dict[str, str] | None = CHAT_TEMPLATE) -> dict[str, dict[str, Any]]:
    """The chat template of the processor; the tokenizer keeps one of its own in tokenizer_config.json."""
    return {CHAT_TEMPLATE_FILE: {"chat_template": template}}
