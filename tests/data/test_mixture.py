"""Promise: the draw holds every source by its share at every prefix, and an epoch holds every row once."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from fractions import Fraction
from itertools import cycle, islice, repeat

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from keye_train.data.mixture import Mixture, MixtureState, Shuffle, shuffled
from keye_train.data.shares import Weights

WEIGHT = st.decimals("0.001", "50", places=3).map(float)
WEIGHTS = st.lists(WEIGHT, min_size=1, max_size=12)
POINT = st.dictionaries(st.sampled_from("abcdef"), WEIGHT, min_size=1)
LATER = st.lists(st.tuples(st.integers(1, 250), POINT), max_size=3, unique_by=lambda point: point[0]).map(sorted)
CURRICULA = st.builds(Weights.of, POINT, LATER, st.booleans())
SIZES = st.lists(st.lists(st.integers(0, 12), min_size=1, max_size=5).filter(any), min_size=6, max_size=6)


def shares_at(weights: Weights, place: Fraction) -> dict[str, Fraction]:
    """Shares at one place, straight from the definition."""
    knots = [(amount, {name: w / sum(own.values()) for name, w in own.items()}) for amount, own in weights.knots]
    before = [knot for knot in knots if knot[0] <= place][-1]
    after = next((knot for knot in knots if knot[0] > place), None)
    if after is None or not weights.linear:
        return before[1]
    part = (place - before[0]) / (after[0] - before[0])
    names = {*before[1], *after[1]}
    return {name: (1 - part) * before[1].get(name, 0) + part * after[1].get(name, 0) for name in names}


def integral(weights: Weights, name: str, total: int) -> list[Fraction]:
    """What a source should have had of the first 0 .. total: a straight line's integral is the sum of its midpoints."""
    seen = [Fraction(0)]
    last = weights.knots[-1][0]
    stays = shares_at(weights, Fraction(last)).get(name, Fraction(0))
    for place in range(total):
        share = stays if place >= last else shares_at(weights, place + Fraction(1, 2)).get(name, Fraction(0))
        seen.append(seen[-1] + share)
    return seen


def endless(sizes: Sequence[Sequence[int]]) -> Callable[[Sequence[int]], list[Iterator[int]]]:
    """What each source's samples count, from given numbers of draws on; its sizes come again and again."""

    def streams(counts: Sequence[int]) -> list[Iterator[int]]:
        return [islice(cycle(own), count % len(own), None) for own, count in zip(sizes, counts, strict=False)]

    return streams


@given(WEIGHTS, st.integers(1, 400))
@settings(max_examples=25, deadline=None)
def test_every_prefix_is_within_one_of_the_exact_share(weights: list[float], number: int) -> None:
    mixture = Mixture({f"source{i:02d}": weight for i, weight in enumerate(weights)})
    exact = [Fraction(str(weight)) for weight in weights]
    drawn, state = mixture.draw(mixture.start(), number)
    assert state.total == number
    for source, weight in enumerate(exact):
        share = weight / sum(exact)
        seen = np.cumsum(drawn == source).tolist()
        assert all(abs(count - share * (n + 1)) < 1 for n, count in enumerate(seen))
        assert seen[-1] == state.spent[source]


@given(CURRICULA, st.integers(1, 250))
@settings(max_examples=20, deadline=None)
def test_changing_weights_are_met_within_one_of_their_integral(weights: Weights, number: int) -> None:
    mixture = Mixture(weights)
    drawn, _ = mixture.draw(mixture.start(), number)
    for source, name in enumerate(mixture.sources):
        seen = np.cumsum(drawn == source).tolist()
        exact = integral(weights, name, number)
        assert all(abs(count - exact[n + 1]) < 1 for n, count in enumerate(seen))


@given(CURRICULA, SIZES, st.integers(1, 70))
@settings(max_examples=25, deadline=None)
def test_shares_of_amounts_are_met_within_one_largest_sample(
    weights: Weights, sizes: list[list[int]], number: int
) -> None:
    """Between S - L - 1 and S + l, l the source's largest sample and L the largest of all."""
    mixture = Mixture(weights, sized=True)
    drawn, state = mixture.draw(mixture.start(), number, endless(sizes)([0] * len(mixture.sources)))
    exact = [integral(weights, name, state.total) for name in mixture.sources]
    largest = max(max(own) for own in sizes)
    spent, counts = [0] * len(exact), [0] * len(exact)
    for source in drawn.tolist():
        spent[source] += sizes[source][counts[source] % len(sizes[source])]
        counts[source] += 1
        for own, curve, drawn_so_far in zip(sizes, exact, spent, strict=False):
            assert curve[sum(spent)] - largest - 1 <= drawn_so_far <= curve[sum(spent)] + max(own)
    assert tuple(spent) == state.spent


