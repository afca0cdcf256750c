"""Exports: the model on disk in the published layout (config.json, safetensors, official key names)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TypeVar

import torch
from torch import nn

from keye_train.model.configuration import KeyeConfig
from keye_train.model.dual_encoder import DualEncoder
from keye_train.model.keye import KeyeForConditionalGeneration
from keye_train.model.weight_files import MAX_SHARD_BYTES, ExtraFiles, NamedTensors, read_state, write_folder
from keye_train.runs import read_json
from keye_train.settings import CaptionDecoderSettings, TextTowerSettings

Model = TypeVar("Model", bound=nn.Module)
Gather = Callable[[nn.Parameter], AbstractContextManager[object]]


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
        raise ValueError(f"{source} lacks {first_names(missing)}: check {setting_of(missing[0])}")


def first_names(names: Sequence[str], limit: int = 5) -> str:
    """The first few of them and how many more there are, for a message."""
    more = len(names) - limit
    return ", ".join(names[:limit]) + (f" and {more} more" if more > 0 else "")


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
    return _filled(empty_model(config), folder)


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
    return _filled(meta_dual_encoder(config).to(config.dtype).to_empty(device="cpu"), folder)


def _filled(model: Model, folder: str | Path) -> Model:
    """``model`` with every parameter from the export, in evaluation mode."""
    filled = load_state(model, read_state(folder))
    require_all(model, filled, str(folder), allowed=lambda name: False)
    model.eval()
    return model


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
