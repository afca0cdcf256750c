"""Folders of safetensors: written aside and renamed, so whole or absent; read and written a tensor at a time.

Only safetensors are read: a pickle can run code.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from keye_train.runs import WEIGHTS, WEIGHTS_INDEX, read_json, settle, write_json_atomic, write_text_atomic

MAX_SHARD_BYTES = 5_000_000_000

NamedTensors = Iterable[tuple[str, Tensor]]
ExtraFiles = Mapping[str, Path | dict[str, Any]]


@dataclass(frozen=True)
class TensorInfo:
    """A tensor of a checkpoint, as the header of its file describes it."""

    shape: tuple[int, ...]
    dtype: str  # safetensors' name: F32, BF16, ...
    file: str


def list_tensors(folder: str | Path) -> dict[str, TensorInfo]:
    """Names and shapes of all tensors of a checkpoint folder; only headers are read.

    Raises:
        FileNotFoundError, ValueError: as ``read_state``.
    """
    found = {}
    for file, names, shard in _open_shards(Path(folder)):
        for name in names:
            view = shard.get_slice(name)
            found[name] = TensorInfo(tuple(view.get_shape()), view.get_dtype(), file)
    return found


def read_state(folder: str | Path) -> Iterator[tuple[str, Tensor]]:
    """All tensors of a checkpoint folder, one at a time, on the CPU.

    Raises:
        FileNotFoundError: no safetensors, or a shard that the index names is absent.
        ValueError: a shard lacks a tensor that the index promises.
    """
    for _, names, shard in _open_shards(Path(folder)):
        for name in names:
            yield name, shard.get_tensor(name)


class WeightReader:
    """Reads the tensors of a folder of safetensors by name, one at a time, memory-mapped.

    Raises:
        FileNotFoundError, ValueError: as ``read_state``.
    """

    def __init__(self, folder: str | Path) -> None:
        self._folder = Path(folder)
        self._places = {name: info.file for name, info in list_tensors(folder).items()}
        self._files: dict[str, Any] = {}

    def __contains__(self, name: str) -> bool:
        return name in self._places

    def names(self) -> set[str]:
        """Names of all tensors."""
        return set(self._places)

    def __call__(self, name: str) -> Tensor:
        """The whole tensor, as stored, on the CPU."""
        file = self._places[name]
        if file not in self._files:
            self._files[file] = safe_open(self._folder / file, framework="pt")
        return self._files[file].get_tensor(name)


def _open_shards(folder: Path) -> Iterator[tuple[str, list[str], Any]]:
    """Each file of a checkpoint: its name, the tensors that it is read for, and the open file."""
    index = folder / WEIGHTS_INDEX
    if index.exists():
        places: dict[str, str] = read_json(index)["weight_map"]
    elif (folder / WEIGHTS).exists():
        with safe_open(folder / WEIGHTS, framework="pt") as single:
            places = dict.fromkeys(single.keys(), WEIGHTS)
    else:
        raise FileNotFoundError(
            f"{folder} has neither {WEIGHTS} nor {WEIGHTS_INDEX}: convert other formats to safetensors first"
        )
    for file in sorted(set(places.values())):
        if not (folder / file).exists():
            raise FileNotFoundError(
                f"{folder / file} is named by {WEIGHTS_INDEX} but absent: copy the checkpoint again"
            )
        names = [name for name, place in places.items() if place == file]
        with safe_open(folder / file, framework="pt") as shard:
            lacking = sorted(set(names) - set(shard.keys()))
            if lacking:
                raise ValueError(f"{folder / file} lacks {lacking[0]}, which {WEIGHTS_INDEX} promises")
            yield file, names, shard


def write_folder(
    state: NamedTensors,
    config: dict[str, Any],
    folder: str | Path,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    extra_files: ExtraFiles | None = None,
) -> None:
    """A folder of safetensors beside their config.json, whole or not at all; what stands there is replaced.

    Args:
        state: (name, tensor); at most ``max_shard_bytes`` of them are held at a time.
        config: fields of config.json; ``torch_dtype`` is added.
        folder, max_shard_bytes: where, and the largest file.
        extra_files: name in the folder -> a file to copy, e.g. the tokenizer's, or a value to write as JSON.
    """
    folder = Path(folder).resolve()  # of a link: the folder behind it is replaced, not the link
    folder.parent.mkdir(parents=True, exist_ok=True)
    aside = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir()
    try:
        dtype = _write_weights(state, aside, max_shard_bytes)
        written = {name: value for name, value in config.items() if name != "dtype"}
        written["torch_dtype"] = str(dtype).removeprefix("torch.")
        write_json_atomic(aside / "config.json", written)
        for name, source in (extra_files or {}).items():
            if isinstance(source, Path):
                shutil.copyfile(source, aside / name)
            else:
                write_json_atomic(aside / name, source)
        _replace_folder(aside, folder)
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise


def _write_weights(state: NamedTensors, folder: Path, max_shard_bytes: int) -> torch.dtype:
    """Shards of at most ``max_shard_bytes`` (or one tensor), and their index; returns the data type."""
    shards: list[list[str]] = []
    held: dict[str, Tensor] = {}
    held_bytes = total_bytes = 0
    dtype: torch.dtype | None = None

    def flush() -> None:
        part = folder / f"part-{len(shards)}.safetensors"
        save_file(held, part, metadata={"format": "pt"})
        settle(part)
        shards.append(list(held))
        held.clear()

    for name, tensor in state:
        tensor = tensor.detach().cpu().contiguous().clone()  # safetensors refuses shared memory
        if held and held_bytes + tensor.nbytes > max_shard_bytes:
            flush()
            held_bytes = 0
        held[name] = tensor
        held_bytes += tensor.nbytes
        total_bytes += tensor.nbytes
        dtype = dtype or tensor.dtype
    if dtype is None:
        raise ValueError("nothing to export: the state has no tensors")
    flush()
    weight_map: dict[str, str] = {}
    for number, names in enumerate(shards):
        file = WEIGHTS if len(shards) == 1 else f"model-{number + 1:05d}-of-{len(shards):05d}.safetensors"
        (folder / f"part-{number}.safetensors").replace(folder / file)
        weight_map |= dict.fromkeys(names, file)
    if len(shards) > 1:
        index = {"metadata": {"total_size": total_bytes}, "weight_map": weight_map}
        write_text_atomic(folder / WEIGHTS_INDEX, json.dumps(index, indent=2) + "\n")
    return dtype


def _replace_folder(new: Path, target: Path) -> None:
    """Move ``new`` to ``target``; what stands there is removed afterwards, or put back where the move fails."""
    old = target.with_name(f".{target.name}.{os.getpid()}.old")
    replaces = target.exists()
    if replaces:
        target.replace(old)
    try:
        new.replace(target)
    except BaseException:
        if replaces:
            old.replace(target)
        raise
    shutil.rmtree(old, ignore_errors=True)
