"""Loss spikes: judged before the update, on the device, and the same on every rank.

The limit of a step follows from the losses of the steps before it, which the host knows. The loss of the step itself
is summed over the ranks on the device before the last backward, and one above the limit turns that backward into NaN.
So a spike is refused by the engine as a gradient that is not finite is, on every rank and under every ZeRO stage, and
nothing waits for the device before the update.
"""

from __future__ import annotations

import logging
import math
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from enum import IntEnum
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from keye_train import runs
from keye_train.checkpoints import folder
from keye_train.data.ledger import LEFT_OUT
from keye_train.settings import SpikePolicy, SpikeSettings
from keye_train.training.checkpoint import newest_whole
from keye_train.training.distributed import World

logger = logging.getLogger(__name__)

SIGMA = 1.4826
"""Standard deviation of normally distributed numbers, in their median absolute deviation."""


class SpikeError(RuntimeError):
    """More spikes than the recipe allows."""


class RollBack(Exception):
    """The wish to go on from before the batches of a spike, without them. Raised on every rank together."""

    def __init__(self, spike: Spike) -> None:
        super().__init__(f"loss spike at step {spike.step}")
        self.spike = spike


@dataclass(frozen=True)
class Spike:
    """A rollback, as it stands in RUN/left_out.json."""

    step: int  # of the spike, from 1 as in metrics.jsonl
    loss: float
    limit: float
    left_out: list[int]  # steps whose batches are not trained on, from 0 as in ledger.jsonl and trained.jsonl


class Verdict(IntEnum):
    """What a step turned out to be."""

    fine = 0
    spike = 1
    not_finite = 2


def spike_limit(losses: Sequence[float], settings: SpikeSettings) -> float:
    """Largest loss that is no spike, given those before it; inf where they are too few."""
    if len(losses) < settings.min_steps:
        return math.inf
    middle = median(losses)
    spread = SIGMA * median(abs(loss - middle) for loss in losses)
    return middle + max(settings.threshold * spread, settings.min_rise * abs(middle))


class SpikeGuard:
    """Judges the loss of each step.

    Args:
        settings: ``guards.spike``.
        world: the ranks.
        state: what :meth:`to_json` gave; empty at the start of a run.
    """

    def __init__(self, settings: SpikeSettings, world: World, state: Mapping[str, Any]) -> None:
        self._settings, self._world = settings, world
        self._losses: deque[float] = deque(state.get("losses", ()), maxlen=settings.window_steps)
        self.in_a_row: int = state.get("in_a_row", 0)
        self.total: int = state.get("total", 0)
        self.loss = self.limit = math.nan  # of the step
        self.begin()

    def to_json(self) -> dict[str, Any]:
        """Plain value for a checkpoint: the next verdict depends on it."""
        return {"losses": list(self._losses), "in_a_row": self.in_a_row, "total": self.total}

    def begin(self) -> None:
        """A new step begins."""
        self.loss = math.nan
        self.limit = spike_limit(self._losses, self._settings)
        self._sum = torch.zeros((), dtype=torch.float64, device=self._world.device)

    def gate(self, loss: Tensor, last: bool) -> Tensor:
        """Let the loss of a micro-batch through to its backward.

        A loss of the global batch that is not finite, or above the limit where the policy refuses spikes, becomes NaN
        in the last micro-batch. (No label in the last micro-batch of any rank leaves no gradient to spoil; the update
        then stands, and the spike is reported.)

        Args:
            loss: scalar, whose mean over ranks, summed over micro-batches, is the loss of the global batch.
            last: whether it is the last micro-batch. Collective then: every rank must reach this.
        """
        self._sum += loss.detach()
        if not last:
            return loss
        dist.all_reduce(self._sum)
        self._sum /= self._world.size
        limit = math.inf if self._settings.policy == SpikePolicy.log else self.limit
        return loss * torch.where(self._sum <= limit, 1.0, torch.nan).to(loss.dtype)

    def observe(self, step: int, applied: bool) -> Verdict:
        """Judge the step after its update, when the device has been waited for anyway.

        A refused update is a spike only where the policy refuses spikes. Elsewhere the gradient was not finite,
        however high the loss. Collective where the update was refused: every rank must reach this.

        Args:
            step: from 1.
            applied: whether the engine applied the update; the same on every rank.

        Raises:
            SpikeError: skip: ``max_in_a_row`` spikes in a row.
            RollBack: rollback.
        """
        loss = self.loss = float(self._sum)
        verdict = Verdict.fine if applied else Verdict.not_finite
        if math.isfinite(loss):
            if loss > self.limit and (applied or self._settings.policy != SpikePolicy.log):
                verdict = Verdict.spike
            self._losses.append(loss)
        if not applied:  # ranks whose sums differed in the last bit still do the same
            verdict = Verdict(self._world.max_int(verdict))
        if applied:
            self.in_a_row = 0
        if verdict != Verdict.spike:
            return verdict
        self.total += 1
        self.in_a_row += not applied
        self._warn(step, loss, applied)
        if not applied and self._settings.policy == SpikePolicy.rollback:
            first = max(step - self._settings.leave_out_steps, 0)
            raise RollBack(Spike(step, loss, self.limit, list(range(first, step))))
        if not applied and self.in_a_row >= self._settings.max_in_a_row:
            raise SpikeError(
                f"step {step}: the loss was a spike {self.in_a_row} times in a row (guards.spike.max_in_a_row): it is "
                "on another level. Go back to an older checkpoint, lower stage.optimizer.lr, or accept the level with "
                "guards.spike.policy=log"
            )
        return verdict

    def _warn(self, step: int, loss: float, applied: bool) -> None:
        if self._world.is_main:
            done = "the update was applied" if applied else "the update was not applied"
            logger.warning("step %d: loss %.4f is a spike, above %.4f; %s", step, loss, self.limit, done)


