"""One step of a run once more, in one process: which samples made its loss what it was.

The steps since the newest checkpoint before it are trained again, with the guards of the run, so that what was refused
then is refused now.
"""

from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import asdict, dataclass
from itertools import takewhile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from keye_train import compose, runs
from keye_train.data.collate import LoadedPack
from keye_train.data.loader import Loader
from keye_train.data.plan import PlanState
from keye_train.model.sample_encoder import SampleEncoder
from keye_train.settings import Objective, ReplaySettings, SettingsError, TrainSettings
from keye_train.training import build, checkpoint, distributed
from keye_train.training.guards import NonFiniteError, StopRequest
from keye_train.training.learner import Learner
from keye_train.training.recorder import read_flight
from keye_train.training.spikes import RollBack, Spike, SpikeError, left_out_reasons, read_spikes


@dataclass(frozen=True)
class SampleLoss:
    """What one sample of the step lost."""

    source: str
    shard: str
    key: str
    items: int  # labelled tokens, or 1 for a pair
    loss: float  # mean over these


@dataclass(frozen=True)
class Replayed:
    """The step."""

    run: str
    step: int
    from_step: int  # of the checkpoint; 0: the start of the run
    loss: float | None  # None: not finite
    recorded: float | None
    was_recorded: bool
    loss_by_source: dict[str, float | None]
    samples: list[SampleLoss]  # the highest loss first, one that is not finite before all


def replay(settings: ReplaySettings) -> Replayed:
    """Do the step once more.

    Raises:
        SettingsError: there is no such run, or it has not done the step, or several processes were started, or the step
            had losses that one process cannot compute.
        ValueError: its data are not those that it was trained on.
    """
    run_dir, step = Path(settings.run), settings.step
    recipe = _recipe(run_dir)
    if step > recipe.stage.steps:
        raise SettingsError(f"step={step}: {run_dir} has {recipe.stage.steps} steps (stage.steps)")
    world = distributed.start(recipe.deepspeed.timeout_minutes)
    if world.size > 1:
        raise SettingsError("keye-train replay works in one process: start it without a launcher")
    spikes, latest = _history(run_dir, step)
    found = checkpoint.newest_whole_until(run_dir, latest)
    if recipe.stage.objective == Objective.contrastive:
        _require_one_rank(run_dir, range(found.state.step + 1 if found is not None else 1, step + 1))
    plan, encoder = build.build_plan(recipe, world.size), build.build_encoder(recipe)
    learner = Learner(recipe, world, plan, build.build_objective(recipe), StopRequest(), found)
    try:
        row, samples = _train_until(learner, encoder, step, left_out_reasons(spikes))
    finally:
        learner.engine.close()
    recorded, was_recorded = _recorded(run_dir, step)
    replayed = Replayed(
        run=str(run_dir),
        step=step,
        from_step=found.state.step if found is not None else 0,
        loss=row["loss"],
        recorded=recorded,
        was_recorded=was_recorded,
        loss_by_source=row["loss_by_source"],
        samples=samples,
    )
    if settings.out is not None:
        runs.write_json_atomic(Path(settings.out), asdict(replayed))
    return replayed


def describe(replayed: Replayed, samples: int) -> str:
    """The step as text, with so many of its samples."""
    again = replayed.step - 1 - replayed.from_step
    lines = [
        f"{replayed.run}, step {replayed.step}: from "
        + (f"the checkpoint of step {replayed.from_step}" if replayed.from_step else "the start of the run")
        + (f", {again} steps trained again" if again else ""),
        f"loss {_number(replayed.loss)}, {_comparison(replayed)}",
        "",
        f"{'source':<24}{'samples':>8}{'loss':>12}",
    ]
    for source, loss in sorted(replayed.loss_by_source.items()):
        count = sum(sample.source == source for sample in replayed.samples)
        lines.append(f"{source:<24}{count:>8}{_number(loss):>12}")
    shown = replayed.samples[:samples]
    if shown:
        lines += ["", f"{'loss':>12}{'labels':>8}  sample ({len(shown)} of {len(replayed.samples)})"]
    for sample in shown:
        lines.append(f"{_number(sample.loss):>12}{sample.items:>8}  {sample.key} of {sample.shard} ({sample.source})")
    return "\n".join(lines) + "\n"


