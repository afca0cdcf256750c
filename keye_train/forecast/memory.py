"""Memory of one rank, part by part, from parameter counts, ZeRO stage and the activations of its fullest pack.

Legend: A all parameters, L those that learn, N ranks, w bytes of a working weight (2 with bf16, else 4). Where
DeepSpeed 0.19 puts things (``training.engine`` drives it):

==========  ==================================  =============================  ============================
ZeRO stage  weights                             gradients                      optimizer
==========  ==================================  =============================  ============================
0           w A                                 4 L                            8 L
1           w A + 4 L / N of masters            4 L                            8 L / N
2           w A + 4 L / N of masters            4 L / N, and buckets           8 L / N
3           w A / N + 4 L / N of masters        4 L / N, and buckets           8 L / N
==========  ==================================  =============================  ============================

A moving average of the weights adds 4 L / N (stage 0: 4 L) to the optimizer. At stage 3 layers are gathered while they
run.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

from keye_train.forecast.activations import Activations, PackShape
from keye_train.model.loss import CHUNK_LOGITS
from keye_train.settings import Objective, Precision, TrainSettings

GB = 1e9


@dataclass(frozen=True)
class ParameterCounts:
    """Parameters of the model in training."""

    total: int
    learning: int
    largest: int  # of the largest layer, or of the largest matrix outside the layers


@dataclass(frozen=True)
class DeviceMemory:
    """Bytes of one rank at the peak of a step. Every field is one part; see the module."""

    weights: float
    gradients: float
    optimizer: float
    gathered: float  # ZeRO-3: whole layers; autocast: copies of weights in 16 bits
    buckets: float  # of collectives
    activations: float  # kept for the backward
    workspace: float  # of the loss, or of a layer that is computed again

    @property
    def total(self) -> float:
        """All parts."""
        return sum(getattr(self, field.name) for field in fields(self))


@dataclass(frozen=True)
class HostMemory:
    """Bytes of one node's host memory at its peak, all ranks of the node together; readers come on top."""

    start: float  # the model in float32, once for each rank, before it is partitioned
    offloaded: float  # weights and optimizer that live there during training
    checkpoint: float  # the copy that is written while training goes on

    @property
    def total(self) -> float:
        """Of start and training the larger: the start is over when training begins."""
        return max(self.start, self.offloaded + self.checkpoint)


def device_memory(
    settings: TrainSettings,
    counts: ParameterCounts,
    activations: Activations,
    pack: PackShape,
    ranks: int,
    micro_steps: int,
) -> DeviceMemory:
    """Peak of one rank.

    Args:
        settings: of the run.
        counts: of its model.
        activations: of its forward.
        pack: the fullest one.
        ranks: of the whole run.
        micro_steps: micro-batches of one optimizer step.
    """
    ds, stage = settings.deepspeed, settings.deepspeed.zero_stage
    width = 2 if ds.precision == Precision.bf16 else 4
    parts = ranks if stage else 1
    masters = 4 * counts.learning / ranks if stage else 0.0
    moments = (8 + (4 if settings.stage.optimizer.ema_decay else 0)) * counts.learning / parts
    weights = width * counts.total / (ranks if stage == 3 else 1)
    # Where gradients live in the parameters (stage 0), the first micro-batch finds none.
    gradients = 4 * counts.learning / (ranks if stage >= 2 else 1)
    kept = activations.kept(pack, settings.stage.activation_checkpointing)
    workspace = max(loss_workspace(settings, pack, width), layer_workspace(activations, pack, counts, width))
    if stage == 0 and micro_steps == 1:
        # Gradients appear while activations go: never all of both.
        gradients, kept, workspace = _either(gradients, kept, workspace)
    optimizer_on_host, weights_on_host = ds.offload_optimizer, ds.offload_parameters
    return DeviceMemory(
        weights=(0.0 if weights_on_host else weights) + (0.0 if optimizer_on_host else masters),
        gradients=0.0 if optimizer_on_host and stage >= 2 else gradients,
        optimizer=0.0 if optimizer_on_host else moments,
        gathered=_gathered(settings, counts, width),
        buckets=_buckets(settings, counts, width, ranks),
        activations=kept,
        workspace=workspace,
    )


def host_memory(settings: TrainSettings, counts: ParameterCounts, ranks: int, ranks_per_node: int) -> HostMemory:
    """Peak of one node."""
    ds = settings.deepspeed
    width = 2 if ds.precision == Precision.bf16 else 4
    of_rank = 0.0
    average = 4 if settings.stage.optimizer.ema_decay else 0
    if ds.offload_optimizer:  # masters, moments, gradients
        of_rank += (4 + 8 + 4 + average) * counts.learning / ranks
    if ds.offload_parameters:
        of_rank += width * counts.total / ranks
    copied = (12 + average) * counts.learning / ranks if settings.checkpoint.background else 0.0
    return HostMemory(4.0 * counts.total * ranks_per_node, of_rank * ranks_per_node, copied * ranks_per_node)


def loss_workspace(settings: TrainSettings, pack: PackShape, width: int) -> float:
    """Bytes that the loss needs beside what it keeps.

    The token loss holds one block of logits in float32, in half precision a copy beside it, and the gradient of the
    hidden states in float32; and the gradient of the output matrix until it is taken over.
    """
    stage = settings.stage
    if stage.objective == Objective.contrastive:
        pairs = max(1, pack.tokens // settings.model.text_tower.max_tokens)
        return 3.0 * 4 * pairs**2  # logits, losses and their gradient, one rank's captions at a time
    language = settings.model.language
    block = min(CHUNK_LOGITS, pack.labelled * language.vocab_size)
    matrix = language.vocab_size * language.hidden_size * width if "language" in stage.trainable else 0
    return block * (4 + (width if width == 2 else 0)) + 4.0 * pack.labelled * language.hidden_size + matrix


def layer_workspace(activations: Activations, pack: PackShape, counts: ParameterCounts, width: int) -> float:
    """Bytes of the backward of one layer: gradients of about half of what it keeps, and those of its weights.

    Where the layer is computed again, what it keeps then comes on top; else that is counted as kept already.
    """
    return 1.5 * activations.largest_layer(pack) + width * counts.largest


def _either(gradients: float, kept: float, workspace: float) -> tuple[float, float, float]:
    if gradients > kept + workspace:
        return gradients, 0.0, 0.0
    return 0.0, kept, workspace


def _gathered(settings: TrainSettings, counts: ParameterCounts, width: int) -> float:
    ds = settings.deepspeed
    if ds.precision == Precision.bf16_autocast:
        return 2.0 * counts.total  # copies that the forward makes and the backward needs
    if ds.zero_stage != 3:
        return 0.0
    return width * float(min(counts.total, 2 * counts.largest + ds.bucket_elements))


def _buckets(settings: TrainSettings, counts: ParameterCounts, width: int, ranks: int) -> float:
    """What collectives gather before they are sent; two of them where they overlap with computation."""
    ds = settings.deepspeed
    if ds.zero_stage == 0:
        return 0.0
    elements = min(ds.bucket_elements, counts.learning)
    return float(width * elements * (2 if ds.overlap_comm else 1))
