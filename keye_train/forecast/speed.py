"""Time of a step: what the slowest rank computes, what is sent meanwhile, and the optimizer behind it.

Legend: A all parameters, L those that learn, N ranks, w bytes of a working weight. Bytes that a rank sends in a step of
m micro-batches, by ring collectives (the factor (N - 1) / N is left in), and beside what they run where
``deepspeed.overlap_comm`` is on. Stages 1 and 2 of DeepSpeed 0.19 reduce a bucket by an all-reduce, which sends it
twice (``allreduce_and_scatter``), and in 16 bits with bf16.

==========  =========================================================  ==============================
ZeRO stage  bytes                                                      beside
==========  =========================================================  ==============================
0           8 L: all-reduce of the float32 gradient                    nothing
1           2 w L: all-reduce                                          the last backward; with bf16 nothing
2           2 w L m: all-reduce in each micro-batch                    every backward
1 and 2     w L: new weights are gathered                              nothing
3           (2 w A + w L) m: weights gathered twice, reduce-scatter    all computation
==========  =========================================================  ==============================
"""

from __future__ import annotations

from dataclasses import dataclass

from keye_train.forecast.memory import GB
from keye_train.forecast.parameters import ParameterCounts
from keye_train.forecast.workload import Workload
from keye_train.settings import Precision, TrainSettings
from keye_train.settings.cluster import ClusterSettings

OPTIMIZER_BYTES = 36
"""AdamW reads and writes weight, gradient and two moments in float32, and writes the working copy: a parameter."""

BACKWARD = 2 / 3
"""Share of the backward in the computation of a step."""


@dataclass(frozen=True)
class StepTime:
    """Seconds of one optimizer step, and the utilisation that follows."""

    compute_s: float  # forward, backward and what is computed again, on the slowest rank
    exposed_s: float  # communication, with the host too, that computation does not hide
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
    compute_s = (step.flops + step.recomputed) / (ranks * step.balance * peak * cluster.efficiency)
    exposed_s = _exposed_s(settings, counts, cluster, micro_steps, compute_s)
    exposed_s += _host_link_s(settings, counts, cluster, micro_steps)
    optimizer_s = _optimizer_s(settings, counts, cluster)
    total = compute_s + exposed_s + optimizer_s
    return StepTime(compute_s, exposed_s, optimizer_s, step.flops / (ranks * peak * total) if total else 0.0)


def _exposed_s(
    settings: TrainSettings, counts: ParameterCounts, cluster: ClusterSettings, micro_steps: int, compute_s: float
) -> float:
    """Of the collectives between ranks; see the module."""
    ds, learning = settings.deepspeed, counts.learning
    width = 2 if ds.precision == Precision.bf16 else 4
    passes, behind, beside_s = {
        0: (0.0, 8.0 * learning, 0.0),
        1: (2.0 * width * learning, width * learning, 0.0 if width == 2 else BACKWARD * compute_s / micro_steps),
        2: (2.0 * width * learning * micro_steps, width * learning, BACKWARD * compute_s),
        3: (width * (2.0 * counts.total + learning) * micro_steps, 0.0, compute_s),
    }[ds.zero_stage]
    rate = _bytes_per_s(cluster) * cluster.ranks / max(1, cluster.ranks - 1)
    if cluster.ranks == 1:
        return 0.0
    hidden_s = min(passes / rate * cluster.overlap, beside_s) if ds.overlap_comm else 0.0
    return (passes + behind) / rate - hidden_s


def _bytes_per_s(cluster: ClusterSettings) -> float:
    """What a rank sends in rings over all ranks. Between nodes each ring crosses another device's port, so together
    they have all ports of a node.
    """
    between = cluster.network_gb_per_s * cluster.ranks_per_node
    return GB * (cluster.node_gb_per_s if cluster.nodes == 1 else min(cluster.node_gb_per_s, between))


def _host_link_s(settings: TrainSettings, counts: ParameterCounts, cluster: ClusterSettings, micro_steps: int) -> float:
    """What is offloaded, to and fro: gradients down in every micro-batch, and up again to be added to from the second
    on; new weights up; parameters up before each of the two gathers of a micro-batch."""
    ds = settings.deepspeed
    width = 2 if ds.precision == Precision.bf16 else 4
    moved = 0.0
    if ds.offload_optimizer:
        moved += (4 * (2 * micro_steps - 1) + width) * counts.learning / cluster.ranks
    if ds.offload_parameters:
        moved += 2 * width * micro_steps * counts.total / cluster.ranks
    return moved / (cluster.host_link_gb_per_s * GB)


def _optimizer_s(settings: TrainSettings, counts: ParameterCounts, cluster: ClusterSettings) -> float:
    """The update goes by memory alone: the device's, or its share of the host's."""
    ds = settings.deepspeed
    share = counts.learning / (cluster.ranks if ds.zero_stage else 1)
    rate = cluster.memory_gb_per_s
    if ds.offload_optimizer:
        rate = cluster.host_memory_gb_per_s / cluster.ranks_per_node
    return OPTIMIZER_BYTES * share / (rate * GB)
