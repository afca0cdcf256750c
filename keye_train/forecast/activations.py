"""What a forward keeps for its backward, counted on the model itself: run on the meta device, where tensors have
shapes and no values.

Kept bytes are linear in the tokens T, patches P and labelled tokens K of a pack, since the fused attention keeps no
matrix of pairs. So four small forwards of a shallow model give the coefficients for packs and depths of any size.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

from keye_train.model.packed import ContrastiveInputs, PackedInputs, VisionInputs
from keye_train.settings import ActivationCheckpointing, Objective, Precision, TrainSettings
from keye_train.training.build import meta_model

PROBES = ((512, 256, 128), (1024, 256, 128), (512, 512, 128), (512, 256, 256))
"""(T, P, K) of the forwards that are run."""

SHALLOW_LAYERS = 2
"""Layers of each tower in the forwards: the first also keeps what lies before it, the second is like all others."""


@dataclass(frozen=True)
class PackShape:
    """Sizes of one pack."""

    tokens: int  # language tokens; Stage 0: caption tokens with their padding
    patches: int
    labelled: int  # labelled tokens; Stage 0: no meaning


@dataclass(frozen=True)
class Linear:
    """Bytes as a linear function of a pack."""

    constant: float
    token: float
    patch: float
    labelled: float

    def __call__(self, pack: PackShape) -> float:
        """Bytes of this pack."""
        return self.constant + self.token * pack.tokens + self.patch * pack.patches + self.labelled * pack.labelled


@dataclass(frozen=True)
class Tower:
    """Layers of one kind: what each keeps, and the size of its input."""

    name: str
    layers: int
    kept: Linear  # of one layer
    passed: Linear  # the hidden states that enter it

    def stays(self, pack: PackShape, checkpointing: ActivationCheckpointing) -> float:
        """Bytes that one layer keeps from forward to backward."""
        if checkpointing == ActivationCheckpointing.none or not self.kept(pack):  # a frozen tower keeps nothing
            return self.kept(pack)
        # Selective: the result of attention too, which is as large as the input.
        return self.passed(pack) * (2 if checkpointing == ActivationCheckpointing.selective else 1)


@dataclass(frozen=True)
class Activations:
    """What a forward keeps; evaluate it for a pack."""

    towers: tuple[Tower, ...]
    rest: Linear  # outside the layers: pixels, embeddings, projector, losses

    def kept(self, pack: PackShape, checkpointing: ActivationCheckpointing) -> float:
        """Bytes alive when the backward begins."""
        return self.rest(pack) + sum(tower.layers * tower.stays(pack, checkpointing) for tower in self.towers)

    def largest_layer(self, pack: PackShape) -> float:
        """Bytes that the layer which keeps most has while its backward runs, whether it kept or computed them anew."""
        return max((tower.kept(pack) for tower in self.towers), default=0.0)


def trace(settings: TrainSettings) -> Activations:
    """Count what the forward of a stage keeps, in the precision of the recipe."""
    contrastive = settings.stage.objective == Objective.contrastive
    model = _working_model(_shallow(settings))
    probes = _pair_probes(settings) if contrastive else [(PackShape(*sizes), _packed(*sizes)) for sizes in PROBES]
    counted = [_kept_by_layer(model, inputs, contrastive) for _, inputs in probes]
    # Stage 0 has no labelled tokens of its own: their column is left out.
    matrix = np.array([[1, pack.tokens, pack.patches, pack.labelled][: len(probes)] for pack, _ in probes], dtype=float)

    def solve(values: Sequence[float]) -> Linear:
        found = np.linalg.solve(matrix, np.array(values, dtype=float))
        return Linear(*(float(x) for x in [*found, 0.0][:4]))

    towers = []
    rest = np.array([sum(size for name, size in one.items() if not name.startswith("#")) for one in counted])
    depths = _depths(settings, contrastive)
    for second in sorted(name for name in counted[0] if name.endswith(".1") and not name.startswith("#")):
        kept, passed = ([one[f"{mark}{second}"] for one in counted] for mark in ("", "#"))
        towers.append(Tower(kind := _kind(second, contrastive), depths[kind], solve(kept), solve(passed)))
        rest = rest - SHALLOW_LAYERS * np.array(kept)
    return Activations(tuple(towers), solve(rest.tolist()))


def _depths(settings: TrainSettings, contrastive: bool) -> dict[str, int]:
    model = settings.model
    if contrastive:
        text, decoder = model.text_tower.num_hidden_layers, model.caption_decoder.num_hidden_layers
        return {"vision": model.vision.num_hidden_layers, "text": text, "decoder": decoder}
    return {"vision": model.vision.num_hidden_layers, "language": model.language.num_hidden_layers}


def _shallow(settings: TrainSettings) -> TrainSettings:
    shallow = deepcopy(settings)
    model = shallow.model
    for part in (model.vision, model.language, model.text_tower, model.caption_decoder):
        part.num_hidden_layers = SHALLOW_LAYERS
    return shallow


def _kind(layer: str, contrastive: bool) -> str:
    if layer.startswith("visual."):
        return "vision"
    if not contrastive:
        return "language"
    return "decoder" if "decoder" in layer else "text"


def _working_model(settings: TrainSettings) -> nn.Module:
    """On the meta device, in the precision of the recipe.

    Under autocast products run in bf16 too; what the norms keep in float32 there is not told apart.
    """
    model = meta_model(settings)
    if settings.deepspeed.precision != Precision.fp32:
        model = nn.Module.to(model, torch.bfloat16)
    return model.train()


def _kept_by_layer(model: nn.Module, inputs: Any, contrastive: bool) -> dict[str, float]:
    """Bytes kept inside each layer and outside of all (``""``); under ``#NAME`` the input of a layer."""
    weights = {parameter.untyped_storage()._cdata for parameter in model.parameters()}
    kept: dict[str, float] = {"": 0.0}
    seen: dict[int, Any] = {}  # holds the storages, so that no number is used twice
    inside = [""]

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in weights and storage._cdata not in seen:
            seen[storage._cdata] = storage
            kept[inside[-1]] = kept.get(inside[-1], 0.0) + storage.nbytes()
        return tensor

    with _layer_names(model, inside, kept), torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(inputs) if contrastive else model(packed=inputs)
    return kept


