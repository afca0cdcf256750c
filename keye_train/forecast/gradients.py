"""Gradients of one rank in the course of a step: sums, what is reduced at the moment, and buckets, for each ZeRO stage.

Read from DeepSpeed 0.19 (``runtime/engine.py``, ``runtime/zero/stage_1_and_2.py`` and ``stage3.py``), as
``training.engine`` drives it. Legend: L parameters that learn, M the largest matrix of them, N ranks, B
``deepspeed.bucket_elements``, w bytes of a working weight (2 with bf16, else 4).
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from keye_train.forecast.parameters import ParameterCounts
from keye_train.settings import Precision, TrainSettings

REDUCED_AT_ONCE = 500_000_000
"""Elements of one all-reduce at stage 0, and with bf16 at stage 1: ``MEMORY_OPT_ALLREDUCE_SIZE`` of DeepSpeed's engine,
which begins another one when a tensor has exceeded them."""

UPDATED_AT_ONCE = 1_000_000_000
"""Elements of one rank in one update at stage 3: DeepSpeed's default of ``sub_group_size``."""

NORM_BYTES = 8
"""Norms are taken of a copy in float64, one tensor after the other (``get_norm_dtype``)."""


class Moment(Enum):
    """When a rank may hold most. In the first two it is the last micro-batch of the step."""

    loss = "the backward begins; the micro-batch has no gradient yet"
    layers = "the backward is under way"
    update = "the backward is done, its activations are gone"


@dataclass(frozen=True)
class GradientMemory:
    """Bytes of one rank on its device."""

    summed: float  # over the micro-batches of the step
    reduced: float  # of the last micro-batch beside the sum, or copied for reduction, norm or update
    buckets: float  # of collectives


def gradient_memory(
    moment: Moment, settings: TrainSettings, counts: ParameterCounts, ranks: int, micro_steps: int
) -> GradientMemory:
    """Gradients at one moment of a step of ``micro_steps`` micro-batches; see the functions below by ZeRO stage."""
    by_stage = (_whole_everywhere, _sharded_optimizer, _sharded_gradients, _sharded_weights)
    return by_stage[settings.deepspeed.zero_stage](moment, settings, counts, ranks, micro_steps)


def _whole_everywhere(
    moment: Moment, settings: TrainSettings, counts: ParameterCounts, ranks: int, micro_steps: int
) -> GradientMemory:
    """Stage 0: 4 L in ``parameter.grad``, which the first micro-batch makes while its activations go; after the last
    ``buffered_allreduce_fallback`` copies them into one flat tensor of up to :data:`REDUCED_AT_ONCE` elements, on a
    single rank as well."""
    del settings, ranks
    if moment is Moment.update:
        return GradientMemory(4.0 * counts.learning, 4.0 * min(counts.learning, REDUCED_AT_ONCE), 0.0)
    return GradientMemory(4.0 * counts.learning if micro_steps > 1 else 0.0, 0.0, 0.0)


def _sharded_optimizer(
    moment: Moment, settings: TrainSettings, counts: ParameterCounts, ranks: int, micro_steps: int
) -> GradientMemory:
    """Stage 1: 4 L as at stage 0, at the end copied through a bucket into this rank's partition, 4 L / N
    (``copy_grads_in_partition``; where bf16 is offloaded ``_build_compact_grad_partition_buffer``): after the last
    backward, or with ``overlap_comm`` while it runs. The bucket is float32 with bf16 too
    (``_gradient_reduction_buffer_dtype``), and is kept from the first gradient of a step to the last."""
    ds = settings.deepspeed
    if ds.precision == Precision.bf16 and not ds.offload_optimizer:
        return _sharded_optimizer_in_bf16(moment, counts, micro_steps)
    partition = 0.0 if ds.offload_optimizer else 4.0 * counts.learning / ranks
    buckets, copy = _contiguous_buckets(settings, counts, 4, ranks)
    if moment is Moment.update:
        return GradientMemory(4.0 * counts.learning, partition, buckets + copy)
    summed = 4.0 * counts.learning if micro_steps > 1 else 0.0
    if moment is Moment.loss:
        return GradientMemory(summed, 0.0, buckets if micro_steps > 1 else 0.0)
    return GradientMemory(summed, partition if ds.overlap_comm else 0.0, buckets + (copy if ds.overlap_comm else 0.0))


