"""First weights: SigLIP's scheme in its towers, normal with ``initializer_range`` everywhere else."""

from __future__ import annotations

import math
from functools import partial

import torch
from torch import nn
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
        nn.init.normal_(module.weight, std=module.embedding_dim**-0.5)
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
