"""Promise: the draw holds every source within one of its share at every prefix, and an epoch holds every row once."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from keye_train.data.mixture import Mixture, Shuffle, shuffled

WEIGHTS = st.lists(st.decimals("0.001", "50", places=3).map(float), min_size=1, max_size=12)


@given(WEIGHTS, st.integers(1, 600))
@settings(max_examples=60, deadline=None)
def test_every_prefix_is_within_one_of_the_exact_share(weights: list[float], number: int) -> None:
    mixture = Mixture({f"source{i:02d}": weight for i, weight in enumerate(weights)})
    exact = [Fraction(str(weight)) for weight in weights]
    drawn, counts = mixture.draw([0] * len(weights), number)
    assert sum(counts) == number
    for source, weight in enumerate(exact):
        share = weight / sum(exact)
        seen = np.cumsum(drawn == source).tolist()
        assert all(abs(count - share * (n + 1)) < 1 for n, count in enumerate(seen))
        assert seen[-1] == counts[source]


@given(WEIGHTS, st.integers(0, 300), st.integers(1, 300))
@settings(max_examples=40, deadline=None)
def test_going_on_from_counts_equals_one_long_draw(weights: list[float], first: int, second: int) -> None:
    mixture = Mixture({f"source{i:02d}": weight for i, weight in enumerate(weights)})
    start = [0] * len(weights)
    whole, after = mixture.draw(start, first + second)
    head, middle = mixture.draw(start, first)
    tail, end = mixture.draw(middle, second)
    np.testing.assert_array_equal(whole, np.concatenate([head, tail]))
    assert end == after


def test_shares_stay_exact_far_into_a_run() -> None:
    """1/3 as a user writes it; after 3e12 draws the counts are those of 0.333333 exactly, not of a rounded share."""
    mixture = Mixture({"a": 0.333333, "b": 0.666667})
    counts = (333333 * 3_000_000, 666667 * 3_000_000)
    drawn, _ = mixture.draw(counts, 6)
    np.testing.assert_array_equal(drawn, mixture.draw([0, 0], 6)[0])


def test_sources_of_weight_zero_are_left_out_and_no_weight_is_an_error() -> None:
    assert Mixture({"a": 1, "b": 0}).sources == ("a",)
    with pytest.raises(ValueError, match="no source has a weight above 0"):
        Mixture({"a": 0.0})


@given(st.integers(1, 3000), st.integers(0, 2**40), st.integers(0, 5))
@settings(max_examples=60, deadline=None)
def test_an_epoch_is_a_permutation(size: int, seed: int, epoch: int) -> None:
    rows = Shuffle(size, seed, "source").rows(epoch * size + np.arange(size))
    assert sorted(rows.tolist()) == list(range(size))


def test_epochs_sources_and_seeds_have_orders_of_their_own() -> None:
    positions = np.arange(1000)
    orders = [
        Shuffle(1000, 0, "a").rows(positions),
        Shuffle(1000, 0, "a").rows(positions + 1000),
        Shuffle(1000, 0, "b").rows(positions),
        Shuffle(1000, 1, "a").rows(positions),
    ]
    for i, one in enumerate(orders):
        for other in orders[:i]:
            assert (one == other).sum() < 20  # equal places by chance: about one


def test_the_shuffle_is_even() -> None:
    """Where each of 8 rows lands over 4,000 epochs: chi-squared with 49 degrees of freedom stays in its usual range."""
    places = Shuffle(8, 0, "a").rows(np.arange(8 * 4000)).reshape(4000, 8)
    counts = np.stack([np.bincount(places[:, column], minlength=8) for column in range(8)])
    assert ((counts - 500) ** 2 / 500).sum() < 100


def test_a_position_far_away_needs_no_table() -> None:
    shuffle = Shuffle(10**12, 0, "huge")
    rows = shuffle.rows(np.array([0, 1, 10**12 - 1, 5 * 10**12 + 7]))
    assert len(set(rows.tolist())) == 4
    assert rows.min() >= 0
    assert rows.max() < 10**12


def test_shuffled_is_a_permutation_that_follows_the_seed() -> None:
    assert sorted(shuffled(100, 3).tolist()) == list(range(100))
    assert shuffled(100, 3).tolist() == shuffled(100, 3).tolist()
    assert shuffled(100, 3).tolist() != shuffled(100, 4).tolist()
