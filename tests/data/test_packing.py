"""Promise: every sample is in exactly one pack, no pack is over either budget, and packs are full."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from work import python_calls

from keye_train.data.exchange import close_gaps
from keye_train.data.filling import Filling
from keye_train.data.packing import Budget, pack_samples

SAMPLES = st.lists(st.tuples(st.integers(1, 100), st.integers(0, 300)), max_size=200)


@given(SAMPLES, st.integers(100, 150), st.integers(300, 500), st.integers(1, 4))
@settings(max_examples=100, deadline=None)
def test_nothing_lost_nothing_twice_budgets_kept(
    samples: list[tuple[int, int]], tokens: int, patches: int, multiple: int
) -> None:
    own_tokens = np.array([sample[0] for sample in samples], dtype=np.int64)
    own_patches = np.array([sample[1] for sample in samples], dtype=np.int64)
    budget = Budget(tokens, patches)
    packs = budget.packs(own_tokens, own_patches, multiple)
    packing = pack_samples(own_tokens, own_patches, budget, packs)
    assert len(packing) == packs
    assert packs % multiple == 0
    assert sorted(packing.order.tolist() + packing.left.tolist()) == list(range(len(samples)))
    members = [packing.members(pack) for pack in range(len(packing))]
    assert all(len(pack) for pack in members)
    assert [int(own_tokens[pack].sum()) for pack in members] == packing.sums(own_tokens).tolist()
    assert all(total <= tokens for total in packing.sums(own_tokens))
    assert all(total <= patches for total in packing.sums(own_patches))


@given(SAMPLES, st.integers(2, 40), st.integers(0, 3), st.integers(0, 1000))
@settings(max_examples=150, deadline=None)
def test_closing_gaps_keeps_budgets_and_loses_nothing(
    samples: list[tuple[int, int]], packs: int, slack: int, seed: int
) -> None:
    """By itself, from any packing: samples anywhere, and rooms that are just enough or have some slack."""
    need, other = (np.array([sample[side] for sample in samples], dtype=np.int64) for side in (0, 1))
    before = np.random.default_rng(seed).integers(-1, packs, len(samples))

    def taken(sizes: np.ndarray, pack_of: np.ndarray) -> np.ndarray:
        return np.array([sizes[pack_of == pack].sum() for pack in range(packs)], dtype=np.int64)

    budgets = taken(need, before) + slack * np.arange(packs), taken(other, before) + slack * 20

    def closed() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        rooms = budgets[0] - taken(need, before), budgets[1] - taken(other, before)
        pack_of = before.copy()
        close_gaps(Filling(need, other, *rooms, pack_of))
        return (pack_of, *rooms)

    pack_of, need_room, other_room = closed()
    assert ((pack_of >= -1) & (pack_of < packs)).all()
    for sizes, budget, room in ((need, budgets[0], need_room), (other, budgets[1], other_room)):
        assert (taken(sizes, pack_of) + room == budget).all()  # what is placed and what is left over are all there is
        assert (room >= 0).all()
    assert need[pack_of >= 0].sum() >= need[before >= 0].sum()  # and no less is placed than before
    for one, other_one in zip(closed(), (pack_of, need_room, other_room), strict=True):
        assert (one == other_one).all()


def test_closing_gaps_places_more() -> None:
    """64 packs with a gap of 2 each, none of which takes one of the 20 samples of 8 without a place."""
    placed = np.random.default_rng(0).integers(10, 40, 64 * 6)
    need, pack_of = np.append(placed, np.full(20, 8)), np.append(np.repeat(np.arange(64), 6), np.full(20, -1))
    rooms = np.full(64, 2), np.zeros(64, dtype=np.int64)
    close_gaps(Filling(need, np.zeros_like(need), *rooms, pack_of))
    assert (pack_of >= 0).sum() >= len(placed) + 0.75 * 2 * 64 // 8  # of 16 for which all gaps together have room
    assert (rooms[0] > 0).sum() <= 64 // 8


def test_packs_take_the_largest_samples_that_fit() -> None:
    need, other = np.array([50, 40, 40, 30, 7, 7, 1]), np.array([0, 0, 9, 0, 0, 0, 0])
    filling = Filling(need, other, np.array([45, 40, 60, 7]), np.full(4, 5), np.full(7, -1))
    filling.fit_largest(np.arange(7), np.array([0, 1, 2]))
    # Packs 2, 0 and 1, from the most room to the least, take samples 0, 1 and 2; the last has too much of the other
    # budget, so pack 1 takes no more. Then packs 2 and 0 with rooms of 10 and 5 take 4 and 6. Pack 3 is not asked.
    assert filling.pack_of.tolist() == [2, 0, -1, -1, 2, -1, 0]
    assert filling.need_room.tolist() == [4, 40, 3, 7]
    assert filling.other_room.tolist() == [5, 5, 5, 5]
    assert filling.waiting.tolist() == [2, 3, 5]


def web_like_window(count: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Tokens and patches of captions, OCR, VQA, texts and videos; a mean of about 1,400 tokens, a long tail."""
    rng = np.random.default_rng(seed)
    kind = rng.choice(5, count, p=[0.45, 0.2, 0.15, 0.12, 0.08])
    text = np.exp(rng.normal(np.array([4.5, 5.5, 5.0, 6.3, 5.0])[kind], 0.7)).astype(np.int64) + 20
    vision = np.exp(rng.normal(np.array([6.2, 6.9, 6.3, 0.0, 8.4])[kind], 0.8)).astype(np.int64)
    vision = np.where(kind == 3, 0, np.minimum(vision, 11000))
    return np.minimum(text, 3000) + vision, vision * 4


