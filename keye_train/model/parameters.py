"""Which parameters belong to which module of a recipe; activation checkpointing and compiled layers."""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts
from transformers.modeling_layers import GradientCheckpointingLayer

from keye_train.model.attention import keep_out_of_graphs

MODULE_PREFIXES = {
    "visual.": "vision",
    "mlp_AR.": "projector",
    "model.": "language",
    "lm_head.": "language",
    "text_model.": "text_tower",
    "logit_scale": "text_tower",
    "logit_bias": "text_tower",
    "caption_decoder.": "caption_decoder",
}
PACKING_TABLE = "visual.vision_model.embeddings.packing_position_embedding.weight"
POOLING_HEAD = "visual.vision_model.head."


def module_parameters(model: nn.Module) -> dict[str, list[tuple[str, nn.Parameter]]]:
    """Parameters of each module that a stage may train: vision, projector, language, text_tower,
    caption_decoder.

    What no loss reaches is left out, so it stays frozen and out of every optimizer: ``packing_position_embedding``
    always, and the pooling head in a model without a text tower. All others get a gradient from every pack.

    Args:
        model: a KeyeForConditionalGeneration or a DualEncoder.
    """
    modules: dict[str, list[tuple[str, nn.Parameter]]] = {}
    contrastive = hasattr(model, "text_model")
    for name, parameter in model.named_parameters():
        unread = name == PACKING_TABLE or (name.startswith(POOLING_HEAD) and not contrastive)
        if not unread:
            module = next(module for prefix, module in MODULE_PREFIXES.items() if name.startswith(prefix))
            modules.setdefault(module, []).append((name, parameter))
    return modules


def enable_activation_checkpointing(model: nn.Module, selective: bool = False) -> None:
    """Keep only the input of each layer of every tower; the backward computes the rest again.

    Args:
        model: a KeyeForConditionalGeneration or a DualEncoder.
        selective: keep the results of attention too, [T, W] for each layer. They are what grows with the square of a
            sample's length to compute, and as small as the input (Korthikanti et al., arXiv 2205.05198, section 5,
            recompute attention instead, which then formed its weights; a fused kernel does not).
    """
    contexts: dict[str, Any] = (
        {"context_fn": partial(create_selective_checkpoint_contexts, _keep_attention)} if selective else {}
    )
    function = partial(checkpoint, use_reentrant=False, **contexts)
    for module in model.modules():
        if isinstance(module, GradientCheckpointingLayer):
            module.gradient_checkpointing = True
            module._gradient_checkpointing_func = function  # type: ignore[assignment]


def _keep_attention(_: Any, operator: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    """The kernels of every back end: aten's flash, memory-efficient and CPU ones, torch's varlen, flash-attn."""
    name = str(operator)
    kept = "attention" in name or "attn" in name
    return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE


def compile_layers(model: nn.Module, backend: str = "inductor") -> None:
    """Compile each layer of every tower, around its attention, for packs of any length: once, not once per pack.

    Not together with activation checkpointing, inside which torch compiles nothing.

    Args:
        backend: of torch.compile; inductor needs a C++ compiler on a CPU, Triton on a GPU.
    """
    keep_out_of_graphs()
    for module in model.modules():
        if isinstance(module, GradientCheckpointingLayer):
            module.compile(backend=backend, dynamic=True)
