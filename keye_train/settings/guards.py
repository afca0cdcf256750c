"""What watches over a run: broken updates, loss spikes, hangs, and what is written down about them."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum

from keye_train.settings.basics import SettingsError


class SpikePolicy(str, Enum):
    """What becomes of a step whose loss is far above those before it."""

    log = "log"  # a warning; the update is applied
    skip = "skip"  # the update is not applied
    rollback = "rollback"  # not applied; back to a checkpoint, and the batches up to this one are left out


class HangPolicy(str, Enum):
    """What becomes of a run that is stuck, once every process has written down where."""

    stop = "stop"  # exit code 70; a launcher that starts the ranks again is refused
    restart = "restart"  # exit code 75: `torchrun --max-restarts` starts the ranks again


@dataclass
class NonFiniteSettings:
    """Updates refused because the loss or the gradient was not finite."""

    max_in_a_row: int = 5
    """So many refused updates in a row stop the run: the weights themselves, or every batch, are broken then."""
    max_total: int = 0
    """So many in the whole run stop it; 0: any number."""


@dataclass
class SpikeSettings:
    """Losses far above the median of those before them, in robust standard deviations (1.4826 x median absolute
    deviation; Hampel 1974)."""

    policy: SpikePolicy = SpikePolicy.log
    window_steps: int = 128
    """Steps whose losses a new one is held against."""
    min_steps: int = 32
    """No step is judged before this many losses are known."""
    threshold: float = 8.0
    """Robust standard deviations above the median."""
    min_rise: float = 0.05
    """And at least this share of the median above it, however alike the losses were."""
    max_in_a_row: int = 5
    """skip: so many spikes in a row stop the run, since then the loss is on another level."""
    leave_out_steps: int = 1
    """rollback: batches left out, the one of the spike and those before it. The run goes back to a checkpoint before
    the first of them, or leaves out fewer where none is kept. PaLM (arXiv 2204.02311, 5.1) left out some hundred."""
    max_rollbacks: int = 3
    """rollback: so many in a run; one more stops it."""


@dataclass
class WatchdogSettings:
    """A thread of each rank that ends a run which is stuck."""

    enabled: bool = True
    step_s: float | None = None
    """Longest time of an optimizer step; null: nine tenths of deepspeed.timeout_minutes, before collectives give up."""
    data_s: float | None = None
    """Longest wait for the data of a step, those of the other ranks among them; null: as step_s."""
    save_s: float = 3600.0
    """Longest time of everything else: the start, a checkpoint, the export."""
    policy: HangPolicy = HangPolicy.restart
    poll_s: float = 2.0
    """How often the clock, and the notes of the other ranks, are looked at."""


@dataclass
class GuardSettings:
    """Guards of a run."""

    non_finite: NonFiniteSettings = field(default_factory=NonFiniteSettings)
    spike: SpikeSettings = field(default_factory=SpikeSettings)
    watchdog: WatchdogSettings = field(default_factory=WatchdogSettings)
    heartbeat_s: float = 10.0
    """RUN/heartbeats/rank-N.json is written anew this often while a rank lives; 0: never."""
    straggler_every_steps: int = 50
    """Every so many steps the slowest rank of each phase stands in the log and in the metrics; 0: never."""
    recorded_steps: int = 64
    """RUN/flight holds at least the last so many steps of every rank; 0: none."""


def check_guards(guards: GuardSettings, timeout_minutes: float) -> None:
    """Raise SettingsError for values that cannot work together."""
    spike, watchdog = guards.spike, guards.watchdog
    for key, value in (
        ("non_finite.max_in_a_row", guards.non_finite.max_in_a_row),
        ("spike.window_steps", spike.window_steps),
        ("spike.max_in_a_row", spike.max_in_a_row),
        ("spike.leave_out_steps", spike.leave_out_steps),
    ):
        if value < 1:
            raise SettingsError(f"guards.{key}={value} must be at least 1")
    for key, number in (
        ("non_finite.max_total", guards.non_finite.max_total),
        ("spike.min_rise", spike.min_rise),
        ("spike.max_rollbacks", spike.max_rollbacks),
        ("heartbeat_s", guards.heartbeat_s),
        ("straggler_every_steps", guards.straggler_every_steps),
        ("recorded_steps", guards.recorded_steps),
    ):
        if number < 0:
            raise SettingsError(f"guards.{key}={number} must not be negative")
    if spike.threshold <= 0:
        raise SettingsError(f"guards.spike.threshold={spike.threshold} must be above 0")
    if not 4 <= spike.min_steps <= spike.window_steps:
        raise SettingsError(
            f"guards.spike.min_steps={spike.min_steps} must lie between 4 and guards.spike.window_steps="
            f"{spike.window_steps}: fewer losses have no spread"
        )
    limits = (watchdog.step_s, watchdog.data_s, watchdog.save_s, watchdog.poll_s)
    if any(limit is not None and limit <= 0 for limit in limits):
        raise SettingsError("guards.watchdog.step_s, data_s, save_s and poll_s must be above 0")
    for key, limit in (("step_s", watchdog.step_s), ("data_s", watchdog.data_s)):  # ranks wait for data in a collective
        if watchdog.enabled and limit is not None and limit >= 60 * timeout_minutes:
            raise SettingsError(
                f"guards.watchdog.{key}={limit:g} has no effect: collectives give up after "
                f"deepspeed.timeout_minutes={timeout_minutes:g}. Lower the one or raise the other"
            )
