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
    read: int  # by a forward
    largest: int  # of the largest layer, or of the largest matrix outside the layers, that a forward reads
    groups: tuple[tuple[int, ...], ...]  # of each tensor that learns, by parameter group of the optimizer

    @property
    def learning(self) -> int:
        """All that learn."""
        return sum(map(sum, self.groups))

    @property
    def largest_learning(self) -> int:
        """Of the largest matrix that learns."""
        return max((size for sizes in self.groups for size in sizes), default=0)

    @property
    def largest_group(self) -> int:
        """Of the largest parameter group."""
        return max(map(sum, self.groups), default=0)

    def whole_in_partition(self, ranks: int) -> int:
        """Elements of all tensors of which the fullest partition holds some.

        Each group is flattened and cut into ``ranks`` equal partitions, in its order (DeepSpeed's stages 1 and 2).
        """
        held = [0] * ranks
        for sizes in self.groups:
            length, start = -(-sum(sizes) // ranks), 0
            for size in sizes:
                for rank in range(start // length, -(-(start + size) // length)):
                    held[rank] += size
                start += size
        return max(held)


def parameter_counts(settings: TrainSettings) -> ParameterCounts:
    """Count the model on the meta device."""
    model = meta_model(settings)
    layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    sizes = [sum(parameter.numel() for parameter in layer.parameters()) for layer in layers]
    modules = module_parameters(model)
    read = [parameter.numel() for named in modules.values() for _, parameter in named]
    groups = parameter_groups(modules, settings.stage)
    return ParameterCounts(
        total=sum(parameter.numel() for parameter in model.parameters()),
        read=sum(read),
        largest=max(sizes + read),
        groups=tuple(tuple(parameter.numel() for parameter in group["params"]) for group in groups),
    )