@pytest.mark.parametrize(
    ("budget", "least"),
    [
        (Budget(16384, 65536), 0.999),  # tokens are scarce
        (Budget(16384, 49152), 0.97),  # both are, so the bound itself cannot be reached
        (Budget(32768, 80000), 0.98),  # patches are
    ],
)
def test_packs_are_full_in_the_scarcer_budget(budget: Budget, least: float) -> None:
    tokens, patches = web_like_window(8192)
    fits = budget.fits(tokens, patches)
    tokens, patches = tokens[fits], patches[fits]
    packs = budget.packs(tokens, patches)
    packing = pack_samples(tokens, patches, budget, packs)
    placed = packing.order
    filled = max(tokens[placed].sum() / budget.max_tokens, patches[placed].sum() / budget.max_patches)
    assert filled / packs >= least
    assert len(packing.left) <= 0.1 * len(tokens)


def test_every_pack_holds_samples_of_every_size() -> None:
    tokens, patches = web_like_window(8192)
    budget = Budget(16384, 65536)
    packing = pack_samples(tokens, patches, budget, budget.packs(tokens, patches))
    longest = np.array([tokens[packing.members(pack)].max() for pack in range(len(packing))])
    counts = np.diff(packing.starts)
    # Best fit decreasing, which fills one pack after another with samples of one size, gives 64 and 0.98 here.
    assert longest.max() / longest.min() < 5
    assert counts.std() / counts.mean() < 0.3


def test_a_window_is_packed_in_a_moment() -> None:
    """No loop of the interpreter goes over its samples or packs: 0.09 s for 65,536 samples."""
    budget, calls = Budget(16384, 65536), []
    for count in (8192, 65536):
        tokens, patches = web_like_window(count)
        packs = budget.packs(tokens, patches)
        calls.append(python_calls(lambda own=(tokens, patches, budget, packs): pack_samples(*own)))
    assert calls[1] < 2 * calls[0] < 65536


def test_no_samples_make_no_packs() -> None:
    none = np.zeros(0, dtype=np.int64)
    packing = pack_samples(none, none, Budget(10, 10), 0)
    assert len(packing) == 0
    assert packing.sums(none).tolist() == []
