"""Sizes of the model in training."""

from __future__ import annotations

from dataclasses import dataclass

from transformers.modeling_layers import GradientCheckpointingLayer

from keye_train.model import module_parameters
from keye_train.settings import TrainSettings
from keye_train.training.build import meta_model
from keye_train.training.optimizer import parameter_groups


@dataclass(frozen=True)
class ParameterCounts:
    """Parameters of the model in training."""

    total: int
    learning: int
    largest: int  # of the largest layer, or of the largest matrix outside the layers, whether it learns or not
    largest_learning: int  # of the largest matrix that learns
    largest_group: int  # of the largest parameter group of the optimizer


def parameter_counts(settings: TrainSettings) -> ParameterCounts:
    """Count the model on the meta device."""
    model = meta_model(settings)
    layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    sizes = [sum(parameter.numel() for parameter in layer.parameters()) for layer in layers]
    sizes += [parameter.numel() for parameter in model.parameters()]
    learning = [parameter.numel() for parameter in model.parameters() if parameter.requires_grad]
    groups = parameter_groups(module_parameters(model), settings.stage)
    return ParameterCounts(
        total=sum(parameter.numel() for parameter in model.parameters()),
        learning=sum(learning),
        largest=max(sizes),
        largest_learning=max(learning, default=0),
        largest_group=max((sum(p.numel() for p in group["params"]) for group in groups), default=0),
    )