def _sharded_optimizer_in_bf16(moment: Moment, counts: ParameterCounts, micro_steps: int) -> GradientMemory:
    """Stage 1 with bf16 is a class of its own (``bf16_optimizer.BF16_Optimizer``): a flat sum in float32, 4 L on every
    rank, for good, and gradients in 16 bits, 2 L, from the end of the first backward to the update.

    The groups of the optimizer are reduced whole, as many as exceed :data:`REDUCED_AT_ONCE` at a time: several are
    copied into one tensor, and that once more in 16 bits (``allreduce_bucket``).
    """
    summed, own = 4.0 * counts.learning, 2.0 * counts.learning
    if moment is not Moment.update:
        return GradientMemory(summed, own if micro_steps > 1 else 0.0, 0.0)
    copied, together = [4 * counts.largest_learning], []
    for sizes in counts.groups:
        together.append(sum(sizes))
        copied.append(sum(together) * (2 + 4 * (len(together) > 1)))
        if sum(together) > REDUCED_AT_ONCE:
            together = []
    return GradientMemory(summed, own + max(copied), 0.0)


def _sharded_gradients(
    moment: Moment, settings: TrainSettings, counts: ParameterCounts, ranks: int, micro_steps: int
) -> GradientMemory:
    """Stage 2: this rank's partition, 4 L / N, once or twice.

    Where weights are float32, ``copy_grads_in_partition`` makes room for the whole partition of *every* micro-batch
    (``grads_in_partition``) when its first bucket is full, early in the backward. It is added to the sum of those
    before when the backward is done (``independent_gradient_partition_epilogue``), so all but the first hold two. They
    hold matrices whole that reach into other ranks' partitions (:meth:`ParameterCounts.whole_in_partition`).

    With bf16 there is one flat sum in float32 (``_build_compact_grad_partition_buffer``), to which a matrix at a time
    is added, cast to float32.

    Buckets are freed after each backward. For the update the gradients of a group are copied into a flat tensor once
    more, unless they are the flat sum.
    """
    ds = settings.deepspeed
    half = ds.precision == Precision.bf16
    matrix = min(counts.largest_learning, counts.learning / ranks)
    group = 0.0 if half else 4.0 * counts.largest_group / ranks
    buckets, copy = _contiguous_buckets(settings, counts, 2 if half else 4, ranks)
    if ds.offload_optimizer:  # summed and normed on the host
        return GradientMemory(0.0, 0.0, buckets + copy if moment is Moment.layers else 0.0)
    partition = 4.0 * counts.learning / ranks
    if not half:
        partition = 4.0 * counts.whole_in_partition(ranks)
    if moment is Moment.update:
        return GradientMemory(partition, max(NORM_BYTES * matrix, group), 0.0)
    before = partition if micro_steps > 1 else 0.0
    if moment is Moment.loss:
        return GradientMemory(before, 0.0, 0.0)
    if half:
        return GradientMemory(partition, 4.0 * matrix, buckets + copy)
    return GradientMemory(before, partition, buckets + copy)


def _sharded_weights(
    moment: Moment, settings: TrainSettings, counts: ParameterCounts, ranks: int, micro_steps: int
) -> GradientMemory:
    """Stage 3: 4 L / N from the start on (``grad_partitions_flat_buffer``), and one bucket, which
    ``reduce_scatter_coalesced`` copies to order it by rank. For the update a group's are copied into a flat tensor."""
    del micro_steps
    ds = settings.deepspeed
    width = 2 if ds.precision == Precision.bf16 else 4
    bucket = float(width * ds.bucket_elements)
    copy = float(width * min(ds.bucket_elements, counts.learning)) if moment is Moment.layers else 0.0
    if ds.offload_optimizer:
        return GradientMemory(0.0, 0.0, bucket + copy)
    partition = 4.0 * counts.learning / ranks
    if moment is not Moment.update:
        return GradientMemory(partition, 0.0, bucket + copy)
    group = min(counts.largest_group / ranks, UPDATED_AT_ONCE)
    return GradientMemory(partition, max(NORM_BYTES * counts.largest_learning / ranks, 4.0 * group), bucket)


def _contiguous_buckets(
    settings: TrainSettings, counts: ParameterCounts, width: int, ranks: int
) -> tuple[float, float]:
    """Stages 1 and 2: the buckets, and the copy that ``allreduce_bucket`` makes of one.

    A bucket has its full size, however small the model (``setup_buckets``); two of them where they overlap with the
    backward. It is copied where it holds parts of several ranks' partitions.
    """
    ds = settings.deepspeed
    buckets = width * ds.bucket_elements * (2 if ds.overlap_comm else 1)
    copy = width * min(ds.bucket_elements, counts.learning) if ranks > 1 else 0
    return float(buckets), float(copy)
