"""Promise: the plan is a function of (index, recipe, seed): the same on every rank, after a resume, at any size."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from dataclasses import asdict
from fractions import Fraction
from itertools import islice, pairwise
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from work import python_calls

from keye_train.compose import load_settings
from keye_train.data import balance, exchange, packing, window
from keye_train.data.corpus import Corpus, Sizes, Source
from keye_train.data.cost import PackCost, language_cost, training_cost
from keye_train.data.draw import DrawRules
from keye_train.data.index import ShardHeader
from keye_train.data.mixture import Shuffle, shuffled
from keye_train.data.packing import Budget
from keye_train.data.plan import PLAN_VERSION, GlobalBatch, Plan, PlanState, assign
from keye_train.model.configuration import KeyeConfig, keye_config
from keye_train.model.flops import FlopCoefficients, pack_flops
from keye_train.settings import MixtureUnit, ResolutionSettings, TrainSettings


def toy_source(name: str, rows: int, seed: int, errors: dict[int, str] | None = None) -> Source:
    """A source that exists as numbers only."""
    rng = np.random.default_rng(seed)
    vision = rng.integers(0, 50, rows) * rng.integers(0, 2, rows)
    tokens = rng.integers(1, 40, rows) + vision
    sizes = Sizes(tokens, tokens**2, vision * 4, (vision * 4) ** 2)
    header = ShardHeader(f"{name}.tar", rows, 1, name, "")
    return Source(name, (header,), np.array([0, rows]), sizes, errors or {})


TOY_COST = PackCost(token=10.0, token_squared=1.0, patch=3.0, patch_squared=0.1)


def toy_plan(
    seed: int = 0, window: int = 200, packs: int = 4, errors: dict[int, str] | None = None, **weights: float
) -> Plan:
    sources = {"a": toy_source("a", 150, 1, errors), "b": toy_source("b", 60, 2), "c": toy_source("c", 30, 3)}
    corpus = Corpus(sources, ResolutionSettings())
    return Plan(corpus, weights or {"a": 0.6, "b": 0.3, "c": 0.1}, Budget(128, 300), packs, window, seed, TOY_COST)


def rows_of(batch: GlobalBatch) -> list[tuple[int, int]]:
    return sorted((sample.source, sample.row) for pack in batch.packs for sample in pack.samples)


def test_same_seed_same_plan_other_seed_other_plan() -> None:
    first = [batch for batch, _ in islice(toy_plan().batches(), 20)]
    assert first == [batch for batch, _ in islice(toy_plan().batches(), 20)]
    assert first != [batch for batch, _ in islice(toy_plan(seed=1).batches(), 20)]


@given(st.integers(0, 1000), st.sampled_from([30, 77, 200, 400]), st.integers(1, 25))
@settings(max_examples=25, deadline=None)
def test_resume_equals_uninterrupted(seed: int, window: int, stop: int) -> None:
    whole = list(islice(toy_plan(seed, window).batches(), 30))
    kept = json.loads(json.dumps(whole[stop - 1][1].to_json()))  # as a checkpoint keeps it
    rest = list(islice(toy_plan(seed, window).batches(PlanState.from_json(kept)), 30 - stop))
    assert rest == whole[stop:]
    assert [batch.step for batch, _ in rest] == list(range(stop, 30))


@given(st.integers(0, 1000), st.sampled_from([20, 200, 350]), st.sampled_from([1, 4, 12]))
@settings(max_examples=25, deadline=None)
def test_every_draw_is_packed_once_or_dropped_with_a_reason_or_waits(seed: int, window: int, packs: int) -> None:
    errors = {3: "broken", 77: "torn"}
    plan = toy_plan(seed, window, packs, errors)
    seen: Counter[tuple[int, int]] = Counter()
    for batch, state in plan.batches():
        seen.update(rows_of(batch))
        seen.update((sample.source, sample.row) for sample in batch.dropped)
        assert {sample.reason for sample in batch.dropped} <= {"broken", "torn"}
        assert len(batch.packs) == packs
        assert all(pack.tokens <= 128 and pack.patches <= 300 for pack in batch.packs)
        if batch.step > 20 and state.batch == 0:  # between two windows
            break
    seen.update(plan.waiting(state))
    expected: Counter[tuple[int, int]] = Counter()
    for number, drawn in enumerate(state.drawn):
        source = plan.source(number)
        rows = Shuffle(len(source), seed, source.name).rows(np.arange(drawn))
        expected.update((number, row) for row in rows.tolist())
    assert seen == expected


@given(st.integers(0, 1000))
@settings(max_examples=15, deadline=None)
def test_any_world_size_reads_the_same_samples_in_a_step(seed: int) -> None:
    for batch, _ in islice(toy_plan(seed, packs=12).batches(), 5):
        for world_size in (1, 2, 3, 4, 6, 12):
            spread = assign(batch, world_size)
            assert [len(micro_step) for micro_step in spread] == [world_size] * (12 // world_size)
            packs = [pack for micro_step in spread for pack in micro_step]
            assert sorted(packs, key=repr) == sorted(batch.packs, key=repr)


def test_packs_that_run_together_cost_alike() -> None:
    together, apart = [], []
    for batch, _ in islice(toy_plan(packs=32, window=2000).batches(), 30):
        costs = np.array([[pack.cost for pack in micro_step] for micro_step in assign(batch, 8)])
        together.append((costs.max(axis=1) / costs.mean(axis=1)).mean())
        plain = np.array([pack.cost for pack in batch.packs])[shuffled(32, batch.step)].reshape(4, 8)  # by chance
        apart.append((plain.max(axis=1) / plain.mean(axis=1)).mean())
    assert np.mean(together) - 1 < 0.5 * (np.mean(apart) - 1)


def test_cheap_and_dear_micro_steps_come_in_any_order_on_any_rank() -> None:
    dearest_step, dearest_rank = Counter(), Counter()
    for batch, _ in islice(toy_plan(packs=16, window=1000).batches(), 60):
        costs = np.array([[pack.cost for pack in micro_step] for micro_step in assign(batch, 4)])
        step, rank = np.unravel_index(costs.argmax(), costs.shape)
        dearest_step[int(step)] += 1
        dearest_rank[int(rank)] += 1
    assert len(dearest_step) == len(dearest_rank) == 4


def test_the_mixture_of_what_is_read_follows_the_weights() -> None:
    counts: Counter[int] = Counter()
    for batch, _ in islice(toy_plan().batches(), 150):
        counts.update(source for source, _ in rows_of(batch))
    shares = [counts[number] / counts.total() for number in range(3)]
    np.testing.assert_allclose(shares, [0.6, 0.3, 0.1], atol=0.01)


def test_no_sample_waits_twice() -> None:
    """Left-overs of a window are in the next one; otherwise an awkward sample could wait for ever."""
    plan = toy_plan(window=150, packs=4)
    shuffles = [Shuffle(len(plan.source(number)), 0, name) for number, name in enumerate(plan.sources)]
    states = [state for _, state in islice(plan.batches(), 80)]
    starts = [state for state in states if state.batch == 0]
    assert len(starts) > 5
    for before, after in pairwise(starts):
        fresh = Counter(
            (number, row)
            for number in range(3)
            for row in shuffles[number].rows(np.arange(before.drawn[number], after.drawn[number])).tolist()
        )
        assert not Counter(plan.waiting(after)) - fresh


@given(st.integers(0, 1000), st.sampled_from([30, 200, 1000]), st.sampled_from([1, 4, 12]))
@settings(max_examples=20, deadline=None)
def test_a_checkpoint_keeps_a_few_numbers_however_large_the_window(seed: int, window: int, packs: int) -> None:
    plan = toy_plan(seed, window, packs)
    for _, state in islice(plan.batches(), 15):
        flat = [n for value in state.to_json().values() for n in (value if isinstance(value, tuple) else [value])]
        assert len(flat) == 5 * 3 + 7
        # Another process, which has planned nothing, finds the same samples waiting.
        assert toy_plan(seed, window, packs).waiting(state) == plan.waiting(state)


def test_a_position_of_another_version_is_refused_with_what_to_do() -> None:
    _, state = next(toy_plan().batches())
    old = {**state.to_json(), "carried": [[0, 1]]}
    del old["before_drawn"]
    with pytest.raises(ValueError, match=r"another version of this program.*another run_dir"):
        PlanState.from_json(old)


def test_samples_over_the_budget_are_dropped_with_the_setting_to_change() -> None:
    corpus = Corpus({"a": toy_source("a", 150, 1)}, ResolutionSettings())
    plan = Plan(corpus, {"a": 1.0}, Budget(60, 100), 2, 150, 0, TOY_COST)
    batch, _ = next(plan.batches())
    assert batch.dropped
    for sample in batch.dropped:
        tokens = int(corpus.sources["a"].sizes.tokens[sample.row])
        patches = int(corpus.sources["a"].sizes.patches[sample.row])
        assert tokens > 60 or patches > 100
        assert (f"{tokens} tokens > stage.max_tokens=60" in sample.reason) == (tokens > 60)
        assert (f"{patches} patches > stage.max_patches=100" in sample.reason) == (patches > 100)


def sums_of(samples: np.ndarray, media: np.ndarray) -> Sizes:
    return Sizes(*(np.array([total]) for total in (samples.sum(), (samples**2).sum(), media.sum(), (media**2).sum())))


def test_the_cost_of_a_pack_is_that_of_the_model() -> None:
    config = KeyeConfig()
    samples, media = np.array([100, 2000, 31]), np.array([64, 3000])
    cost = language_cost(FlopCoefficients.of(config))(sums_of(samples, media))
    np.testing.assert_allclose(cost, pack_flops(config, samples, media), rtol=1e-12)


def test_the_cost_of_a_pack_of_pairs_counts_both_towers_and_the_decoder() -> None:
    """Against FlopCoefficients of a decoder that sees images and captions as samples of a language model."""
    base = ["stage=0_vision", "model=tiny", "data=demo"]
    media, places = np.array([64, 400]), 64
    for weight, trained in ((0.0, "[vision,text_tower]"), (2.0, "[vision,text_tower,caption_decoder]")):
        settings = load_settings(
            TrainSettings, "train", [*base, f"stage.caption_weight={weight}", f"stage.trainable={trained}"]
        )
        places = settings.model.text_tower.max_tokens
        sizes = sums_of(np.full(len(media), places), media)
        vision = FlopCoefficients.of(keye_config(settings.model)).for_training(["vision"])
        text = settings.model.text_tower
        weights = text.num_hidden_layers * (4 * text.hidden_size**2 + 2 * text.hidden_size * text.intermediate_size)
        pairs = text.num_hidden_layers * 4 * text.hidden_size * places**2
        expected = 3 * len(media) * (2 * weights * places + pairs)
        expected += (vision.pixel_patch + vision.tower_patch) * media.sum() + vision.vision_pair * (media**2).sum()
        if weight:
            shape = asdict(settings.model.caption_decoder)
            head_dim = shape["hidden_size"] // shape["num_attention_heads"]
            own = KeyeConfig(**shape, vocab_size=text.vocab_size, head_dim=head_dim)
            own.vision_config = keye_config(settings.model).vision
            decoder = FlopCoefficients.of(own).for_training()
            expected += decoder.language(media // 4 + places).sum() + decoder.projector_patch * media.sum()
            expected += decoder.labelled_token * len(media) * places
        np.testing.assert_allclose(training_cost(settings)(sizes), [expected], rtol=1e-12)


def test_a_state_of_another_plan_is_refused() -> None:
    _, state = next(toy_plan().batches())
    with pytest.raises(ValueError, match="belongs to another plan") as refused:
        next(toy_plan(seed=1).batches(state))
    for setting in ("data.overlong", "data.quarantine", "data.cost_file", "data.balance_packs"):
        assert setting in str(refused.value)


PLANNED = 4, "3f213f37c9befe75"
"""``PLAN_VERSION``, and what toy plans give by it."""


def planned() -> str:
    """Digest of some batches of plans of several kinds."""
    found = hashlib.sha256()
    for packs, balance_packs, samples, unit, steps in (
        (64, 64, 3000, MixtureUnit.samples, 6),
        (32, 8, 2000, MixtureUnit.tokens, 6),
        (4, None, 200, MixtureUnit.compute, 8),
    ):
        sources = {name: toy_source(name, rows, rows) for name, rows in (("a", 1500), ("b", 600), ("c", 90))}
        corpus, weights = Corpus(sources, ResolutionSettings()), {"a": 0.6, "b": 0.3, "c": 0.1}
        rules = DrawRules(unit, block_rows=16, group_blocks=8)
        plan = Plan(corpus, weights, Budget(512, 1400), packs, samples, 0, TOY_COST, rules, balance_packs)
        for batch, _ in islice(plan.batches(), steps):
            members = [[(sample.source, sample.row) for sample in pack.samples] for pack in batch.packs]
            found.update(repr(members).encode())
    return found.hexdigest()[:16]


def test_other_batches_are_another_version() -> None:
    assert (PLAN_VERSION, planned()) == PLANNED, (
        "the same recipe and data give other global batches than by the version in PLANNED: raise plan.PLAN_VERSION, "
        "so that no run goes on across the change, and put both here"
    )


@pytest.mark.parametrize(
    ("module", "name", "value"),
    [
        (balance, "TOLERANCE", 0.08),
        (balance, "FILLERS", Fraction(2, 64)),
        (exchange, "COLLECTORS", (2, 4)),
        (exchange, "ROUNDS", 3),
        (packing, "TIGHT_SHARE", 0.3),
        (window, "RESERVE", 0.01),
        (window, "REST", 64),
        (window, "FLOPS_PER_UNIT", 10),
    ],
)
def test_other_constants_of_the_planner_are_another_plan(
    module: ModuleType, name: str, value: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = toy_plan().fingerprint
    monkeypatch.setattr(module, name, value)
    assert toy_plan().fingerprint != before


def test_impossible_mixtures_are_refused_at_the_start() -> None:
    with pytest.raises(ValueError, match="source 'x', which"):
        toy_plan(x=1.0)
    corpus = Corpus({"a": toy_source("a", 20, 1)}, ResolutionSettings())
    with pytest.raises(ValueError, match=r"data\.sources\.a: none of its 20 samples can be used"):
        Plan(corpus, {"a": 1.0}, Budget(1, 10), 2, 100, 0, TOY_COST)
    batch, _ = next(toy_plan(packs=6).batches())
    with pytest.raises(ValueError, match="does not divide over 4 ranks"):
        assign(batch, 4)


def test_going_on_at_a_billion_samples_takes_no_longer_than_at_the_start() -> None:
    plan = toy_plan(window=2000)
    start = plan.start()
    counts = (600_000_000, 300_000_000, 100_000_000)
    before = tuple(count - count // 500_000 for count in counts)
    far = PlanState(plan.fingerprint, 10**7, 500_000, 0, counts, (0, 0, 0), counts, 0, before, before, 0)
    calls = [python_calls(lambda state=state: next(toy_plan(window=2000).batches(state))) for state in (start, far)]
    assert calls[1] < 2 * calls[0]


def test_the_fingerprint_follows_the_data_and_not_their_place(tmp_path: Path) -> None:
    assert toy_plan().fingerprint == toy_plan().fingerprint
    assert toy_plan().fingerprint != toy_plan(window=100).fingerprint
    moved = toy_source("a", 20, 1)
    here = Corpus({"a": moved}, ResolutionSettings()).fingerprint()
    header = ShardHeader(str(tmp_path / "elsewhere.tar"), 20, 1, "a", "")
    there = Source("a", (header,), moved.first_rows, moved.sizes, {})
    assert Corpus({"a": there}, ResolutionSettings()).fingerprint() == here
    assert Corpus({"a": moved}, ResolutionSettings(image_max_tokens=99)).fingerprint() != here
