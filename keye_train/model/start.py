"""First weights of a run: from the parent's export, SigLIP and Qwen3, and random where the recipe allows it.

Every tensor of a source is used, dropped on purpose or named in an error, and so is every parameter of the model.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

from keye_train.model.configuration import keye_config
from keye_train.model.dual_encoder import DualEncoder
from keye_train.model.keye import KeyeForConditionalGeneration
from keye_train.model.parameters import PACKING_TABLE
from keye_train.model.pretrained import load_state, read_state, require_all
from keye_train.runs import read_json
from keye_train.settings import ModelSettings

NEW_IN_KEYE = "mlp_AR."  # neither SigLIP nor Qwen3 has a projector: it starts random, and Stage 1 trains it
TEXT_TOWER = ("text_model.", "logit_scale", "logit_bias")


def initial_model(
    settings: ModelSettings, seed: int, parent: str | Path | None = None, dtype: torch.dtype = torch.float32
) -> KeyeForConditionalGeneration:
    """The model that a language stage starts from, on the CPU.

    With an export of a language stage as parent, everything comes from it. With an export of Stage 0, the vision
    tower does, and the rest from ``model.start``. Without a parent, everything comes from ``model.start``.

    Args:
        settings: shape and start weights.
        seed: of the weights that are drawn.
        parent: export, or None.
        dtype: of the weights.

    Raises:
        FileNotFoundError: a source is absent.
        ValueError: a tensor is missing, too many, or of another shape; the message names it and the setting to check.
    """
    config = keye_config(settings)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = KeyeForConditionalGeneration(config)
    nn.Module.to(model, dtype)
    start = settings.start
    whole_parent = parent is not None and _has_language_model(parent)
    sources: list[str] = []
    filled: set[str] = set()
    if start.siglip is not None and parent is None:
        sources.append(start.siglip)
        filled |= load_state(model, siglip_towers(start.siglip, with_text=False))
    if start.qwen3 is not None and not whole_parent:
        sources.append(start.qwen3)
        filled |= load_state(model, qwen3_language(start.qwen3, tied=settings.language.tie_word_embeddings))
    if parent is not None:
        sources.append(str(parent))
        filled |= load_state(model, _export_weights(parent))
    if whole_parent:
        require_all(model, filled, str(parent), allowed=lambda name: False)
    else:
        _require_sources(model, filled, sources, settings)
    return model


def initial_dual_encoder(settings: ModelSettings, seed: int, dtype: torch.dtype = torch.float32) -> DualEncoder:
    """The two towers that Stage 0 starts from, on the CPU.

    Raises:
        FileNotFoundError, ValueError: as ``initial_model``.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = DualEncoder(keye_config(settings), settings.text_tower).to(dtype)
    siglip = settings.start.siglip
    filled = set() if siglip is None else load_state(model, siglip_towers(siglip, with_text=True))
    _require_sources(model, filled, [] if siglip is None else [siglip], settings)
    return model


def siglip_towers(folder: str | Path, with_text: bool) -> Iterator[tuple[str, Tensor]]:
    """The towers of a SigLIP checkpoint, the vision tower under Keye's names; without text that part is dropped."""
    for name, tensor in read_state(folder):
        if name.startswith("vision_model."):
            yield f"visual.{name}", tensor
        elif not name.startswith(TEXT_TOWER):
            raise ValueError(f"{folder} holds {name}, which is no part of SigLIP: check model.start.siglip")
        elif with_text:
            yield name, tensor


def qwen3_language(folder: str | Path, tied: bool) -> Iterator[tuple[str, Tensor]]:
    """A Qwen3 checkpoint; where its output matrix is tied and the model's (``tied``) is not, that starts as a copy."""
    has_head, embeddings = False, None
    for name, tensor in read_state(folder):
        if not name.startswith(("model.", "lm_head.")):
            raise ValueError(f"{folder} holds {name}, which is no part of Qwen3: check model.start.qwen3")
        has_head = has_head or name == "lm_head.weight"
        if name == "model.embed_tokens.weight":
            embeddings = tensor
        yield name, tensor
    if not has_head and not tied and embeddings is not None:
        yield "lm_head.weight", embeddings


def _export_weights(export: str | Path) -> Iterator[tuple[str, Tensor]]:
    """Weights of any stage's export; the text tower of Stage 0 stays behind."""
    return ((name, tensor) for name, tensor in read_state(export) if not name.startswith(TEXT_TOWER))


def _has_language_model(export: str | Path) -> bool:
    return read_json(Path(export) / "config.json").get("architectures") != [DualEncoder.__name__]


def _require_sources(model: nn.Module, filled: set[str], sources: list[str], settings: ModelSettings) -> None:
    """Refuse parameters without a source, but for those that are new in Keye, or random ones that the recipe allows."""
    parts_with_source = {_part(name) for name in filled}  # such a part must be whole

    def may_stay(name: str) -> bool:
        drawn = _part(name) not in parts_with_source
        return name == PACKING_TABLE or (drawn and (settings.start.random or name.startswith(NEW_IN_KEYE)))

    if settings.start.random or sources:
        require_all(model, filled, " and ".join(sources), may_stay)
    else:
        raise ValueError(
            "the model has no first weights: set model.start.siglip and model.start.qwen3, or model.start.random=true"
        )


def _part(name: str) -> str:
    return name.split(".", 1)[0]
