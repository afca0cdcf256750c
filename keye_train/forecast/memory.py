"""Memory of one rank, part by part, from parameter counts, ZeRO stage and the activations of its fullest pack.

Legend: A all parameters, L those that learn, N ranks, w bytes of a working weight (2 with bf16, else 4). Where
DeepSpeed 0.19 puts things (``training.engine`` drives it):

==========  ==================================  =============================  ============================
ZeRO stage  weights                             sum of gradients               optimizer
==========  ==================================  =============================  ============================
0           w A                                 4 L                            8 L
1           w A + 4 L / N of masters            4 L                            8 L / N
2           w A + 4 L / N of masters            4 L / N                        8 L / N
3           w A / N + 4 L / N of masters        4 L / N                        8 L / N
==========  ==================================  =============================  ============================

With bf16 stage 1 keeps its gradients in 16 bits too. What comes beside the sum of gradients, and when, has its own
module (``forecast.gradients``). A moving average of the weights adds 4 L / N (stage 0: 4 L) to the optimizer. At
stage 3 layers are gathered while they run.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

from keye_train.forecast.activations import Activations, PackShape
from keye_train.forecast.gradients import Moment, gradient_memory
from keye_train.forecast.parameters import ParameterCounts
from keye_train.model.loss import CHUNK_LOGITS
from keye_train.settings import ActivationCheckpointing, Objective, Precision, StageSettings, TrainSettings

GB = 1e9

REUSED_WITHIN = 1_000_000_000
"""Elements; DeepSpeed's default of ``stage3_max_reuse_distance``."""


@dataclass(frozen=True)
class DeviceMemory:
    """Bytes of one rank at the peak of a step. Every field is one part; see the module."""

    weights: float
    gradients: float  # summed over micro-batches
    reduced: float  # gradients beside the sum: of the last micro-batch, or copied for a collective or the update
    optimizer: float
    gathered: float  # ZeRO-3: whole layers; autocast: copies of weights in 16 bits
    buckets: float  # of collectives
    activations: float  # kept for the backward
    workspace: float  # of the backward of the loss or of a layer

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
    """Peak of one rank: what it holds at that of three moments of a step (:class:`Moment`) when it holds most.

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
    held = []
    for moment in Moment:
        gradients = gradient_memory(moment, settings, counts, ranks, micro_steps)
        kept, workspace = _backward(moment, settings, counts, activations, pack)
        held.append(
            DeviceMemory(
                weights=(0.0 if ds.offload_parameters else weights) + (0.0 if ds.offload_optimizer else masters),
                gradients=gradients.summed,
                reduced=gradients.reduced,
                optimizer=0.0 if ds.offload_optimizer else moments,
                gathered=0.0 if moment is Moment.update else _gathered(settings, counts, width, ranks),
                buckets=gradients.buckets,
                activations=kept,
                workspace=workspace,
            )
        )
    return max(held, key=lambda parts: parts.total)


def _backward(
    moment: Moment, settings: TrainSettings, counts: ParameterCounts, activations: Activations, pack: PackShape
) -> tuple[float, float]:
    """Bytes of activations and of workspace at a moment of the backward."""
    checkpointing = settings.stage.activation_checkpointing
    if moment is Moment.update:
        return 0.0, 0.0
    if moment is Moment.loss:
        # A frozen layer above those that learn passes gradients on and makes none.
        layer = layer_workspace(activations, pack, checkpointing)
        return activations.kept(pack, checkpointing), max(loss_workspace(settings, pack), layer)
    width = 2 if settings.deepspeed.precision == Precision.bf16 else 4
    beside = _beside_gradients(activations, settings.stage)
    workspace = layer_workspace(beside, pack, checkpointing) + width * counts.largest_learning
    return beside.kept(pack, checkpointing), workspace


def _beside_gradients(activations: Activations, stage: StageSettings) -> Activations:
    """What is still kept when the first gradient is there: the backward of a frozen language model is over by then."""
    if stage.objective == Objective.contrastive or "language" in stage.trainable:
        return activations
    return replace(activations, towers=tuple(tower for tower in activations.towers if tower.name != "language"))


def host_memory(settings: TrainSettings, counts: ParameterCounts, ranks: int, ranks_per_node: int) -> HostMemory:
    """Peak of one node."""
    ds = settings.deepspeed
    width = 2 if ds.precision == Precision.bf16 else 4
    of_rank = 0.0
    average = 4 if settings.stage.optimizer.ema_decay else 0
    if ds.offload_optimizer:  # masters, moments, and gradients twice: their sum, and what AdamW is given
        of_rank += (4 + 8 + 2 * 4 + average) * counts.learning / ranks
    if ds.offload_parameters and ds.nvme_path is None:
        of_rank += width * counts.total / ranks
    copied = (12 + average) * counts.learning / ranks if settings.checkpoint.background else 0.0
    return HostMemory(4.0 * counts.total * ranks_per_node, of_rank * ranks_per_node, copied * ranks_per_node)


def loss_workspace(settings: TrainSettings, pack: PackShape) -> float:
    """Bytes that the backward of the loss needs beside what the forward kept.

    Of the token loss (``model.loss``): one block of logits in float32, in half precision a copy beside it, and the
    gradient of the hidden states in float32. Where the output matrix learns, its gradient, and the product that is
    written into it, of one block.
    """
    stage = settings.stage
    if stage.objective == Objective.contrastive:
        pairs = max(1, pack.tokens // settings.model.text_tower.max_tokens)
        return 3.0 * 4 * pairs**2  # logits, losses and their gradient, one rank's captions at a time
    language, precision = settings.model.language, settings.deepspeed.precision
    width = 2 if precision == Precision.bf16 else 4
    computed = 4 if precision == Precision.fp32 else 2
    columns = min(language.vocab_size, CHUNK_LOGITS // max(pack.labelled, language.hidden_size))
    logits = pack.labelled * columns * (4 + (computed if computed == 2 else 0))
    cast = columns * language.hidden_size * computed if computed != width else 0
    found = float(logits + 4 * pack.labelled * language.hidden_size + cast)
    if "language" in stage.trainable:
        found += language.hidden_size * (language.vocab_size * width + columns * computed)
    return found


def layer_workspace(activations: Activations, pack: PackShape, checkpointing: ActivationCheckpointing) -> float:
    """Bytes of the backward of one layer without those of its weights: gradients of about half of what it keeps.

    Where the layer is computed again, what it keeps then comes on top; else that is counted as kept already.
    """
    again = checkpointing != ActivationCheckpointing.none
    return (1.5 if again else 0.5) * activations.largest_layer(pack)


def _gathered(settings: TrainSettings, counts: ParameterCounts, width: int, ranks: int) -> float:
    """Weights beside those that a rank owns.

    With autocast the copies in 16 bits that the forward makes and the backward needs, of whole weights at every stage.
    At stage 3 the largest layer and the one before it, or, where that is more, the layers that DeepSpeed keeps over the
    turn from forward to backward because they are used again within :data:`REUSED_WITHIN` elements
    (``__params_to_release``): each of them counts on the way there and on the way back. And what is fetched ahead.
    """
    ds = settings.deepspeed
    cast = 2.0 * counts.read if ds.precision == Precision.bf16_autocast else 0.0
    if ds.zero_stage != 3 or (ranks == 1 and not ds.offload_parameters):  # a single rank works on its own partition
        return cast
    kept = max(REUSED_WITHIN // 2, 2 * counts.largest)
    return cast + width * float(min(counts.read, kept + ds.bucket_elements))