def _comparison(replayed: Replayed) -> str:
    if not replayed.was_recorded:
        return "which the run did not record (logging.every_steps)"
    if replayed.loss == replayed.recorded:
        return f"exactly as recorded ({_number(replayed.recorded)})"
    if replayed.loss is None or replayed.recorded is None:
        return f"recorded: {_number(replayed.recorded)}"
    difference = abs(replayed.loss - replayed.recorded) / max(abs(replayed.recorded), 1e-30)
    return f"recorded: {_number(replayed.recorded)}, a relative difference of {difference:.1e}"


def _number(value: float | None) -> str:
    return "not finite" if value is None or not math.isfinite(value) else f"{value:.6f}"


def _recipe(run_dir: Path) -> TrainSettings:
    path = run_dir / runs.RECIPE
    if not path.exists():
        raise SettingsError(f"run={run_dir} is no run: it has no {runs.RECIPE}")
    settings = compose.stored_settings(TrainSettings, path)
    settings.run_dir = str(run_dir)  # it may have been moved
    return settings


def _require_one_rank(run_dir: Path, steps: range) -> None:
    """Refuse steps whose pairs were held against those of several ranks: alone, each pack would lose something else."""
    launch = runs.read_json(run_dir / runs.MANIFEST)["world_size"]  # the newest one
    recorded = {row["step"]: row["world_size"] for row in read_flight(run_dir, rank=0)}
    ranks = max(recorded.get(step, launch) for step in steps)
    if ranks > 1:
        raise SettingsError(
            f"step={steps[-1]}: {run_dir} was trained by {ranks} ranks, and with stage.objective=contrastive a loss "
            "depends on the pairs of all ranks in a micro-step; one process cannot compute it. Runs of one process and "
            "those with stage.objective=language can be replayed"
        )


def _history(run_dir: Path, step: int) -> tuple[list[Spike], int]:
    """The rollbacks before the step was done, and the last step whose checkpoint leads to it.

    A batch that a later rollback left out is found as it was before that rollback.
    """
    spikes = read_spikes(run_dir)
    before = list(takewhile(lambda spike: step - 1 not in spike.left_out, spikes))
    rest = spikes[len(before) :]
    return before, min([step - 1, *(min(spike.left_out) for spike in rest)])


def _train_until(
    learner: Learner, encoder: SampleEncoder, step: int, leave_out: dict[int, str]
) -> tuple[dict[str, Any], list[SampleLoss]]:
    """Train up to the step; its row and the losses of its samples."""
    position = PlanState.from_json(learner.state.data)
    losses: list[tuple[LoadedPack, Tensor]] = []
    with Loader(learner.plan, encoder, 0, 1, learner.settings, position, leave_out) as loader:
        for data in loader:
            if data.passed_over:
                learner.advance(data)
                continue
            last = data.step + 1 == step
            if last:
                learner.on_losses = lambda pack, found: losses.append((pack, found.detach().float().cpu()))
            counts = learner.count(data)
            try:
                learner.step(data, counts)
            except (RollBack, SpikeError, NonFiniteError):  # what the run did about the step
                if not last:
                    raise
            learner.clock.end_step()  # nobody reads the times here, but a GPU's events would pile up
            if last:
                return learner.metrics.losses(counts), _by_sample(learner, losses)
            learner.advance(data)
    raise SettingsError(f"step={step} was not reached: the data of {learner.settings.run_dir} end before it")


def _by_sample(learner: Learner, losses: list[tuple[LoadedPack, Tensor]]) -> list[SampleLoss]:
    found = []
    for pack, of_items in losses:
        members = learner.objective.item_samples(pack.inputs)  # type: ignore[arg-type]
        values: dict[int, list[float]] = defaultdict(list)
        for member, loss in zip(members.tolist(), of_items.tolist(), strict=True):
            values[member].append(loss)
        for member, of_sample in values.items():
            ref = pack.refs[member]
            mean = float(torch.tensor(of_sample, dtype=torch.float64).mean())
            found.append(SampleLoss(ref.source, ref.shard, ref.key, len(of_sample), mean))
    return sorted(
        found, key=lambda sample: (sample.loss == sample.loss, -sample.loss if sample.loss == sample.loss else 0)
    )


def _recorded(run_dir: Path, step: int) -> tuple[float | None, bool]:
    """The loss that the run wrote down for the step, and whether it did."""
    for row in runs.read_jsonl(run_dir / runs.METRICS):
        if row["step"] == step:
            return row["loss"], True
    for spike in read_spikes(run_dir):
        if spike.step == step:
            return spike.loss, True
    return None, False
