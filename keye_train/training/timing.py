"""Where the time of the steps goes, on each rank: taken while they run, read late, compared now and then.

On a GPU the phases of the device are timed by its own events, which are read a step later, when they lie behind the
wait that ends each step anyway. The times of all ranks travel with the counts of a global batch, every some steps.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from statistics import median
from typing import Any

import torch

from keye_train.training.distributed import World

PHASES = ("data_wait", "forward", "backward", "optimizer", "checkpoint")
DEVICE_PHASES = ("forward", "backward", "optimizer")
MICROSECONDS = 1_000_000


class StepClock:
    """Seconds that this rank spent in each of ``PHASES``.

    Args:
        device: whose events time ``DEVICE_PHASES`` where it is a GPU.
    """

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._phase: str | None = None
        self._began = 0.0
        self._event: Any = None
        self._pending: list[tuple[str, Any, Any]] = []
        self._step = dict.fromkeys(PHASES, 0.0)
        self._sums = dict.fromkeys(PHASES, 0.0)
        self._steps = 0

    def enter(self, phase: str | None) -> None:
        """The phase before ends and ``phase`` begins; None: something that is not timed. Waits for nothing."""
        now = time.perf_counter()
        event = None
        if self._cuda and (phase in DEVICE_PHASES or self._event is not None):
            event = torch.cuda.Event(enable_timing=True)
            event.record()
        if self._phase is not None:
            if self._event is not None:
                self._pending.append((self._phase, self._event, event))
            else:
                self._step[self._phase] += now - self._began
        self._phase, self._began = phase, now
        self._event = event if phase in DEVICE_PHASES else None

    def end_step(self) -> dict[str, float]:
        """A step is over, the device has been waited for: its seconds by phase."""
        self.enter(None)
        for phase, begin, end in self._pending:
            self._step[phase] += begin.elapsed_time(end) / 1000.0
        self._pending.clear()
        done, self._step = self._step, dict.fromkeys(PHASES, 0.0)
        for phase, seconds in done.items():
            self._sums[phase] += seconds
        self._steps += 1
        return done

    def take_means(self) -> list[float]:
        """Mean seconds of a step in each of ``PHASES`` since the last call."""
        means = [self._sums[phase] / max(self._steps, 1) for phase in PHASES]
        self._sums, self._steps = dict.fromkeys(PHASES, 0.0), 0
        return means


def own_times(means: Sequence[float], world: World) -> list[int]:
    """The times of this rank, in microseconds, at its place among those of all: the sum over ranks has them all."""
    row = [0] * (world.size * len(PHASES))
    row[world.rank * len(PHASES) : (world.rank + 1) * len(PHASES)] = [round(mean * MICROSECONDS) for mean in means]
    return row


def slowest_ranks(summed: Sequence[int]) -> dict[str, dict[str, float]]:
    """For each phase the slowest rank, its mean time in a step and the median of all ranks.

    Args:
        summed: sum over the ranks of what :func:`own_times` gave.

    Returns:
        ``{phase: {"rank": ..., "s": ..., "median_s": ...}}``.
    """
    found = {}
    for place, phase in enumerate(PHASES):
        times = [value / MICROSECONDS for value in summed[place :: len(PHASES)]]
        worst = max(range(len(times)), key=times.__getitem__)
        found[phase] = {"rank": worst, "s": times[worst], "median_s": median(times)}
    return found


def describe_straggler(slowest: dict[str, dict[str, float]]) -> str:
    """One line about the phase in which one rank is furthest behind the others."""
    phase = max(slowest, key=lambda name: slowest[name]["s"] - slowest[name]["median_s"])
    worst = slowest[phase]
    return (
        f"slowest rank: {worst['rank']:.0f} in {phase.replace('_', ' ')}, {worst['s']:.3f} s a step, "
        f"median of the ranks {worst['median_s']:.3f} s"
    )
