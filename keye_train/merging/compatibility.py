"""May these models be averaged? Every reason why not, in one list.

Each reason has a kind, a name of ``ALLOWED_DIFFERENCES`` (keye_train.settings.merging), which also says what becomes of
a difference that the user allows.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from keye_train.merging.methods import AVERAGED_DTYPES, all_finite
from keye_train.merging.reading import ExportReader
from keye_train.runs import read_json
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
    "tokenizer.model",
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

TIE = "tie_word_embeddings"
"""Key of config.json by which output matrix and embedding are one."""

OUTPUT_MATRIX = "lm_head.weight"
"""How the name of the output matrix ends."""

_ABSENT = "absent"


class MergeError(SettingsError):
    """Models that cannot be averaged, with every reason."""

    def __init__(self, problems: Sequence[str]) -> None:
        self.problems = list(problems)
        super().__init__(
            f"these models cannot be merged, {len(self.problems)} reason(s):\n" + "\n".join(f"- {p}" for p in problems)
        )


@dataclass(frozen=True)
class Difference:
    """One way in which a model differs from the first."""

    kind: str  # a name of ALLOWED_DIFFERENCES
    text: str

    def __str__(self) -> str:
        return f"{self.text} [allow={self.kind}]"


def compare(readers: Sequence[ExportReader]) -> list[Difference]:
    """Every way in which the models differ from the first one; empty when they may be averaged.

    Compares tensor names, shapes and dtypes, config.json (without IGNORED_CONFIG_KEYS), tokenizer and processor files.
    Reads headers and small files only.
    """
    first = readers[0]
    found = []
    for other in readers[1:]:
        found += _tensor_differences(first, other)
        found += _config_differences(first.folder, other.folder)
        found += _text_differences(first.folder, other.folder)
        found += _budget_differences(first.folder, other.folder)
    return [Difference(one.kind, _as_named(one.text, readers)) for one in found]


def _as_named(text: str, readers: Sequence[ExportReader]) -> str:
    """Small files of a checkpoint are made for reading: messages say which checkpoint they stand for."""
    for reader in readers:
        text = text.replace(str(reader.folder), str(reader.origin))
    return text


def compared_files(folder: Path) -> list[Path]:
    """The small files of an export that are compared with those of other models, as far as it has them."""
    return [folder / name for name in (CONFIG, *TEXT_FILES, *BUDGET_FILES) if (folder / name).exists()]


def value_problems(readers: Sequence[ExportReader], names: Sequence[str], equal: bool = True) -> list[str]:
    """Tensors that hold NaN or infinity, and tensors outside AVERAGED_DTYPES that are not equal in all models.

    Reads all values of ``names``, a piece at a time.

    Args:
        equal: whether the latter have to be equal.
    """
    problems = []
    for name in names:
        holders = [reader for reader in readers if name in reader.places]
        if holders[0].places[name].dtype in AVERAGED_DTYPES:
            for reader in holders:
                place = reader.places[name]
                if place.dtype in AVERAGED_DTYPES and not all(all_finite(piece) for piece in reader.pieces(name)):
                    problems.append(f"{place.file}: {name} holds NaN or infinity")
        elif equal:
            problems += [str(one) for one in unequal(holders, name)]
    return problems


def check_seals(readers: Sequence[ExportReader], sha256: Callable[[ExportReader, Path], str | None]) -> None:
    """Compare files with the checksums that their writer noted.

    Args:
        sha256: of a file of a reader; None: this file is not asked about.

    Raises:
        MergeError: bits changed on the disk; it lists every such file.
    """
    problems = [
        f"{file} does not match the checksum of its checkpoint: it is damaged; take another one"
        for reader in readers
        for file, sealed in reader.sealed.items()
        if sha256(reader, file) not in (None, sealed)
    ]
    if problems:
        raise MergeError(problems)


def unequal(readers: Sequence[ExportReader], name: str) -> list[Difference]:
    """Models in which a tensor that is not averaged holds other values than in the first.

    Reads it up to the first difference. Tensors of another type or shape differ in that already, and are not read.
    """
    found: list[Difference] = []
    place = readers[0].places[name]
    if place.dtype in AVERAGED_DTYPES:
        return found
    for other in readers[1:]:
        twin = other.places.get(name)
        if twin is None or (twin.dtype, twin.shape) != (place.dtype, place.shape):
            continue
        pairs = zip(readers[0].pieces(name), other.pieces(name), strict=True)
        if not all(torch.equal(left.view(torch.uint8), right.view(torch.uint8)) for left, right in pairs):
            text = f"{twin.file}: {name} ({_dtype(twin.dtype)}) is not averaged and must equal that of {place.file}"
            found.append(Difference("integers", text))
    return found


def _tensor_differences(first: ExportReader, other: ExportReader) -> list[Difference]:
    found = []
    for name, place in first.places.items():
        twin = other.places.get(name)
        if twin is None:
            text = f"{other.origin}: has no tensor {name}, which {place.file} has"
            found.append(Difference("missing", text + _tie_advice(name, other)))
            continue
        if twin.shape != place.shape:
            text = f"{name} has shape {list(twin.shape)}, in {place.file} {list(place.shape)}"
            found.append(Difference("shape", f"{twin.file}: {text}"))
        left, right = first.dtype_of(name), other.dtype_of(name)
        if left != right:
            text = f"{twin.file}: {name} is {_dtype(right)}, in {place.file} {_dtype(left)}"
            both = {place.dtype, twin.dtype} <= set(AVERAGED_DTYPES)
            found.append(Difference("dtype" if both else "integers", text))
    for name, twin in other.places.items():
        if name not in first.places:
            text = f"{first.origin}: has no tensor {name}, which {twin.file} has"
            found.append(Difference("extra", text + _tie_advice(name, first)))
    return found


def _tie_advice(lacking: str, reader: ExportReader) -> str:
    """What else to do about a tensor that a model lacks: an output matrix may be its embedding."""
    if not lacking.endswith(OUTPUT_MATRIX) or ties(reader):
        return ""
    return f"; where it is tied to the embedding, say so in its {CONFIG} ({TIE}: true) and allow tied"


def _config_differences(first: Path, other: Path) -> list[Difference]:
    left, right = config_values(first), config_values(other)
    return [
        Difference(_config_kind(key), text)
        for key, text in _field_differences(first / CONFIG, left, other / CONFIG, right).items()
    ]


def _config_kind(key: str) -> str:
    words = key.split(".")
    if words[-1] == TIE:
        return "tied"
    return "rope" if any("rope" in word or word == "max_position_embeddings" for word in words) else "config"


def _field_differences(first: Path, left: Mapping[str, str], other: Path, right: Mapping[str, str]) -> dict[str, str]:
    return {
        key: f"{other}: {key} is {right.get(key, _ABSENT)}, in {first} {left.get(key, _ABSENT)}"
        for key in sorted(left.keys() | right.keys())
        if left.get(key, _ABSENT) != right.get(key, _ABSENT)
    }


def _text_differences(first: Path, other: Path) -> list[Difference]:
    found = []
    for name in TEXT_FILES:
        left, right = first / name, other / name
        if left.exists() != right.exists():
            found.append(Difference("tokenizer", _missing(left, right)))
        elif left.exists() and left.read_bytes() != right.read_bytes() and _value(left) != _value(right):
            found.append(Difference("tokenizer", f"{right}: differs from {left}"))
    return found


def _budget_differences(first: Path, other: Path) -> list[Difference]:
    found = []
    for name in BUDGET_FILES:
        left, right = pair = (first / name, other / name)
        if left.exists() != right.exists():
            texts = [_missing(left, right)]
        elif left.exists():
            fields = [_flat(json.loads(path.read_text(encoding="utf-8")), IGNORED_BUDGET_KEYS) for path in pair]
            texts = list(_field_differences(left, fields[0], right, fields[1]).values())
        else:
            texts = []
        advice = f"copy the {name} that the merge shall have into both"
        found += [Difference("processor", f"{text}; {advice}") for text in texts]
    return found


def _missing(left: Path, right: Path) -> str:
    here, there = (left, right) if left.exists() else (right, left)
    return f"{there}: is missing, but {here} exists"


def _value(path: Path) -> object:
    """The value of a JSON file, so that spaces and the order of keys do not count; other files by their bytes."""
    return json.loads(path.read_text(encoding="utf-8")) if path.suffix == ".json" else path.read_bytes()


def ties(reader: ExportReader) -> bool:
    """Whether config.json says that output matrix and embedding are one; where it says nothing they are two."""
    return any(key.split(".")[-1] == TIE and value == "true" for key, value in config_values(reader.folder).items())


def config_values(folder: Path) -> dict[str, str]:
    """config.json of an export as dotted key -> JSON text, without IGNORED_CONFIG_KEYS."""
    path = folder / CONFIG
    if not path.exists():
        raise FileNotFoundError(f"{path} is missing: {folder} is no export")
    return _flat(read_json(path), IGNORED_CONFIG_KEYS)


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


def _dtype(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
