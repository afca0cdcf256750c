"""Promise: packs that run at the same time cost alike, batches keep the mix, and no pack is lost on the way."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterator
from itertools import islice

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from keye_train.data.balance import FILLERS, form_batches
from keye_train.data.corpus import Corpus, Sizes, Source
from keye_train.data.cost import PackCost
from keye_train.data.index import ShardHeader
from keye_train.data.packing import Budget
from keye_train.data.plan import GlobalBatch, Plan, PlanState
from keye_train.settings import ResolutionSettings

GROUPS = st.sampled_from([(1, 1), (4, 1), (4, 4), (6, 3), (8, 2), (64, 16), (64, 64), (48, 24)])


def packs_of_two_kinds(count: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Costs with a long tail, and the mix that goes with them: dear packs have more of source 0."""
    rng = np.random.default_rng(seed)
    costs = np.exp(rng.normal(0, 0.3, count))
    video = rng.binomial(20, np.clip(0.1 + 0.15 * costs, 0, 1))
    return costs, np.stack([video, 20 - video, rng.poisson(4, count)], axis=1).astype(np.int64)


@given(st.integers(0, 9), GROUPS, st.integers(0, 2**40), st.sampled_from([0.0, 0.01, 1.0]))
@settings(max_examples=80, deadline=None)
def test_every_pack_is_in_one_batch(batches: int, group: tuple[int, int], seed: int, spread: float) -> None:
    """Also where all cost the same, or nothing."""
    batch_packs, like_packs = group
    costs, mix = packs_of_two_kinds(batches * batch_packs, seed % 1000)
    found = form_batches(costs * spread, mix, batch_packs, like_packs, seed)
    assert found.shape == (batches, batch_packs)
    assert sorted(found.ravel().tolist()) == list(range(batches * batch_packs))
    again = form_batches(costs * spread * 2.0**40, mix, batch_packs, like_packs, seed)
    np.testing.assert_array_equal(found, again)  # the unit of cost does not matter


@pytest.mark.parametrize(("batch_packs", "least", "most"), [(256, 0.96, 1.1), (64, 0.93, 6.0)])
def test_micro_steps_are_even_and_batches_mixed(batch_packs: int, least: float, most: float) -> None:
    """64 ranks with four micro-batches each, and with one: balance, and the source that strays most, x chance."""
    costs, mix = packs_of_two_kinds(256 * 40)
    batches = form_batches(costs, mix, batch_packs, 64, 1)
    together = -np.sort(-costs[batches], axis=1).reshape(-1, 64)
    assert (together.mean(axis=1) / together.max(axis=1)).mean() > least
    order = np.random.default_rng(0).permutation(len(costs)).reshape(batches.shape)
    strays = [np.std(mix[rows].sum(axis=1) / mix[rows].sum(axis=(1, 2))[:, None], axis=0) for rows in (batches, order)]
    assert (strays[0] / strays[1]).max() < most


def test_the_cheapest_packs_are_spread_over_all_groups() -> None:
    costs, mix = packs_of_two_kinds(128 * 12)
    fillers = int(64 * FILLERS)
    cheapest = set(np.argsort(costs, kind="stable")[: 24 * fillers].tolist())
    for batch in form_batches(costs, mix, 128, 64, 0).reshape(-1, 64):
        assert len(cheapest & set(batch.tolist())) == fillers


# --------------------------------------------------------------------------------------- windows that fill batches


def numbers(rows: int, longest: int, errors: dict[int, str], epochs: int | None) -> Source:
    tokens = np.random.default_rng(rows).integers(1, longest + 1, rows)
    header = ShardHeader("a.tar", rows, 1, "a", "")
    source = Source("a", (header,), np.array([0, rows]), Sizes(tokens, tokens**2, tokens, tokens**2), errors)
    source.max_epochs = epochs
    return source


@given(
    st.integers(5, 150),
    st.integers(1, 60),
    st.integers(1, 300),
    st.sampled_from([(1, 1), (4, 2), (12, 4)]),
    st.floats(0, 0.97),
    st.sampled_from([None, 1, 3]),
)
@settings(max_examples=25, deadline=None)
def test_windows_end_with_whole_batches(
    rows: int, longest: int, window: int, group: tuple[int, int], broken: float, epochs: int | None
) -> None:
    """Windows far below and above a global batch, with nearly all samples unreadable, without and with an end."""
    errors = {row: "broken" for row in range(1, rows) if (row * 0.618) % 1 < broken}
    source = numbers(rows, longest, errors, epochs)
    packs, like = group
    cost = PackCost(1.0, 0.0, 0.0, 0.0)
    plan = Plan(
        Corpus({"a": source}, ResolutionSettings()), {"a": 1.0}, Budget(60, 60), packs, window, 0, cost, None, like
    )
    seen: Counter[int] = Counter()
    batches = plan.batches()
    if epochs is not None and sum(source.sizes.tokens[row] for row in range(rows) if row not in errors) * epochs < 60:
        with pytest.raises(ValueError, match="the data end before"):
            next(batches)
        return
    drawn, found = 0, list(islice(batches, 12)) if epochs is None else _until_the_end(batches)
    for batch, after in found:
        assert len(batch.packs) == packs
        assert all(pack.samples and pack.tokens <= 60 for pack in batch.packs)
        seen.update(sample.row for pack in batch.packs for sample in pack.samples)
        seen.update(gone.row for gone in batch.dropped)
        if after.batch == 0 and after is not found[-1][1]:
            assert after.drawn[0] - drawn >= min(window, (epochs or 2**40) * rows - drawn)
            drawn = after.drawn[0]
            assert seen.total() + len(plan.waiting(after)) == drawn
    if epochs is not None and found:
        assert seen == dict.fromkeys(range(rows), epochs)


def _until_the_end(batches: Iterator[tuple[GlobalBatch, PlanState]]) -> list[tuple[GlobalBatch, PlanState]]:
    found = []
    try:
        found += batches
    except ValueError as error:  # not one batch is full
        if "the data end before" not in str(error):
            raise
    return found


def test_a_window_leaves_little_over() -> None:
    """What waits was left by the gaps of the main part; draws that a global batch lacks are made, not waited for."""
    source = numbers(5000, 60, {}, None)
    cost = PackCost(1.0, 1.0, 0.0, 0.0)
    plan = Plan(Corpus({"a": source}, ResolutionSettings()), {"a": 1.0}, Budget(256, 256), 64, 3000, 0, cost)
    tokens = source.sizes.tokens
    states = [after for _, after in islice(plan.batches(), 60) if after.batch == 0]
    waiting = [sum(int(tokens[row]) for _, row in plan.waiting(after)) for after in states]
    assert len(waiting) > 5
    assert max(waiting) < 4 * 256  # not a global batch of 64 packs


def test_more_ranks_than_like_packs_are_told_what_to_set(caplog: pytest.LogCaptureFixture) -> None:
    source = numbers(100, 60, {}, None)
    plan = Plan(
        Corpus({"a": source}, ResolutionSettings()), {"a": 1.0}, Budget(60, 60), 8, 50, 0, PackCost(1.0, 0.0, 0.0, 0.0)
    )
    with caplog.at_level(logging.INFO):
        plan.check_world_size(2)
        assert not [record for record in caplog.records if record.name.startswith("keye_train")]
        plan.check_world_size(8)
    assert "data.balance_packs=8" in caplog.text
