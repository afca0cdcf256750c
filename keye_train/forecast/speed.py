"""Time of a step: what the slowest rank computes, what is sent meanwhile, and the optimizer behind it.

Legend: A all parameters, L those that learn, N ranks, w bytes of a working weight. Bytes that a rank sends in a step of
m micro-batches (ring collectives; the factor (N - 1) / N is left in):

==========  =====================================================
ZeRO stage  bytes
==========  =====================================================
0           8 L: all-reduce of the float32 gradient, once
1           4 L reduced, w L of new weights gathered, once
2           w L reduced in each micro-batch, w L gathered once
3           w A gathered twice and w L reduced in each micro-batch
==========  =====================================================
"""

from __future__ import annotations

from dataclasses import dataclass

from keye_train.forecast.memory import GB
from keye_train.forecast.parameters import ParameterCounts
from keye_train.forecast.workload import Workload
from keye_train.settings import ActivationCheckpointing, Precision, TrainSettings
from keye_train.settings.cluster import ClusterSettings

OPTIMIZER_BYTES = 36
"""AdamW reads and writes weight, gradient and two moments in float32, and writes the working copy: a parameter."""


@dataclass(frozen=True)
class StepTime:
    """Seconds of one optimizer step, and the utilisation that follows."""

    compute_s: float  # forward, backward and what is computed again, on the slowest rank
    exposed_s: float  # communication that computation does not hide
    optimizer_s: float
    mfu: float

    @property
    def total_s(self) -> float:
        """The step."""
        return self.compute_s + self.exposed_s + self.optimizer_s


def step_time(
    settings: TrainSettings, counts: ParameterCounts, step: Workload, cluster: ClusterSettings, micro_steps: int
) -> StepTime:
    """Forecast of one step."""
    ranks = cluster.ranks
    peak = cluster.peak_tflops * 1e12
    # Layers are computed once more in the backward: a third of forward and backward, where everything learns.
    again = 4 / 3 if settings.stage.activation_checkpointing != ActivationCheckpointing.none else 1.0
    compute_s = step.flops * again / (ranks * step.balance * peak * cluster.efficiency)
    sent_s = _sent_bytes(settings, counts, ranks, micro_steps) / _bytes_per_s(cluster)
    hidden = min(sent_s * cluster.overlap, compute_s) if settings.deepspeed.overlap_comm else 0.0
    optimizer_s = _optimizer_s(settings, counts, cluster)
    total = compute_s + sent_s - hidden + optimizer_s
    return StepTime(compute_s, sent_s - hidden, optimizer_s, step.flops / (ranks * peak * total) if total else 0.0)


def _sent_bytes(settings: TrainSettings, counts: ParameterCounts, ranks: int, micro_steps: int) -> float:
    width = 2 if settings.deepspeed.precision == Precision.bf16 else 4
    learning, total = counts.learning, counts.total
    sent = {
        0: 8.0 * learning,
        1: (4.0 + width) * learning,
        2: width * learning * (micro_steps + 1.0),
        3: width * (2.0 * total + learning) * micro_steps,
    }[settings.deepspeed.zero_stage]
    return sent * (ranks - 1) / ranks


def _bytes_per_s(cluster: ClusterSettings) -> float:
    """Of a ring over all ranks, from each of them: over the slowest link that it crosses."""
    rate = cluster.node_gb_per_s if cluster.nodes == 1 else min(cluster.node_gb_per_s, cluster.network_gb_per_s)
    return rate * GB


def _optimizer_s(settings: TrainSettings, counts: ParameterCounts, cluster: ClusterSettings) -> float:
    ds = settings.deepspeed
    share = counts.learning / (cluster.ranks if ds.zero_stage else 1)
    seconds = OPTIMIZER_BYTES * share / (cluster.memory_gb_per_s * GB)
    if ds.offload_optimizer:  # gradients down and weights up
        seconds += (4 + 2) * share / (cluster.host_link_gb_per_s * GB)
    return seconds