@contextmanager
def _layer_names(model: nn.Module, inside: list[str], kept: dict[str, float]) -> Iterator[None]:
    """While open, the last of ``inside`` is the name of the layer that runs."""
    handles = []
    for name, module in model.named_modules():
        if isinstance(module, GradientCheckpointingLayer):

            def enter(_: nn.Module, arguments: tuple[Any, ...], name: str = name) -> None:
                inside.append(name)
                kept.setdefault(name, 0.0)
                kept[f"#{name}"] = float(arguments[0].nbytes)

            def leave(*_: Any) -> None:
                inside.pop()

            handles += [module.register_forward_pre_hook(enter), module.register_forward_hook(leave)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _vision(grids: list[list[int]]) -> VisionInputs:
    sizes = [t * h * w for t, h, w in grids]
    patches, borders = _empty(sum(sizes), 3, 14, 14, dtype=torch.uint8), _empty(len(sizes) + 1, dtype=torch.int32)
    return VisionInputs(patches, torch.tensor(grids), borders, max(sizes))


def _packed(tokens: int, patches: int, labelled: int) -> PackedInputs:
    """One sample with one picture of four rows."""
    return PackedInputs(
        input_ids=_empty(tokens),
        labels=_empty(tokens),
        position_ids=_empty(3, tokens),
        cu_seqlens=_empty(2, dtype=torch.int32),
        max_seqlen=tokens,
        vision=_vision([[1, 4, patches // 4]]),
        vision_rows=_empty(patches // 4),
        loss_rows=_empty(labelled),
        loss_targets=_empty(labelled),
        loss_samples=_empty(labelled),
    )


def _pair_probes(settings: TrainSettings) -> list[tuple[PackShape, ContrastiveInputs]]:
    """Pairs of a caption of ``text_tower.max_tokens`` and a picture of 2 rows."""
    length = settings.model.text_tower.max_tokens
    probes = []
    for pairs, width in ((8, 16), (16, 16), (8, 32)):
        vision = _vision([[1, 2, width]] * pairs)
        patches, tokens = 2 * width * pairs, pairs * length
        captions = None
        if settings.stage.caption_weight:
            captions = replace(_packed(patches // 4 + tokens, patches, tokens), vision=vision)
        probes.append((PackShape(tokens, patches, 0), ContrastiveInputs(vision, _empty(pairs, length), captions)))
    return probes


def _empty(*shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")
