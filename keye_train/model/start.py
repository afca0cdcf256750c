"""First weights of a run: from the parent's export, SigLIP and Qwen3, and random where the recipe allows it.

Every tensor of a source is used, dropped on purpose or named in an error, and so is every parameter of the model.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

from keye_train.model.configuration import KeyeConfig, keye_config
from keye_train.model.dual_encoder import DualEncoder
from keye_train.model.initialization import initialize_weights
from keye_train.model.keye import KeyeForConditionalGeneration
from keye_train.model.parameters import PACKING_TABLE
from keye_train.model.pretrained import empty_model, load_state, require_all
from keye_train.model.projector import Projector
from keye_train.model.vision import PACKING_POSITIONS
from keye_train.model.weight_files import NamedTensors, list_tensors, read_state
from keye_train.runs import read_json
from keye_train.settings import ModelSettings

NEW_IN_KEYE = "mlp_AR."  # neither SigLIP nor Qwen3 has a projector: it starts random, and Stage 1 trains it
TEXT_TOWER = ("text_model.", "logit_scale", "logit_bias")
CAPTION_DECODER = "caption_decoder."
BARE_TOWER = ("embeddings.", "encoder.", "post_layernorm.", "head.")  # of a SiglipVisionModel saved on its own
COMPUTED = (".position_ids", ".rotary_emb.inv_freq")  # older versions of transformers wrote these buffers
EMBEDDINGS, HEAD = "model.embed_tokens.weight", "lm_head.weight"


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
    config, start = keye_config(settings), settings.start
    whole_parent = parent is not None and _has_language_model(parent)
    if start.random and not whole_parent:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = KeyeForConditionalGeneration(config)
        nn.Module.to(model, dtype)
    else:  # every tensor has a source, or stops the run: drawing 8 billion numbers first would take minutes
        model = empty_model(config, dtype)
        load_state(model, new_weights(config, seed))
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


def initial_dual_encoder(
    settings: ModelSettings, seed: int, dtype: torch.dtype = torch.float32, captions: bool = False
) -> DualEncoder:
    """The two towers that Stage 0 starts from, on the CPU.

    Args:
        captions: with a caption decoder, drawn.

    Raises:
        FileNotFoundError, ValueError: as ``initial_model``.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        decoder = settings.caption_decoder if captions else None
        model = DualEncoder(keye_config(settings), settings.text_tower, decoder).to(dtype)
    siglip = settings.start.siglip
    filled = set() if siglip is None else load_state(model, siglip_towers(siglip, with_text=True))
    _require_sources(model, filled, [] if siglip is None else [siglip], settings)
    return model


@torch.no_grad()
def new_weights(config: KeyeConfig, seed: int) -> Iterator[tuple[str, Tensor]]:
    """What neither SigLIP nor Qwen3 has, float32: the projector, drawn, and a table that nothing reads, zeros."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        projector = Projector(config.vision.hidden_size, config.hidden_size)
        initialize_weights(projector, config.initializer_range)
    for name, parameter in projector.named_parameters():
        yield f"{NEW_IN_KEYE}{name}", parameter
    yield PACKING_TABLE, torch.zeros(PACKING_POSITIONS, config.vision.hidden_size)


def siglip_towers(
    folder: str | Path, with_text: bool, dropped: list[str] | None = None
) -> Iterator[tuple[str, Tensor]]:
    """The towers of a SigLIP checkpoint, under the names of this package.

    Args:
        folder: a SiglipModel, or a SiglipVisionModel.
        with_text: also the text tower, for Stage 0; else it is dropped.
        dropped: filled with the names in the file that are not used.

    Raises:
        ValueError: a tensor that is no part of SigLIP.
    """
    for name, tensor in read_state(folder):
        target = siglip_target(name, folder)
        if target is None or (target.startswith(TEXT_TOWER) and not with_text):
            if dropped is not None:
                dropped.append(name)
        else:
            yield target, tensor


def siglip_target(name: str, folder: str | Path) -> str | None:
    """Name in this package of a tensor of SigLIP; None where it is computed instead.

    Raises:
        ValueError: no part of SigLIP.
    """
    if name.endswith(COMPUTED):
        return None
    if name.startswith("vision_model."):
        return f"visual.{name}"
    if name.startswith(BARE_TOWER):
        return f"visual.vision_model.{name}"
    if name.startswith(TEXT_TOWER):
        return name
    raise ValueError(f"{folder} holds {name}, which is no part of SigLIP: check model.start.siglip")


def qwen3_language(folder: str | Path, tied: bool, dropped: list[str] | None = None) -> Iterator[tuple[str, Tensor]]:
    """A Qwen3 checkpoint; its names are Keye's.

    Args:
        folder: a Qwen3ForCausalLM of any size.
        tied: whether Keye's output matrix is its embedding. Where it is not but Qwen3's is, it starts as a copy.
        dropped: filled with the names in the file that are not used.

    Raises:
        ValueError: a tensor that is no part of Qwen3, or two matrices where ``tied`` leaves room for one.
    """
    has_head = HEAD in list_tensors(folder)
    state = read_state(folder)
    for name, tensor in without_tied_head(state, str(folder), dropped) if tied else state:
        if not name.startswith(("model.", "lm_head.")):
            raise ValueError(f"{folder} holds {name}, which is no part of Qwen3: check model.start.qwen3")
        if name.endswith(COMPUTED):
            if dropped is not None:
                dropped.append(name)
            continue
        yield name, tensor
        if name == EMBEDDINGS and not has_head and not tied:
            yield HEAD, tensor


def without_tied_head(state: NamedTensors, source: str, dropped: list[str] | None = None) -> NamedTensors:
    """Tensors of a model whose output matrix is its embedding: where a file has both, one is enough.

    Raises:
        ValueError: they differ.
    """
    matrices: dict[str, Tensor] = {}
    for name, tensor in state:
        if name in (EMBEDDINGS, HEAD):
            matrices[name] = tensor
        if name != HEAD:
            yield name, tensor
        elif dropped is not None:
            dropped.append(name)
    if len(matrices) == 2 and not torch.equal(*matrices.values()):
        raise ValueError(
            f"{source} has an output matrix of its own, {HEAD}: set tie_word_embeddings=false to keep it "
            "(model.language.tie_word_embeddings in a recipe)"
        )


def _export_weights(export: str | Path) -> Iterator[tuple[str, Tensor]]:
    """Weights of any stage's export; the text tower and caption decoder of Stage 0 stay behind."""
    left = (*TEXT_TOWER, CAPTION_DECODER)
    return ((name, tensor) for name, tensor in read_state(export) if not name.startswith(left))


def _has_language_model(export: str | Path) -> bool:
    return read_json(Path(export) / "config.json").get("architectures") != [DualEncoder.__name__]


def _require_sources(model: nn.Module, filled: set[str], sources: list[str], settings: ModelSettings) -> None:
    """Refuse parameters without a source, but for those that are new in Keye, or random ones that the recipe allows."""
    parts_with_source = {_part(name) for name in filled}  # such a part must be whole

    def may_stay(name: str) -> bool:
        drawn = _part(name) not in parts_with_source
        new = name.startswith((NEW_IN_KEYE, CAPTION_DECODER))
        return name == PACKING_TABLE or (drawn and (settings.start.random or new))

    if settings.start.random or sources:
        require_all(model, filled, " and ".join(sources), may_stay)
    else:
        raise ValueError(
            "the model has no first weights: set model.start.siglip and model.start.qwen3, or model.start.random=true"
        )


def _part(name: str) -> str:
    return name.split(".", 1)[0]
