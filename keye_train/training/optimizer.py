"""AdamW over parameter groups: one group for each module and kind of decay. Frozen parameters are in none."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn

from keye_train.settings import OptimizerSettings, StageSettings
from keye_train.training.schedule import factor

NamedParameters = Iterable[tuple[str, nn.Parameter]]


def decays(name: str, parameter: nn.Parameter) -> bool:
    """Whether weight decay applies: to matrices and kernels, never to biases, norms and other vectors."""
    return parameter.ndim >= 2 and not name.endswith("bias")


def parameter_groups(modules: Mapping[str, NamedParameters], stage: StageSettings) -> list[dict[str, Any]]:
    """Groups for AdamW, each ``{"name", "module", "params", "lr", "base_lr", "weight_decay"}``.

    Must run before the engine partitions the model: under ZeRO-3 shapes are gone afterwards.

    Args:
        modules: module name (vision, projector, language, text_tower) -> its named parameters.
        stage: names the trainable modules and their learning rates.
    """
    groups = []
    for module, parameters in modules.items():
        if module not in stage.trainable:
            continue
        trained = [(name, parameter) for name, parameter in parameters if parameter.requires_grad]
        lr = stage.optimizer.rate(module)
        for decayed in (True, False):
            chosen = [parameter for name, parameter in trained if decays(name, parameter) is decayed]
            if chosen:
                groups.append(
                    {
                        "name": f"{module}/{'decay' if decayed else 'no_decay'}",
                        "module": module,
                        "params": chosen,
                        "lr": lr,
                        "base_lr": lr,
                        "weight_decay": stage.optimizer.weight_decay if decayed else 0.0,
                    }
                )
    return groups


def build_optimizer(groups: list[dict[str, Any]], settings: OptimizerSettings) -> torch.optim.AdamW:
    """torch's fused AdamW: as fast as DeepSpeed's own on CPU and GPU, and nothing is compiled at start-up."""
    beta1, beta2 = settings.betas
    return torch.optim.AdamW(groups, lr=settings.lr, betas=(beta1, beta2), eps=settings.eps, fused=True)


def set_learning_rates(optimizer: Any, step: int, stage: StageSettings) -> dict[str, float]:
    """Set every group's learning rate for ``step``; return it by module."""
    scale = factor(step, stage)
    rates = {}
    for group in optimizer.param_groups:
        group["lr"] = group["base_lr"] * scale
        rates[group["module"]] = group["lr"]
    return rates
