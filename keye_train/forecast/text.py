"""A forecast for people, and as plain values for programs."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from keye_train.forecast.forecast import Change, Forecast
from keye_train.forecast.memory import GB
from keye_train.settings.cluster import ForecastSettings

PARTS = {
    "weights": "weights",
    "gradients": "gradients, summed",
    "reduced": "gradients in reduction",
    "optimizer": "optimizer",
    "gathered": "gathered and cast weights",
    "buckets": "buckets of collectives",
    "activations": "activations",
    "workspace": "loss and backward workspace",
}


def values(found: Forecast, settings: ForecastSettings, problems: list[str], changes: list[Change]) -> dict[str, Any]:
    """Everything, with units in the names."""
    return {
        "cluster": asdict(settings.cluster),
        "parameters": {"total": found.counts.total, "learning": found.counts.learning, "largest": found.counts.largest},
        "device_memory_bytes": asdict(found.device) | {"total": found.device.total},
        "host_memory_bytes": asdict(found.host) | {"total": found.host.total},
        "step": asdict(found.step),
        "step_s": asdict(found.time) | {"total_s": found.time.total_s},
        "steps": found.steps,
        "micro_steps": found.micro_steps,
        "run_s": found.run_s,
        "loader_bytes_per_s": found.loader_bytes_per_s,
        "checkpoint_bytes": found.checkpoint_bytes,
        "checkpoint_s": found.checkpoint_s,
        "held_up_s": found.held_up_s,
        "checkpoints": found.checkpoints,
        "problems": problems,
        "would_fit": [asdict(change) for change in changes],
    }


def render(found: Forecast, settings: ForecastSettings, problems: list[str], changes: list[Change]) -> str:
    """The forecast as text."""
    cluster, step, time = settings.cluster, found.step, found.time
    ranks = cluster.ranks
    lines = [
        f"{settings.stage.name}, {settings.model.name}, data {settings.data.name}, on {cluster.name}: "
        f"{cluster.nodes} x {cluster.ranks_per_node} ranks, ZeRO-{settings.deepspeed.zero_stage}, "
        f"{settings.deepspeed.precision.value}, activation checkpointing "
        f"{settings.stage.activation_checkpointing.value}",
        f"{found.counts.total / GB:.3f} billion parameters, {found.counts.learning / GB:.3f} billion learn",
        f"figures of a step: {step.origin}",
        "",
        "memory of a rank at its peak, GB",
        *(f"  {label:30}{getattr(found.device, name) / GB:10.2f}" for name, label in PARTS.items()),
        f"  {'total':30}{found.device.total / GB:10.2f}   of {cluster.device_memory_gb:g}, "
        f"{cluster.reserved_gb:g} reserved",
        f"memory of a node's host, GB{found.host.total / GB:15.1f}   of {cluster.host_memory_gb:g}, without readers",
        "",
        "a step",
        f"  {'samples':30}{step.samples:10,.0f}",
        f"  {'tokens':30}{step.tokens:10,.0f}",
        f"  {'patches':30}{step.patches:10,.0f}",
        f"  {'PFLOPs, forward and backward':30}{step.flops / 1e15:10,.3g}",
        f"  {'balance, mean / slowest rank':30}{step.balance:10.3f}",
        f"  {'computing, s':30}{time.compute_s:10.3g}   at {cluster.efficiency:.0%} of {cluster.peak_tflops:g} TFLOP/s",
        f"  {'waiting for collectives, s':30}{time.exposed_s:10.3g}",
        f"  {'optimizer, s':30}{time.optimizer_s:10.3g}",
        f"  {'in all, s':30}{time.total_s:10.3g}   {step.tokens / time.total_s:,.0f} tokens/s, "
        f"{step.tokens / time.total_s / ranks:,.0f} a rank",
        f"  {'MFU':30}{time.mfu:10.1%}",
        "",
        f"the run: {found.steps:,} steps of {found.micro_steps} micro-steps, {duration(found.run_s)}, "
        f"{found.run_s * ranks / 3600:,.0f} device hours, {found.steps * step.tokens / GB:,.2f} billion tokens",
        _loader_line(found, cluster.nodes),
        f"a checkpoint: {found.checkpoint_bytes / GB:.2f} GB, {duration(found.checkpoint_s)} to write, "
        f"{found.checkpoints} in the run; each holds training up for {duration(found.held_up_s)}",
    ]
    if problems:
        lines += ["", "does not fit:", *(f"  {problem}" for problem in problems)]
        lines += ["would fit:" if changes else "none of the usual changes would fit: use more nodes, or smaller packs"]
        lines += [f"  {change.overrides}   ({change.device_bytes / GB:.1f} GB a rank)" for change in changes]
    return "\n".join(lines)


def duration(seconds: float) -> str:
    """Seconds in the unit that people would use."""
    for unit, length in (("days", 86400), ("h", 3600), ("min", 60)):
        if seconds >= length:
            return f"{seconds / length:.1f} {unit}"
    return f"{seconds:.3g} s"


def _loader_line(found: Forecast, nodes: int) -> str:
    rate = found.loader_bytes_per_s
    if rate is None:
        return "loader: index the shards (keye-data index) to know what it must read"
    samples, megabytes = found.step.samples / found.time.total_s, rate / 1e6
    return (
        f"the loader must give {samples:,.0f} samples/s, read {megabytes:,.1f} MB/s ({megabytes / nodes:,.1f} a node)"
    )
