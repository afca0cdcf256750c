"""Promise: a cost fitted on step times is the one that made them, and a plan by it balances those times better."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_tools.fit_cost_cmd import most_steps
from keye_train.data.corpus import Corpus, Sizes, Source
from keye_train.data.cost import PackCost, read_cost
from keye_train.data.fitted import CostFit, fit_cost, non_negative, step_seconds
from keye_train.data.index import ShardHeader
from keye_train.data.packing import Budget
from keye_train.data.plan import GlobalBatch, Plan, assign
from keye_train.settings import ResolutionSettings

CONFIG = PackCost(token=10.0, token_squared=0.01, patch=3.0, patch_squared=0.001)
DEVICE = PackCost(token=1e-4, token_squared=2e-8, patch=4e-5, patch_squared=3e-7)  # seconds: long videos are slow
FIXED_S = 0.3
RANKS = 4


def plan_by(cost: PackCost) -> Plan:
    rng = np.random.default_rng(0)
    sources = {}
    for name, low, high in (("text", 0, 1), ("image", 30, 300), ("video", 300, 900)):
        vision = rng.integers(low, high, 3000)
        tokens = rng.integers(20, 400, 3000) + vision
        sizes = Sizes(tokens, tokens**2, 4 * vision, (4 * vision) ** 2)
        sources[name] = Source(name, (ShardHeader(name, 3000, 1, name, ""),), np.array([0, 3000]), sizes, {})
    weights = {"text": 0.4, "image": 0.4, "video": 0.2}
    return Plan(Corpus(sources, ResolutionSettings()), weights, Budget(2048, 8192), 16, 2000, 0, cost)


def seconds_of(plan: Plan, batch: GlobalBatch) -> np.ndarray:
    """What packs take on the device: [micro-steps, ranks]."""

    def pack_seconds(names: list[tuple[int, int]]) -> float:
        sizes = [plan.source(source).look(np.array([row])).sizes for source, row in names]
        return float(DEVICE(Sizes.concatenate(sizes)).sum())

    return np.array(
        [
            [pack_seconds([(s.source, s.row) for s in pack.samples]) for pack in micro_step]
            for micro_step in assign(batch, RANKS)
        ]
    )


def run_of(plan: Plan, steps: int, noise: float = 0.0) -> tuple[dict[int, float], float]:
    """Seconds of some steps, and the mean balance of their micro-steps."""
    rng = np.random.default_rng(1)
    seconds, balance = {}, []
    for batch, _ in islice(plan.batches(), steps):
        times = seconds_of(plan, batch)
        seconds[batch.step] = (times.max(axis=1).sum() + FIXED_S) * (1 + noise * rng.normal())
        balance.append((times.mean(axis=1) / times.max(axis=1)).mean())
    return seconds, float(np.mean(balance))


def test_known_coefficients_are_found_and_balance_the_times_they_made(tmp_path: Path) -> None:
    plan = plan_by(CONFIG)
    seconds, balance = run_of(plan, 60)
    fit = fit_cost(plan, CONFIG, RANKS, seconds)
    assert fit.r2 > 0.999 > fit.config_r2
    assert fit.error < 0.002 < fit.config_error
    totals = np.array([16 * 2048.0, 16 * 1e6, 16 * 5e3, 16 * 5e6])  # about what a batch holds: shares, not digits
    found = np.array([fit.cost.token, fit.cost.token_squared, fit.cost.patch, fit.cost.patch_squared]) * fit.seconds
    known = np.array([DEVICE.token, DEVICE.token_squared, DEVICE.patch, DEVICE.patch_squared])
    np.testing.assert_allclose(found @ totals, known @ totals, rtol=0.05)
    np.testing.assert_allclose(found[3], known[3], rtol=0.05)
    fit.write(tmp_path / "cost.json")
    better = plan_by(read_cost(tmp_path / "cost.json", CONFIG))
    assert better.fingerprint != plan.fingerprint
    assert 1 - run_of(better, 30)[1] < 0.7 * (1 - balance)


def test_noise_and_outliers_do_not_lead_astray() -> None:
    plan = plan_by(CONFIG)
    seconds, _ = run_of(plan, 60, noise=0.01)
    seconds[0], seconds[20] = 60.0, 200.0  # the first step of a run, and a checkpoint
    fit = fit_cost(plan, CONFIG, RANKS, seconds)
    assert fit.steps == 57
    assert fit.error < 0.015


def test_steps_of_another_number_of_ranks_are_left_out() -> None:
    """A run of 4 ranks that went on with 2: by those steps' micro-steps the times would be told wrong."""
    plan = plan_by(CONFIG)
    seconds, _ = run_of(plan, 40)
    rows = [
        {"step": step + 1, "step_s": took + 0.5, "data_wait_s": 0.5, "world_size": RANKS} if step < 30
        # Twice the packs of each rank, one after the other.
        else {"step": step + 1, "step_s": 2 * took + 0.5, "data_wait_s": 0.5, "world_size": RANKS // 2}
        for step, took in seconds.items()
    ]  # fmt: skip
    world_size, own, others = most_steps(step_seconds(rows))
    assert (world_size, sorted(own), others) == (RANKS, list(range(30)), 10)
    assert fit_cost(plan, CONFIG, world_size, own).r2 > 0.99
    with pytest.raises(ValueError, match="world_size"):
        most_steps(step_seconds([{"step": 1, "step_s": 1.0, "data_wait_s": 0.0}]))


def test_too_few_steps_are_told() -> None:
    with pytest.raises(ValueError, match="3 usable steps"):
        fit_cost(plan_by(CONFIG), CONFIG, RANKS, dict.fromkeys(range(5), 1.0))


@given(st.lists(st.floats(0, 10), min_size=3, max_size=3).filter(any), st.integers(0, 100))
@settings(max_examples=50, deadline=None)
def test_non_negative_least_squares_finds_what_made_the_values(known: list[float], seed: int) -> None:
    features = np.random.default_rng(seed).uniform(0.1, 1, (30, 3))
    np.testing.assert_allclose(features @ non_negative(features, features @ known + 1e-9), features @ known, atol=1e-5)
    assert (non_negative(features, np.abs(features @ [1.0, -0.1, 0.0]) + 0.01) >= 0).all()


@pytest.mark.parametrize("text", ["", "[]", '{"cost": {"token": 1}}', '{"cost": {"token": -1, "token_squared": 0}}'])
def test_a_file_that_is_no_cost_is_refused_with_the_command(tmp_path: Path, text: str) -> None:
    (tmp_path / "cost.json").write_text(text)
    with pytest.raises(ValueError, match="keye-data fit-cost"):
        read_cost(tmp_path / "cost.json", CONFIG)
    negative = {"token": -1, "token_squared": 0, "patch": 0, "patch_squared": 0}
    (tmp_path / "cost.json").write_text(json.dumps({"cost": negative, "config": negative}))
    with pytest.raises(ValueError, match="at least 0"):
        read_cost(tmp_path / "cost.json", CONFIG)


def test_a_fit_says_what_it_is(tmp_path: Path) -> None:
    fit = CostFit(CONFIG, 1e-12, 0.1, 20, 0.9, 0.1, 0.8, 0.2, CONFIG)
    fit.write(tmp_path / "cost.json")
    assert read_cost(tmp_path / "cost.json", CONFIG) == CONFIG
    with pytest.raises(ValueError, match=r"cost\.json was fitted on a run of another model"):
        read_cost(tmp_path / "cost.json", replace(CONFIG, token=1.1 * CONFIG.token))
