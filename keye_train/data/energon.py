"""Folders that were prepared for megatron-energon, read as they are.

``FOLDER/.nv-meta/dataset.yaml`` says in ``sample_type`` what the samples are and in ``field_map`` which member holds
which field (``image: jpg``, ``context: json[question]``, alternatives with commas); ``split.yaml`` lists the shards of
each split. Members are translated into the layouts of ``formats`` as they are read. The Python code that such a folder
can name (``sample_loader``, ``part_filter``) is never run.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import yaml
from braceexpand import braceexpand

from keye_train.data.formats import media_kind
from keye_train.data.storage import Storage
from keye_train.sample import SampleError

META = ".nv-meta"
DEPTH = 3
"""Folders above a shard in which ``.nv-meta`` is looked for."""

_ACCESS = re.compile(r"([^\[\]]+)((?:\[[^\[\]]+\])*)")
Fields = Mapping[str, Any]


@dataclass(frozen=True)
class EnergonLayout:
    """How the members of a sample are to be read."""

    sample_type: str  # e.g. CaptioningSample
    field_map: tuple[tuple[str, str], ...]  # field -> member, as in dataset.yaml

    def __str__(self) -> str:
        """Its identity in the index of a shard."""
        return json.dumps([self.sample_type, self.field_map])

    def __call__(self, members: dict[str, bytes]) -> dict[str, bytes]:
        """Members in a layout of ``formats``: the media, and ``json`` with messages or a document.

        Raises:
            SampleError: a field is not there, or not what the sample type needs.
        """
        parsed: dict[str, Any] = {}
        fields = {name: _access(members, parsed, path) for name, path in self.field_map}
        described = parsed.get("json")
        kept = {k: v for k, v in described.items() if k not in _OWN_KEYS} if isinstance(described, dict) else {}
        record = kept | _READERS[self.sample_type](fields)
        media = {name: data for name, data in members.items() if media_kind(name)}
        return {"json": json.dumps(record, ensure_ascii=False).encode("utf-8", "surrogatepass"), **media}


class LayoutFinder:
    """Finds the layout of shards; looks into each folder once."""

    def __init__(self, storage: Storage) -> None:
        self._storage = storage
        self._known: dict[str, EnergonLayout | None] = {}

    def __call__(self, shard: str) -> EnergonLayout | None:
        """Layout of the prepared folder that a shard stands in; None where it stands in no such folder.

        Raises:
            ValueError: ``dataset.yaml`` is broken or needs what is not supported; the message says what.
        """
        folder = shard.rpartition("/")[0]
        if folder not in self._known:
            self._known[folder] = self._find(shard)
        return self._known[folder]

    def _find(self, shard: str) -> EnergonLayout | None:
        protocol, separator, rest = shard.rpartition("://")
        parts = rest.split("/")[:-1]
        for count in range(len(parts), max(len(parts) - DEPTH, 0 if not separator else 1) - 1, -1):
            path = protocol + separator + "/".join([*parts[:count], META, "dataset.yaml"])
            if self._storage.exists(path):
                return _parse_layout(path, self._storage)
        return None


def split_shards(folder: str, storage: Storage) -> list[str] | None:
    """Shards of the split ``train`` of a prepared folder; None where the folder is not prepared.

    Raises:
        ValueError: ``split.yaml`` is broken, has no such split, or leaves out single samples.
    """
    path = f"{folder.rstrip('/')}/{META}/split.yaml"
    if not storage.exists(path):
        return None
    parts = _load_yaml(path, storage).get("split_parts")
    patterns = parts.get("train") if isinstance(parts, dict) else None
    if not isinstance(patterns, list) or not all(isinstance(pattern, str) for pattern in patterns):
        raise ValueError(f"{path} has no list of shards under split_parts.train")
    excluded = set()
    for pattern in _load_yaml(path, storage).get("exclude") or []:
        excluded |= set(braceexpand(str(pattern), escape=False))
    if single := sorted(name for name in excluded if not name.endswith(".tar")):
        raise ValueError(f"{path} excludes single samples ({single[0]}), which is not supported: filter the shard")
    names = [name for pattern in patterns for name in braceexpand(pattern, escape=False)]
    for name in names:
        if name.startswith("/") or "://" in name or ".." in name.split("/"):
            raise ValueError(f"{path} names the shard {name}, which is not inside the folder")
    return [f"{folder.rstrip('/')}/{name}" for name in names if name not in excluded]


def _parse_layout(path: str, storage: Storage) -> EnergonLayout | None:
    value = _load_yaml(path, storage)
    sample_type = value.get("sample_type")
    name = sample_type.get("__class__") if isinstance(sample_type, dict) else None
    fields = value.get("field_map")
    if name is None and fields is None and "sample_loader" not in value:
        return None  # "crude" samples: members are read by their endings, as everywhere
    if not isinstance(fields, dict) or not all(isinstance(part, str) for item in fields.items() for part in item):
        raise ValueError(
            f"{path} has no field_map of names (its sample_loader is Python code, which is not run): add one"
        )
    if name not in _READERS:
        raise ValueError(f"{path} has the sample type {name}; known are {', '.join(sorted(_READERS))}")
    return EnergonLayout(name, tuple(sorted(fields.items())))


def _load_yaml(path: str, storage: Storage) -> dict[str, Any]:
    try:
        value = yaml.safe_load(storage.read(path))
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"{path} is not valid YAML: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path} holds {type(value).__name__}, expected a mapping")
    return value


# ------------------------------------------------------------------------------------------------------- fields


def _access(members: Mapping[str, bytes], parsed: dict[str, Any], path: str) -> Any:
    """Value of a field; None where no alternative is there. Media stand by the name of their member."""
    for option in path.split(","):
        match = _ACCESS.fullmatch(option.strip())
        if match is None:
            raise SampleError(f"field_map has {option!r}, expected MEMBER or MEMBER[KEY]")
        name, steps = match[1], re.findall(r"\[([^\[\]]+)\]", match[2])
        if name not in members:
            continue
        if media_kind(name):
            return name
        if name not in parsed:
            parsed[name] = _decode(name, members[name])
        try:
            value = parsed[name]
            for step in steps:
                value = value[int(step)] if isinstance(value, list) else value[step]
            return value
        except (KeyError, IndexError, ValueError, TypeError):
            continue
    return None


def _decode(name: str, data: bytes) -> Any:
    try:
        text = data.decode("utf-8")
        return json.loads(text) if name.rpartition(".")[2] == "json" else text
    except (ValueError, RecursionError) as error:
        raise SampleError(f"member .{name} cannot be read: {error}") from error


def _text(fields: Fields, name: str) -> str:
    if not isinstance(fields.get(name), str):
        raise SampleError(f"the field '{name}' of field_map is {type(fields.get(name)).__name__}, expected a text")
    return fields[name]


def _media(fields: Fields, name: str) -> list[dict[str, str]]:
    value = fields.get(name)
    names = value if isinstance(value, list) else [value]
    parts = []
    for member in names:
        if not isinstance(member, str) or (kind := media_kind(member)) is None:
            raise SampleError(f"the field '{name}' of field_map holds no media")
        parts.append({"type": kind.value, kind.value: member})
    return parts


def _talk(task: str, asked: list[dict[str, str]], answer: str) -> dict[str, Any]:
    if not answer.strip():
        raise SampleError("the text is empty")
    messages: list[dict[str, Any]] = [{"role": "user", "content": asked}] if asked else []
    return {"task": task, "messages": [*messages, {"role": "assistant", "content": answer}]}


def _described(task: str, field: str) -> Callable[[Fields], dict[str, Any]]:
    return lambda fields: _talk(task, _media(fields, "image"), _text(fields, field).strip())


def _asked(media: str) -> Callable[[Fields], dict[str, Any]]:
    def read(fields: Fields) -> dict[str, Any]:
        question = [*_media(fields, media), {"type": "text", "text": _text(fields, "context")}]
        return _talk("vqa", question, _best_answer(fields.get("answers"), fields.get("answer_weights")))

    return read


def _best_answer(answers: Any, weights: Any) -> str:
    """The answer of the largest weight, the first of them; without weights, the first."""
    options = [answers] if isinstance(answers, str) else answers
    if not isinstance(options, list) or not options or not all(isinstance(option, str) for option in options):
        raise SampleError("the field 'answers' of field_map holds no texts")
    if weights is None:
        return options[0]
    numeric = isinstance(weights, list) and all(isinstance(weight, int | float) for weight in weights)
    if not numeric or len(weights) != len(options):
        raise SampleError("the field 'answer_weights' of field_map is no list with a number for each answer")
    return options[max(range(len(options)), key=weights.__getitem__)]


def _choice(fields: Fields) -> dict[str, Any]:
    """Choices stand below the question with letters; the answer is the letter of the right one."""
    choices, right = fields.get("choices"), fields.get("correct_choice_idx", 0)
    if not isinstance(choices, list) or not 0 < len(choices) <= 26 or not all(isinstance(c, str) for c in choices):
        raise SampleError("the field 'choices' of field_map is no list of 1 to 26 texts")
    right = 0 if right is None else right
    if type(right) is not int or not 0 <= right < len(choices):
        raise SampleError(f"the field 'correct_choice_idx' is {right!r} for {len(choices)} choices")
    lines = [f"{chr(ord('A') + number)}. {choice}" for number, choice in enumerate(choices)]
    question = {"type": "text", "text": "\n".join([_text(fields, "context"), *lines])}
    return _talk("vqa", [*_media(fields, "image"), question], chr(ord("A") + right))


def _sequence(fields: Fields) -> dict[str, Any]:
    entries = fields.get("sequence")
    if not isinstance(entries, list) or not all(isinstance(entry, str) for entry in entries):
        raise SampleError("the field 'sequence' of field_map is no list of texts and names of images")
    images = [entry if media_kind(entry) else None for entry in entries]
    texts = [None if image is not None else entry for entry, image in zip(entries, images, strict=True)]
    return {"task": "interleaved", "texts": texts, "images": images}


def _matched(fields: Fields) -> dict[str, Any]:
    images, places = fields.get("images"), fields.get("matched_text_indices")
    if not isinstance(images, list) or not isinstance(places, list) or len(images) != len(places):
        raise SampleError("the fields 'images' and 'matched_text_indices' of field_map are no lists of one length")
    infos = [{"image_name": n, "matched_text_index": p} for n, p in zip(images, places, strict=True)]
    return {"task": "interleaved", "text_list": fields.get("texts"), "image_info": infos}


_READERS: dict[str, Callable[[Fields], dict[str, Any]]] = {
    "CaptioningSample": _described("caption", "caption"),
    "OCRSample": _described("ocr", "text"),
    "TextSample": lambda fields: _talk("text", [], _text(fields, "text")),
    "VQASample": _asked("image"),
    "VidQASample": _asked("video"),
    "MultiChoiceVQASample": _choice,
    "InterleavedSample": _sequence,
    "SimilarityInterleavedSample": _matched,
}
# Keys of the JSON that `formats` would read on its own.
_OWN_KEYS = {"messages", "conversations", "texts", "images", "text_list", "image_info", "caption", "text", "task"}
_OWN_KEYS |= {"image", "video", "videos"}
