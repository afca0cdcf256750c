"""First weights: SigLIP's scheme in its towers, but for the position table; elsewhere ``initializer_range``."""

from __future__ import annotations

import math
from functools import partial

import torch
from torch import Tensor, nn
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm

from keye_train.model.vision import (
    EncoderAttention,
    EncoderMLP,
    PatchEmbedding,
    PoolingAttention,
    PoolingHead,
    PositionTable,
)

SIGLIP_BIAS_STD = 1e-6


def initialize_weights(model: nn.Module, std: float) -> None:
    """Set all parameters of a model that is not a transformers model; see ``initialize_module``."""
    model.apply(partial(initialize_module, std=std))


def sine_positions(side: int, width: int) -> Tensor:
    """A position table of plane waves: [side * side, width] float32, rows of the square first.

    Half of the channels follow the row, half the column, with wavelengths from twice the table down to four places.
    SigLIP begins with noise of standard deviation width ** -0.5. Beside patch embeddings of variance 1 that is too
    faint: a tower that begins with nothing then takes three times as many steps to read a digit, and neighbouring rows
    have nothing in common, so what one image size teaches is lost when the table is stretched to another.
    """
    quarter = -(-width // 4)
    waves = torch.linspace(1.0, max(1.0, side / 2), quarter) * math.pi / side
    angles = (torch.arange(side) + 0.5)[:, None] * waves
    along = torch.cat([angles.sin(), angles.cos()], dim=1)
    table = torch.cat([along[:, None].expand(side, side, -1), along[None].expand(side, side, -1)], dim=2)
    return table.reshape(side * side, -1)[:, :width]


@torch.no_grad()
def initialize_module(module: nn.Module, std: float) -> None:
    """Set the parameters of one module; called for every module, children before parents.

    Args:
        module: parents may overwrite what their children got.
        std: standard deviation of matrices and embeddings outside the SigLIP towers.
    """
    if isinstance(module, EncoderAttention | PoolingAttention):
        for name, parameter in module.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(parameter)
            else:
                nn.init.xavier_uniform_(parameter)
    elif isinstance(module, EncoderMLP):
        for linear in (module.fc1, module.fc2):
            nn.init.xavier_uniform_(linear.weight)
            nn.init.normal_(linear.bias, std=SIGLIP_BIAS_STD)
    elif isinstance(module, PoolingHead):
        nn.init.xavier_uniform_(module.probe)
    elif isinstance(module, PatchEmbedding):  # LeCun normal
        nn.init.normal_(module.weight, std=1 / math.sqrt(module.weight[0].numel()))
        assert module.bias is not None
        nn.init.zeros_(module.bias)
    elif isinstance(module, PositionTable):
        module.weight.copy_(sine_positions(math.isqrt(module.num_embeddings), module.embedding_dim))
    elif isinstance(module, nn.Linear):
        nn.init.normal_(module.weight, std=std)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, nn.Embedding):
        nn.init.normal_(module.weight, std=std)
    elif isinstance(module, nn.LayerNorm):
        nn.init.ones_(module.weight)
        nn.init.zeros_(module.bias)
    elif isinstance(module, Qwen3RMSNorm):
        nn.init.ones_(module.weight)
