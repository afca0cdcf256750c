"""Cost of packs fitted on the step times of a run, in place of the operations that the model's config counts.

A step lasts as long as the slowest rank of each of its micro-steps. So with x the four sums of a pack (tokens, tokens
squared of each sample, patches, patches squared of each image or video),

    step_s - data_wait_s = fixed + c . sum over micro-steps of x(dearest pack),  fixed and c >= 0,

is solved by least squares of the relative error. Which pack is dearest the cost itself decides: at first that of the
config, then the one just fitted.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np

from keye_train.data.cost import PackCost
from keye_train.data.measure import Sizes
from keye_train.data.plan import Plan, assign
from keye_train.runs import write_text_atomic

LEAST_STEPS = 16
"""Steps below which nothing is fitted: five numbers are looked for."""

WARM_UP = 2
"""First steps of a run, which are left out: kernels are chosen and memory is taken in them."""

OUTLIER = 3.0
"""Steps longer than so many medians are left out: checkpoints, a hanging disk."""

PASSES = 3
"""How often the dearest packs are looked for."""


@dataclass(frozen=True)
class CostFit:
    """What was fitted, and how well it tells the time of a step."""

    cost: PackCost  # scaled so that the packs of the run cost as much as by the config, in operations
    seconds: float  # that a unit of this cost takes
    fixed_s: float  # of a step, whatever its packs
    steps: int
    r2: float  # share of the variance of step times that is told
    error: float  # mean of |told - measured| / measured
    config_r2: float  # the same of the config's cost, with the best factor and constant
    config_error: float
    config: PackCost  # by the config of the run: tells its model and what its stage trains, see ``read_cost``

    def write(self, path: str | Path) -> None:
        """The file for ``data.cost_file``, whole or not at all."""
        write_text_atomic(Path(path), json.dumps(asdict(self), indent=2) + "\n")


def fit_cost(plan: Plan, config_cost: PackCost, world_size: int, seconds: dict[int, float]) -> CostFit:
    """Fit the cost of packs on a run.

    Args:
        plan: of the run.
        config_cost: from the model's config, see ``training_cost``.
        world_size: ranks of the run.
        seconds: step, from 0 -> seconds without those spent waiting for data.

    Raises:
        ValueError: too few steps.
    """
    usable = {step: value for step, value in seconds.items() if step >= WARM_UP and value > 0}
    median = float(np.median(list(usable.values()))) if usable else 0.0
    usable = {step: value for step, value in usable.items() if value <= OUTLIER * median}
    if len(usable) < LEAST_STEPS:
        raise ValueError(f"{len(usable)} usable steps with their times: at least {LEAST_STEPS} are needed")
    packs, times = _micro_steps(plan, world_size, usable)
    coefficients, fixed = np.array(list(asdict(config_cost).values())), 0.0
    for _ in range(PASSES):
        dearest = (packs @ coefficients).argmax(axis=-1)
        features = np.take_along_axis(packs, dearest[..., None, None], axis=2)[:, :, 0].sum(axis=1)
        *found, fixed = non_negative(np.column_stack([features, np.ones(len(times))]), times)
        if not any(found):
            raise ValueError("the times of the steps do not depend on what their packs hold: nothing can be fitted")
        coefficients = np.array(found)
    told = features @ coefficients + fixed
    by_config = (packs @ np.array(list(asdict(config_cost).values()))).max(axis=-1).sum(axis=-1)
    plain = np.column_stack([by_config, np.ones(len(times))])
    told_by_config = plain @ non_negative(plain, times)
    total = packs.sum(axis=(0, 1, 2))
    scale = float(total @ np.array(list(asdict(config_cost).values())) / (total @ coefficients))
    cost = PackCost(*(float(value) * scale for value in coefficients))
    quality = (*_quality(told, times), *_quality(told_by_config, times))
    return CostFit(cost, 1 / scale, float(fixed), len(times), *quality, config_cost)


def _micro_steps(plan: Plan, world_size: int, seconds: dict[int, float]) -> tuple[np.ndarray, np.ndarray]:
    """Sums of every pack, [steps, micro-steps, ranks, 4], and the times of the steps."""
    steps, times = [], []
    for batch, _ in plan.batches():
        if batch.step > max(seconds):
            break
        if batch.step in seconds:
            micro_steps = assign(batch, world_size)
            own = [[_sums(plan, [(s.source, s.row) for s in pack.samples]) for pack in one] for one in micro_steps]
            steps.append(own)
            times.append(seconds[batch.step])
    return np.array(steps, dtype=np.float64), np.array(times)


def _sums(plan: Plan, names: Sequence[tuple[int, int]]) -> list[int]:
    """Tokens, tokens squared, patches and patches squared of some samples."""
    sources, rows = np.array(names, dtype=np.int64).T
    parts = [plan.source(int(number)).look(rows[sources == number]).sizes for number in np.unique(sources)]
    sizes = Sizes.concatenate(parts)
    columns = (sizes.tokens, sizes.tokens_squared, sizes.patches, sizes.patches_squared)
    return [int(column.sum()) for column in columns]


def non_negative(features: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Least squares of the relative error with coefficients >= 0, exactly: the best of all sets of columns.

    Args:
        features: [N, K]; K is small, since 2^K sets are tried.
        values: [N], above 0.

    Returns:
        [K] float64.
    """
    weighted = features / values[:, None]
    scale = np.sqrt((weighted**2).sum(axis=0))
    scale[scale == 0] = 1.0
    weighted = weighted / scale
    best, least = np.zeros(features.shape[1]), float(len(values))
    for size in range(1, features.shape[1] + 1):
        for chosen in combinations(range(features.shape[1]), size):
            own = weighted[:, chosen]
            found = np.linalg.lstsq(own, np.ones(len(values)), rcond=None)[0]
            rest = float(((own @ found - 1) ** 2).sum())
            if (found >= 0).all() and rest < least:
                best, least = np.zeros(features.shape[1]), rest
                best[list(chosen)] = found
    return best / scale


def _quality(told: np.ndarray, measured: np.ndarray) -> tuple[float, float]:
    spread = float(((measured - measured.mean()) ** 2).sum())
    rest = float(((told - measured) ** 2).sum())
    return 1 - rest / spread if spread else 0.0, float((abs(told - measured) / measured).mean())


def step_seconds(rows: Iterable[dict[str, Any]]) -> dict[int, dict[int, float]]:
    """Number of ranks -> step, from 0 -> its seconds without waiting for data, from the rows of metrics.jsonl.

    A run may go on with another number of ranks: its steps then have other micro-steps, and other seconds.
    """
    seconds: dict[int, dict[int, float]] = {}
    for row in rows:
        if "step_s" in row and "world_size" in row:
            own = seconds.setdefault(int(row["world_size"]), {})
            own[int(row["step"]) - 1] = float(row["step_s"]) - float(row["data_wait_s"])
    return seconds
