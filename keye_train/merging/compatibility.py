"""May these exports be averaged? Every reason why not, in one list."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from keye_train.merging.methods import AVERAGED_DTYPES
from keye_train.merging.streaming import ExportReader, TensorPlace
from keye_train.settings import SettingsError

CONFIG = "config.json"
IGNORED_CONFIG_KEYS = frozenset(
    {
        "_commit_hash",
        "_name_or_path",
        "_attn_implementation",
        "_attn_implementation_autoset",
        "auto_map",
        "transformers_version",
        "use_cache",
        # The types of the tensors themselves are compared.
        "torch_dtype",
        "dtype",
    }
)
"""Keys that say who wrote the file or how to run it; they do not change what the weights mean."""

TEXT_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.json",
    "merges.txt",
    "added_tokens.json",
    "special_tokens_map.json",
    "chat_template.json",
    "chat_template.jinja",
)
"""Files that decide which ids a weight has seen: the same in all models, or absent in all."""

BUDGET_FILES = ("preprocessor_config.json", "processor_config.json")
"""Files that decide which patches a weight has seen: budgets of images and of videos.

The average of two models has no budgets of its own that would follow from theirs, and those of the first would be a
silent guess. So they are the same, or the user says which ones the average shall have by giving all models that file.
"""

IGNORED_BUDGET_KEYS = frozenset({"auto_map", "image_processor_type", "processor_class"})
"""Keys that say which class reads the file."""

_ABSENT = "absent"


class MergeError(SettingsError):
    """Models that cannot be averaged, with every reason."""

    def __init__(self, problems: Sequence[str]) -> None:
        self.problems = list(problems)
        super().__init__(
            f"these models cannot be merged, {len(self.problems)} reason(s):\n" + "\n".join(f"- {p}" for p in problems)
        )


def differences(readers: Sequence[ExportReader]) -> list[str]:
    """Every way in which the exports differ from the first one; empty when they may be averaged.

    Compares tensor names, shapes and dtypes, config.json (without IGNORED_CONFIG_KEYS), tokenizer and processor files.
    Reads headers and small files only.
    """
    first = readers[0]
    problems = []
    for other in readers[1:]:
        problems += _tensor_differences(first, other)
        problems += _config_differences(first.folder, other.folder)
        problems += _text_differences(first.folder, other.folder)
        problems += _budget_differences(first.folder, other.folder)
    return problems


def value_problems(readers: Sequence[ExportReader], names: Sequence[str]) -> list[str]:
    """Tensors that hold NaN or infinity, and tensors outside AVERAGED_DTYPES that are not equal in all models.

    Reads all values of ``names``, a piece at a time.
    """
    problems = []
    for name in names:
        if readers[0].places[name].dtype in AVERAGED_DTYPES:
            for reader in readers:
                if not all(bool(torch.isfinite(piece).all()) for piece in reader.pieces(name)):
                    problems.append(f"{reader.places[name].file}: {name} holds NaN or infinity")
        else:
            problems += _unequal(readers, name)
    return problems


def _unequal(readers: Sequence[ExportReader], name: str) -> list[str]:
    problems = []
    for other in readers[1:]:
        pairs = zip(readers[0].pieces(name), other.pieces(name), strict=True)
        if not all(torch.equal(left, right) for left, right in pairs):
            place = other.places[name]
            problems.append(
                f"{place.file}: {name} ({_dtype(place)}) is not averaged and must equal that of "
                f"{readers[0].places[name].file}"
            )
    return problems


def _tensor_differences(first: ExportReader, other: ExportReader) -> list[str]:
    problems = []
    for name, place in first.places.items():
        twin = other.places.get(name)
        if twin is None:
            problems.append(f"{other.folder}: has no tensor {name}, which {place.file} has")
            continue
        if twin.shape != place.shape:
            problems.append(f"{twin.file}: {name} has shape {list(twin.shape)}, in {place.file} {list(place.shape)}")
        if twin.dtype != place.dtype:
            problems.append(f"{twin.file}: {name} is {_dtype(twin)}, in {place.file} {_dtype(place)}")
    for name, twin in other.places.items():
        if name not in first.places:
            problems.append(f"{first.folder}: has no tensor {name}, which {twin.file} has")
    return problems


def _config_differences(first: Path, other: Path) -> list[str]:
    left, right = (_flat(_read_config(folder), IGNORED_CONFIG_KEYS) for folder in (first, other))
    return _field_differences(first / CONFIG, left, other / CONFIG, right)


def _field_differences(first: Path, left: Mapping[str, str], other: Path, right: Mapping[str, str]) -> list[str]:
    return [
        f"{other}: {key} is {right.get(key, _ABSENT)}, in {first} {left.get(key, _ABSENT)}"
        for key in sorted(left.keys() | right.keys())
        if left.get(key, _ABSENT) != right.get(key, _ABSENT)
    ]


def _text_differences(first: Path, other: Path) -> list[str]:
    problems = []
    for name in TEXT_FILES:
        left, right = first / name, other / name
        if left.exists() != right.exists():
            problems.append(_missing(left, right))
        elif left.exists() and left.read_bytes() != right.read_bytes() and _json(left) != _json(right):
            problems.append(f"{right}: differs from {left}")
    return problems


def _budget_differences(first: Path, other: Path) -> list[str]:
    problems = []
    for name in BUDGET_FILES:
        left, right = pair = (first / name, other / name)
        if left.exists() != right.exists():
            found = [_missing(left, right)]
        elif left.exists():
            fields = [_flat(json.loads(path.read_text(encoding="utf-8")), IGNORED_BUDGET_KEYS) for path in pair]
            found = _field_differences(left, fields[0], right, fields[1])
        else:
            found = []
        problems += [f"{problem}; copy the {name} that the merge shall have into both" for problem in found]
    return problems


def _missing(left: Path, right: Path) -> str:
    here, there = (left, right) if left.exists() else (right, left)
    return f"{there}: is missing, but {here} exists"


def _json(path: Path) -> object:
    """The value of a JSON file, so that spaces and the order of keys do not count; other files by their text."""
    text = path.read_text(encoding="utf-8")
    return json.loads(text) if path.suffix == ".json" else text


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / CONFIG
    if not path.exists():
        raise FileNotFoundError(f"{path} is missing: {folder} is no export")
    return json.loads(path.read_text(encoding="utf-8"))


def _flat(config: Mapping[str, Any], ignored: frozenset[str], prefix: str = "") -> dict[str, str]:
    """Nested settings as dotted key -> JSON text, without the keys that do not matter."""
    flat: dict[str, str] = {}
    for key, value in config.items():
        if key in ignored:
            continue
        if isinstance(value, Mapping):
            flat |= _flat(value, ignored, f"{prefix}{key}.")
        else:
            flat[prefix + key] = json.dumps(value, sort_keys=True)
    return flat


def _dtype(place: TensorPlace) -> str:
    return str(place.dtype).removeprefix("torch.")