@given(CURRICULA, SIZES, st.booleans(), st.integers(0, 120), st.integers(1, 120))
@settings(max_examples=40, deadline=None)
def test_going_on_from_a_state_equals_one_long_draw(
    weights: Weights, sizes: list[list[int]], sized: bool, first: int, second: int
) -> None:
    mixture = Mixture(weights, sized)
    streams = endless(sizes if sized else [[1]] * 6)
    none = [0] * len(mixture.sources)
    whole, after = mixture.draw(mixture.start(), first + second, streams(none))
    head, middle = mixture.draw(mixture.start(), first, streams(none))
    counts = np.bincount(head, minlength=len(none)).tolist()
    tail, end = Mixture(weights, sized).draw(middle, second, streams(counts))
    np.testing.assert_array_equal(whole, np.concatenate([head, tail]))
    assert end == after


@given(
    st.lists(st.tuples(WEIGHT, st.one_of(st.none(), st.integers(1, 60))), min_size=1, max_size=6),
    st.lists(st.integers(1, 40), min_size=1, max_size=10),
)
@settings(max_examples=30, deadline=None)
def test_a_source_that_ends_leaves_its_share_to_the_others(
    sources: list[tuple[float, int | None]], cuts: list[int]
) -> None:
    """Drawn in pieces of any sizes; from each end on, counts are within one of the shares of those that remain."""
    names = [f"s{number}" for number in range(len(sources))]
    mixture = Mixture(dict(zip(names, (weight for weight, _ in sources), strict=True)))
    state, counts, drawn = mixture.start(), [0] * len(names), []
    for cut in cuts:
        left = [repeat(1) if most is None else repeat(1, most - count)
                for (_, most), count in zip(sources, counts, strict=True)]  # fmt: skip
        piece, state = mixture.draw(state, cut, left)
        counts = (np.array(counts) + np.bincount(piece, minlength=len(names))).tolist()
        drawn += piece.tolist()
    endless_ones = any(most is None for _, most in sources)
    assert len(drawn) == min(sum(cuts), 10**9 if endless_ones else sum(most or 0 for _, most in sources))
    had, since, origin = [0] * len(names), [0] * len(names), 0
    for place, source in enumerate(drawn):
        had[source] += 1
        since[source] += 1
        present = [i for i, (_, most) in enumerate(sources) if had[i] != most or i == source]
        total = sum(Fraction(str(sources[i][0])) for i in present)
        for i in present:
            share = Fraction(str(sources[i][0])) / total
            assert abs(since[i] - share * (place + 1 - origin)) < 1
        if had[source] == sources[source][1]:
            since, origin = [0] * len(names), place + 1


def test_shares_stay_exact_far_into_a_run() -> None:
    """1/3 as a user writes it; after 3e12 draws the counts are those of 0.333333 exactly, not of a rounded share."""
    mixture = Mixture({"a": 0.333333, "b": 0.666667})
    far = MixtureState((333333 * 3_000_000, 666667 * 3_000_000))
    np.testing.assert_array_equal(mixture.draw(far, 6)[0], mixture.draw(mixture.start(), 6)[0])


def test_a_change_of_weights_is_exact_far_into_a_run() -> None:
    """From all a to all b over 1e13 tokens: half-way a has had three quarters of what was drawn."""
    weights = Weights.of({"a": 1}, [(10**13, {"b": 1})])
    curves, scale = weights.curves(0, ["a", "b"], 1)
    half = 5 * 10**12
    assert curves["a"].at(half) * 4 == 3 * half * scale
    for amount in (1, 12345, half - 1):
        place = curves["b"].reach(amount * scale)
        assert curves["b"].at(place) >= amount * scale > curves["b"].at(place - 1)


@pytest.mark.parametrize("linear", [True, False])
def test_where_only_sources_without_weight_remain_the_next_weights_hold(linear: bool) -> None:
    weights = Weights.of({"a": 1}, [(100, {"a": 1, "b": 1})], linear)
    mixture = Mixture(weights)
    drawn, _ = mixture.draw(mixture.start(), 40, [repeat(1, 10), repeat(1)])
    assert drawn[-20:].tolist() == [1] * 20


def test_sources_of_weight_zero_are_left_out_and_no_weight_is_an_error() -> None:
    assert Mixture({"a": 1, "b": 0}).sources == ("a",)
    with pytest.raises(ValueError, match="no source has a weight above 0"):
        Mixture({"a": 0.0})
    with pytest.raises(ValueError, match="changes at 5 after it has changed at 9"):
        Weights.of({"a": 1}, [(9, {"a": 1}), (5, {"a": 2})])


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


@given(st.lists(st.integers(1, 60), min_size=1, max_size=6), st.integers(1, 300), st.integers(0, 10**13))
@settings(max_examples=100, deadline=None)
def test_many_draws_at_once_are_those_of_one_after_another(weights: list[int], number: int, far: int) -> None:
    mixture = Mixture({f"s{place}": weight / 100 for place, weight in enumerate(weights)})
    state = MixtureState(tuple(far * weight for weight in weights))
    at_once = mixture.draw(state, number)
    one_by_one = mixture.draw(state, number, [repeat(1)] * len(weights))
    np.testing.assert_array_equal(at_once[0], one_by_one[0])
    assert at_once[1] == one_by_one[1]
