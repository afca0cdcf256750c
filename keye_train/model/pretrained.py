"""Exports: the model on disk in the published layout (config.json, safetensors, official key names).

An export is a folder. It is written aside and renamed, so it exists whole or not at all. Weights stream a tensor at a
time in both directions. Only safetensors are read: a pickle can run code.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from keye_train.model.configuration import KeyeConfig
from keye_train.model.dual_encoder import DualEncoder
from keye_train.model.keye import KeyeForConditionalGeneration
from keye_train.runs import read_json, settle, write_json_atomic, write_text_atomic
from keye_train.settings import CaptionDecoderSettings, TextTowerSettings

WEIGHTS = "model.safetensors"
WEIGHTS_INDEX = "model.safetensors.index.json"
MAX_SHARD_BYTES = 5_000_000_000

NamedTensors = Iterable[tuple[str, Tensor]]
ExtraFiles = Mapping[str, Path | dict[str, Any]]
Gather = Callable[[nn.Parameter], AbstractContextManager[object]]


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


@torch.no_grad()
def load_state(model: nn.Module, state: NamedTensors, gather: Gather = nullcontext) -> set[str]:
    """Copy tensors into a model, casting to its data types.

    Args:
        model: any model of this package.
        state: (name, tensor); every name must be a parameter of the model.
        gather: context that makes a parameter whole while it is written, for parameters spread over ranks.

    Returns:
        Names that were filled; the caller decides what the others mean.

    Raises:
        ValueError: a name the model does not have, or a shape that differs; the message names the setting to check.
    """
    parameters = dict(model.named_parameters(remove_duplicate=False))
    filled = set()
    for name, tensor in state:
        parameter = parameters.get(name)
        if parameter is None:
            raise ValueError(f"{name} {list(tensor.shape)} has no place in the model: check {setting_of(name)}")
        with gather(parameter):
            if parameter.shape != tensor.shape:
                raise ValueError(
                    f"{name} has the shape {list(tensor.shape)} in the file and {list(parameter.shape)} in the model: "
                    f"check {setting_of(name)}"
                )
            parameter.copy_(tensor)
        filled.add(name)
    return filled


def setting_of(name: str) -> str:
    """The recipe setting that most likely decides the shape, or the presence, of a parameter."""
    prefixes = {
        "visual.": "model.vision",
        "text_model.": "model.text_tower",
        "caption_decoder.": "model.caption_decoder",
    }
    group = next((group for prefix, group in prefixes.items() if name.startswith(prefix)), "model.language")
    if "token_embedding" in name or "embed_tokens" in name or "lm_head" in name:
        return f"{group}.vocab_size and {group}.hidden_size"
    if "position_embedding" in name:
        return "model.vision.image_size" if group == "model.vision" else f"{group}.max_tokens"
    if "mlp" in name and group != "model.language":
        return f"{group}.intermediate_size and {group}.hidden_size"
    if name.startswith("mlp_AR."):
        return "model.vision.hidden_size and model.language.hidden_size"
    if ".mlp." in name:
        return f"{group}.intermediate_size, {group}.hidden_size and {group}.num_hidden_layers"
    if ".self_attn." in name and group == "model.language":
        return f"{group}.num_attention_heads, num_key_value_heads, head_dim and num_hidden_layers"
    return f"{group}.hidden_size and {group}.num_hidden_layers"


def require_all(model: nn.Module, filled: set[str], source: str, allowed: Callable[[str], bool]) -> None:
    """Raise ValueError naming the parameters that got no value from ``source``.

    Args:
        allowed: names that may keep their first values.
    """
    missing = [name for name, _ in model.named_parameters() if name not in filled and not allowed(name)]
    if missing:
        shown = ", ".join(missing[:5]) + (f" and {len(missing) - 5} more" if len(missing) > 5 else "")
        raise ValueError(f"{source} lacks {shown}: check {setting_of(missing[0])}")


def load_export(folder: str | Path, dtype: torch.dtype | None = None) -> KeyeForConditionalGeneration:
    """The model of an export, on the CPU, in evaluation mode.

    Args:
        dtype: of the weights; None: that of the export.

    Raises:
        FileNotFoundError, ValueError: see ``read_state`` and ``load_state``; or a tensor is missing.
    """
    config = read_config(folder, dtype)
    if config.architectures == ["DualEncoder"]:
        raise ValueError(f"{folder} is an export of Stage 0 (two towers): it has no language model")
    model = empty_model(config)
    filled = load_state(model, read_state(folder))
    require_all(model, filled, str(folder), allowed=lambda name: False)
    return model.eval()


def empty_model(config: KeyeConfig, dtype: torch.dtype | None = None) -> KeyeForConditionalGeneration:
    """A model on the CPU whose parameters hold whatever was in memory: to be filled from a file.

    Args:
        dtype: of the weights; None: that of ``config``.
    """
    with torch.device("meta"):  # nothing is drawn that the file replaces
        model = KeyeForConditionalGeneration(config)
    nn.Module.to(model, dtype or config.dtype).to_empty(device="cpu")
    model.tie_weights()
    return model


def load_dual_encoder(folder: str | Path, dtype: torch.dtype | None = None) -> DualEncoder:
    """The two towers of a Stage 0 export, on the CPU, in evaluation mode.

    Raises:
        FileNotFoundError, ValueError: as ``load_export``.
    """
    config = read_config(folder, dtype)
    if config.architectures != ["DualEncoder"]:
        raise ValueError(f"{folder} is not an export of Stage 0: its config.json has no text_tower")
    model = meta_dual_encoder(config).to(config.dtype).to_empty(device="cpu")
    filled = load_state(model, read_state(folder))
    require_all(model, filled, str(folder), allowed=lambda name: False)
    return model.eval()


def meta_dual_encoder(config: KeyeConfig) -> DualEncoder:
    """The towers that the config.json of a Stage 0 export describes, shapes only."""
    decoder = getattr(config, "caption_decoder", None)
    with torch.device("meta"):
        return DualEncoder(
            config,
            TextTowerSettings(**config.text_tower),
            None if decoder is None else CaptionDecoderSettings(**decoder),
        )


def save_export(
    state: NamedTensors,
    config: KeyeConfig,
    folder: str | Path,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    extra_files: ExtraFiles | None = None,
) -> None:
    """Write an export, whole or not at all; an export that stands there is replaced.

    Args:
        state: (name, tensor) under the official names; at most ``max_shard_bytes`` of them are held at a time.
        config: becomes config.json, with the data type of the tensors.
        extra_files: name in the export -> a file to copy, e.g. the tokenizer's, or a value to write as JSON.
    """
    fields = KeyeConfig(**config.to_dict())
    write_folder(state, fields.to_diff_dict(), folder, max_shard_bytes, extra_files)


def write_folder(
    state: NamedTensors,
    config: dict[str, Any],
    folder: str | Path,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    extra_files: ExtraFiles | None = None,
) -> None:
    """A folder of safetensors beside their config.json, whole or not at all; see ``save_export``.

    Args:
        config: fields of config.json; ``torch_dtype`` is added.
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


def read_config(folder: str | Path, dtype: torch.dtype | None = None) -> KeyeConfig:
    """Configuration of an export, or of the published checkpoint.

    ``auto_map``, which names code in a repository, is left behind: nothing here would run it.

    Args:
        dtype: of the weights; None: as stored, float32 where nothing is.

    Raises:
        FileNotFoundError: no config.json.
        ValueError: not JSON, or of another kind of model.
    """
    path = Path(folder) / "config.json"
    if not path.exists():
        raise FileNotFoundError(f"{path} is absent: {folder} is no export")
    fields = read_json(path)
    kind = fields.get("model_type", KeyeConfig.model_type)
    if kind != KeyeConfig.model_type:
        raise ValueError(f"{path} describes a model of type {kind}, not Keye: name a Keye checkpoint")
    fields.pop("auto_map", None)
    config = KeyeConfig(**fields)
    config.dtype = dtype or config.dtype or torch.float32
    return config
