"""AdamW over parameter groups: one group for each module and kind of decay. Frozen parameters are in none."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn

from keye_train.settings import OptimizerSettings, StageSettings
from keye_train.training.schedule import factor

NamedParameters = Iterable[tuple[str, nn.Parameter]]

TOWER_LAYER = re.compile(r"^visual\.vision_model\.encoder\.layers\.(\d+)\.")
TOWER_EMBEDDINGS = "visual.vision_model.embeddings."


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
        layered = module == "vision" and stage.optimizer.vision_layer_decay < 1
        depths = tower_depths([name for name, _ in trained]) if layered else {}
        for depth in sorted(set(depths.values())) or [0]:
            lr = stage.optimizer.rate(module) * stage.optimizer.vision_layer_decay**depth
            for decayed in (True, False):
                chosen = [p for name, p in trained if depths.get(name, 0) == depth and decays(name, p) is decayed]
                if chosen:
                    kind = "decay" if decayed else "no_decay"
                    groups.append(
                        {
                            "name": f"{module}-{depth}/{kind}" if layered else f"{module}/{kind}",
                            "module": module,
                            "params": chosen,
                            "lr": lr,
                            "base_lr": lr,
                            "weight_decay": stage.optimizer.decay(module) if decayed else 0.0,
                        }
                    )
    return groups


def tower_depths(names: Iterable[str]) -> dict[str, int]:
    """How far below the end of the vision tower each of its parameters lies (BEiT, arXiv 2106.08254, appendix).

    0 for the norm behind the layers and the pooling head, 1 for the last of L layers, L for the first, L + 1 for the
    embeddings.
    """
    listed = list(names)
    layer_of = {name: int(found[1]) for name in listed if (found := TOWER_LAYER.match(name))}
    layers = 1 + max(layer_of.values())
    return {
        name: layers - layer_of[name] if name in layer_of else (layers + 1) * name.startswith(TOWER_EMBEDDINGS)
        for name in listed
    }


def build_optimizer(groups: list[dict[str, Any]], settings: OptimizerSettings) -> torch.optim.AdamW:
    """torch's fused AdamW: as fast as DeepSpeed's own on CPU and GPU, and nothing is compiled at start-up."""
    beta1, beta2 = settings.betas
    return torch.optim.AdamW(groups, lr=settings.lr, betas=(beta1, beta2), eps=settings.eps, fused=True)


def set_learning_rates(optimizer: Any, step: int, stage: StageSettings) -> dict[str, float]:
    """Set every group's learning rate for ``step``; return the largest of each module."""
    scale = factor(step, stage)
    rates: dict[str, float] = {}
    for group in optimizer.param_groups:
        group["lr"] = group["base_lr"] * scale
        rates[group["module"]] = max(rates.get(group["module"], 0.0), group["lr"])
    return rates
