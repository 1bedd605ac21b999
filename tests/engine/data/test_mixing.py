"""Mixtures of sets: exact shares, each set in its own order, sets that join later."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from carillon.engine.data.mixing import PERIOD, Mixture, Share, tempered


def mixture(*weights: float, seed: int = 0) -> Mixture:
    return Mixture([Share(name=f"s{i}", weight=w) for i, w in enumerate(weights)], seed)


def test_every_period_holds_each_set_as_often_as_its_share() -> None:
    sets, index = mixture(3, 1, 4).places(np.arange(3 * PERIOD))
    for period in sets.reshape(3, PERIOD):
        assert np.bincount(period).tolist() == [24576, 8192, 32768]
    for number in range(3):  # each set's samples come once and in order
        own = index[sets == number]
        assert np.array_equal(own, np.arange(len(own)))
    runs = np.diff(np.flatnonzero(sets == 1))
    assert runs.max() < 200  # a share of one in eight, without a long pause


def test_remainders_go_to_the_largest() -> None:
    sets, _ = mixture(1, 1, 1).places(np.arange(PERIOD))
    assert sorted(Counter(sets.tolist()).values()) == [21845, 21845, 21846]


@settings(deadline=None, max_examples=30)
@given(
    weights=st.lists(st.floats(0.01, 10), min_size=1, max_size=5),
    joins=st.lists(st.integers(1, 3 * PERIOD), max_size=3, unique=True),
    seed=st.integers(0, 2**32),
    data=st.data(),
)
def test_any_positions_agree_with_walking_from_the_start(
    weights: list[float], joins: list[int], seed: int, data: st.DataObject
) -> None:
    shares = [Share(name=f"s{i}", weight=w) for i, w in enumerate(weights)]
    shares += [Share(name=f"j{p}", weight=1.5, from_position=p) for p in joins]
    walked = Mixture(shares, seed).places(np.arange(4 * PERIOD))
    seen: Counter[int] = Counter()
    for number in range(len(shares)):
        own = walked.draws[walked.sets == number]
        assert np.array_equal(own, np.arange(len(own)))
    some = np.array(data.draw(st.lists(st.integers(0, 4 * PERIOD - 1), min_size=1, max_size=40)))
    fresh = Mixture(shares, seed)  # as another process, after any restart
    sets, index = fresh.places(some)
    assert np.array_equal(sets, walked.sets[some])
    assert np.array_equal(index, walked.draws[some])
    position = int(some[0])
    seen.update(walked.sets[:position].tolist())
    assert fresh.drawn(position).tolist() == [seen[number] for number in range(len(shares))]


def test_a_set_that_joins_changes_nothing_before_it() -> None:
    first = [Share(name="a", weight=1), Share(name="b", weight=2)]
    joined = [*first, Share(name="c", weight=3, from_position=100_001)]
    before = np.arange(100_001)
    old, new = Mixture(first, 5).places(before), Mixture(joined, 5).places(before)
    assert np.array_equal(old.sets, new.sets)
    assert np.array_equal(old.draws, new.draws)
    after = Mixture(joined, 5).places(np.arange(100_001, 100_001 + PERIOD))
    assert np.bincount(after.sets)[2] == PERIOD // 2
    drawn = Mixture(first, 5).drawn(100_001)
    assert after.draws[after.sets == 0][0] == drawn[0]
    assert after.draws[after.sets == 2][0] == 0


@settings(deadline=None, max_examples=60)
@given(
    sizes=st.lists(st.integers(1, 10**9), min_size=1, max_size=6),
    later=st.lists(st.integers(1, 10**9), min_size=1, max_size=6),
    temperature=st.sampled_from([0.5, 1.0, 1.7, 3.0]),
)
def test_sets_that_join_turn_no_rounding_of_those_before_them(
    sizes: list[int], later: list[int], temperature: float
) -> None:
    """Also where shares tie, as three sets of one size do."""
    sizes = [*sizes, sizes[0], sizes[0]]

    def places(joins: list[int]) -> np.ndarray:
        all_sizes = [*sizes, *joins]
        weights = tempered(all_sizes, [None] * len(all_sizes), temperature)
        shares = [
            Share(name=str(n), weight=weight, from_position=0 if n < len(sizes) else 1 + PERIOD)
            for n, weight in enumerate(weights)
        ]
        return Mixture(shares, 1).places(np.arange(PERIOD)).sets

    try:
        alone, together = places([]), places(later)
    except ValueError:  # a share too small, of either
        return
    assert np.array_equal(alone, together)


def test_ten_billion_positions_in_need_no_table_of_their_size() -> None:
    far = np.arange(10**13, 10**13 + 1000)
    sets, index = mixture(1, 3).places(far)
    drawn = mixture(1, 3).drawn(10**13)
    assert drawn.sum() == 10**13
    assert index[np.argmax(sets == 0)] == drawn[0]


def test_seeds_differ() -> None:
    some = np.arange(1000)
    assert not np.array_equal(
        mixture(1, 1).places(some).sets, mixture(1, 1, seed=1).places(some).sets
    )


@pytest.mark.parametrize(
    ("shares", "message"),
    [
        ([], "no set has a weight above 0"),
        ([Share(name="a", weight=0)], "no set has a weight above 0"),
        ([Share(name="a", weight=1, from_position=7)], "at position 0 no set"),
        ([Share(name="a", weight=float("nan"))], "no set has a weight above 0"),
        ([Share(name="a", weight=1), Share(name="b", weight=-1)], "no set has a weight above 0"),
        (
            [Share(name="big", weight=1), Share(name="dust", weight=1e-6)],
            "dust: a share of 1.0e-06",
        ),
    ],
)
def test_what_is_no_mixture_is_refused(shares: list[Share], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Mixture(shares, 0)


def test_temperature_makes_shares_more_alike() -> None:
    assert tempered([100, 300], [None, None], 1.0) == [100, 300]
    assert tempered([100, 10_000], [None, None], 2.0) == pytest.approx([10, 100])
    assert tempered([7, 7], [1.0, 3.0], 1.0) == [1, 3]
    assert tempered([7, 7], [0.0, 32.0], 5.0) == pytest.approx([0, 2])