def read_spikes(run_dir: Path) -> list[Spike]:
    """The rollbacks of a run so far. They stand in a file of their own, since they must outlive the going back."""
    path = run_dir / runs.LEFT_OUT
    return [Spike(**row) for row in runs.read_json(path)] if path.exists() else []


def left_out_reasons(spikes: Sequence[Spike]) -> dict[int, str]:
    """Steps, from 0, whose batches are left out -> the reason for the ledger."""
    return {
        step: f"{LEFT_OUT}: loss spike at step {spike.step}, {spike.loss:.4f} above {spike.limit:.4f}"
        for spike in spikes
        for step in spike.left_out
    }


def record_spike(run_dir: Path, spike: Spike, settings: SpikeSettings, world: World) -> None:
    """Write a rollback down before it happens. Collective: every rank must reach this, while nobody saves.

    What is written down as left out is not trained on: newer checkpoints than its first step are set aside first.

    Raises:
        SpikeError: the run has had ``guards.spike.max_rollbacks``.
    """
    spikes = read_spikes(run_dir)
    if len(spikes) >= settings.max_rollbacks:
        raise SpikeError(
            f"step {spike.step}: loss {spike.loss:.4f} is a spike, above {spike.limit:.4f}, after {len(spikes)} "
            f"rollbacks (guards.spike.max_rollbacks). See {run_dir / runs.LEFT_OUT}; lower stage.optimizer.lr, raise "
            "guards.spike.leave_out_steps, or allow more rollbacks"
        )
    first = _begin_of_left_out(run_dir, spike, world)
    spike = replace(spike, left_out=[step for step in spike.left_out if step >= first])
    error: Exception | None = None
    world.barrier()  # all have read it
    if world.is_main:
        try:
            # In this order: killed in between, the run goes back, meets the spike again and decides as it did here.
            _set_newer_aside(run_dir, first, f"rollback-{len(spikes) + 1}")
            runs.write_json_atomic(run_dir / runs.LEFT_OUT, [asdict(one) for one in [*spikes, spike]])
        except OSError as caught:
            error = caught
    world.require_all(error, f"writing {run_dir / runs.LEFT_OUT}")


def _begin_of_left_out(run_dir: Path, spike: Spike, world: World) -> int:
    """First step, from 0, that can be left out: a checkpoint holds what all steps before it have taught.

    It is the wished one where a whole checkpoint stands at or before it, or none stands after it (the run then begins
    anew). Else only what lies behind the newest checkpoint can be left out. Collective: every rank must reach this.
    """
    first = min(spike.left_out)
    newest = newest_whole(run_dir, world)
    if newest is None or newest.state.step <= first or newest_whole(run_dir, world, until=first) is not None:
        return first
    if world.is_main:
        logger.warning(
            "step %d: only the batches of steps %d to %d are left out, not guards.spike.leave_out_steps=%d: no "
            "checkpoint is old enough; raise checkpoint.keep",
            spike.step,
            newest.state.step + 1,
            spike.step,
            len(spike.left_out),
        )
    return newest.state.step


def _set_newer_aside(run_dir: Path, step: int, why: str) -> None:
    for found, path in folder.newest_first(run_dir / runs.CHECKPOINTS):
        if found > step:
            kept = folder.set_aside(path, why)
            logger.warning("checkpoint %s has learnt from batches that are left out now; it is %s", path, kept.name)
