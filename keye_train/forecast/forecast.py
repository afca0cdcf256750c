"""A run before it runs: memory, time, traffic and checkpoints; and, where it does not fit, what would."""

from __future__ import annotations

from collections.abc import Iterator
from copy import deepcopy
from dataclasses import dataclass

from keye_train.forecast.activations import Activations, trace
from keye_train.forecast.memory import GB, DeviceMemory, HostMemory, device_memory, host_memory
from keye_train.forecast.parameters import ParameterCounts, parameter_counts
from keye_train.forecast.speed import StepTime, step_time
from keye_train.forecast.workload import Workload, workload
from keye_train.settings import ActivationCheckpointing, Precision, SettingsError, TrainSettings
from keye_train.settings.cluster import ClusterSettings, ForecastSettings

CHECKPOINT_BYTES = 12
"""Of each parameter that learns: weight and two moments in float32."""


@dataclass(frozen=True)
class Forecast:
    """What ``keye-train plan`` says."""

    counts: ParameterCounts
    activations: Activations
    device: DeviceMemory
    host: HostMemory
    step: Workload
    time: StepTime
    steps: int
    micro_steps: int
    checkpoint_bytes: float
    checkpoint_s: float  # to write it
    held_up_s: float  # by one checkpoint: while it is written, or in the background beyond the steps until the next one
    checkpoints: int  # over the run

    @property
    def run_s(self) -> float:
        """All steps, and what checkpoints hold up."""
        return self.steps * self.time.total_s + self.checkpoints * self.held_up_s

    @property
    def loader_bytes_per_s(self) -> float | None:
        """What all readers together take from the shards; None: no index tells."""
        return None if self.step.shard_bytes is None else self.step.shard_bytes / self.time.total_s


@dataclass(frozen=True)
class Change:
    """Settings that would make a run fit."""

    overrides: str
    device_bytes: float


def forecast(settings: ForecastSettings) -> Forecast:
    """Forecast a run on its cluster; see :class:`Forecast`.

    Raises:
        SettingsError, ValueError: recipe and data do not fit each other.
    """
    step = workload(settings, settings.cluster.ranks)
    return _forecast(settings, settings.cluster, parameter_counts(settings), trace(settings), step)


def _forecast(
    settings: TrainSettings, cluster: ClusterSettings, counts: ParameterCounts, activations: Activations, step: Workload
) -> Forecast:
    micro_steps = settings.gradient_accumulation(cluster.ranks)
    average = 4 if settings.stage.optimizer.ema_decay else 0
    checkpoint_bytes = float((CHECKPOINT_BYTES + average) * counts.learning)
    checkpoint_s = checkpoint_bytes / (cluster.storage_gb_per_s * GB)
    time = step_time(settings, counts, step, cluster, micro_steps)
    beside_s = settings.checkpoint.every_steps * time.total_s if settings.checkpoint.background else 0.0
    return Forecast(
        counts=counts,
        activations=activations,
        device=device_memory(settings, counts, activations, step.fullest, cluster.ranks, micro_steps),
        host=host_memory(settings, counts, cluster.ranks, cluster.ranks_per_node),
        step=step,
        time=time,
        steps=settings.stage.steps,
        micro_steps=micro_steps,
        checkpoint_bytes=checkpoint_bytes,
        checkpoint_s=checkpoint_s,
        held_up_s=max(0.0, checkpoint_s - beside_s),
        checkpoints=-(-settings.stage.steps // settings.checkpoint.every_steps),
    )


def problems(found: Forecast, cluster: ClusterSettings) -> list[str]:
    """Why the run cannot work on this cluster; empty: it fits."""
    listed = []
    room = (cluster.device_memory_gb - cluster.reserved_gb) * GB
    if found.device.total > room:
        listed.append(
            f"a rank needs {found.device.total / GB:.1f} GB of device memory and has {room / GB:.1f} GB "
            f"(cluster.device_memory_gb={cluster.device_memory_gb:g} less cluster.reserved_gb={cluster.reserved_gb:g})"
        )
    if found.host.total > cluster.host_memory_gb * GB:
        listed.append(
            f"a node needs {found.host.total / GB:.0f} GB of host memory and has "
            f"cluster.host_memory_gb={cluster.host_memory_gb:g}"
        )
    return listed


def remedies(settings: ForecastSettings, found: Forecast) -> list[Change]:
    """Changes that make the run fit, the least costly first; each stands for itself.

    Args:
        settings: of the run.
        found: its forecast. No change touches the model or what of it learns, so its counts hold for all of them.
    """
    step = found.step
    fitting = []
    for overrides, changed in _candidates(settings):
        try:
            changed.check()
        except SettingsError:
            continue
        shape = step.fullest
        share = changed.stage.max_tokens / settings.stage.max_tokens
        smaller = type(shape)(int(shape.tokens * share), int(shape.patches * share), int(shape.labelled * share))
        fuller = Workload(**{**vars(step), "fullest": smaller})
        result = _forecast(changed, changed.cluster, found.counts, found.activations, fuller)
        if not problems(result, changed.cluster):
            fitting.append(Change(overrides, result.device.total))
    return fitting


def _candidates(settings: ForecastSettings) -> Iterator[tuple[str, ForecastSettings]]:
    """Single changes and the usual pairs of them, in the order of what they cost in speed."""
    full = ActivationCheckpointing.full
    for checkpointing in (ActivationCheckpointing.selective, full):
        if settings.stage.activation_checkpointing not in (checkpointing, full):
            changed = deepcopy(settings)
            changed.stage.activation_checkpointing = checkpointing
            yield f"stage.activation_checkpointing={checkpointing.value}", changed
    for zero in range(settings.deepspeed.zero_stage + 1, 4):
        for recompute in (False, True):
            if recompute and settings.stage.activation_checkpointing == full:
                continue
            changed = deepcopy(settings)
            changed.deepspeed.zero_stage = zero
            words = f"deepspeed.zero_stage={zero}"
            if settings.deepspeed.precision == Precision.bf16_autocast:  # ZeRO keeps masters: no need of it
                changed.deepspeed.precision = Precision.bf16
                words += " deepspeed.precision=bf16"
            if recompute:
                changed.stage.activation_checkpointing = full
                words += f" stage.activation_checkpointing={full.value}"
            yield words, changed
    for factor in (2, 4, 8):
        changed = deepcopy(settings)
        changed.cluster.nodes *= factor
        yield f"cluster.nodes={changed.cluster.nodes}", changed
    for divisor in (2, 4):
        changed = deepcopy(settings)
        changed.stage.max_tokens //= divisor
        changed.stage.max_patches //= divisor
        yield f"stage.max_tokens={changed.stage.max_tokens} stage.max_patches={changed.stage.max_patches}", changed
    changed = deepcopy(settings)
    changed.checkpoint.background = False
    yield "checkpoint.background=false", changed
    changed = deepcopy(settings)
    changed.deepspeed.zero_stage = 3
    changed.deepspeed.precision = Precision.bf16
    changed.deepspeed.offload_optimizer = changed.deepspeed.offload_parameters = True
    changed.stage.activation_checkpointing = full
    yield f"deepspeed=zero3_offload stage.activation_checkpointing={full.value}", changed
