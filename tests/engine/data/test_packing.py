"""Streams fill packs: nothing is cut, left out or doubled, and any stop can be gone on from."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from carillon.engine.data.packing import Sizes, Stream, StreamState, pack_all

BUDGET = (100, 12)


def sizes_of(number: int, seed: int = 0) -> Sizes:
    """Long-tailed sizes, as captions have them, and a count of one."""
    tokens = np.random.default_rng([seed, number]).lognormal(2.2, 0.7)
    return int(min(max(tokens, 1), BUDGET[0])), 1


def stream(window: int = 16, state: StreamState | None = None, seed: int = 0) -> Stream[int]:
    return Stream(
        lambda number: number,
        lambda number: sizes_of(number, seed),
        budget=BUDGET,
        window=window,
        state=state,
    )


@settings(deadline=None, max_examples=25)
@given(window=st.integers(1, 40), seed=st.integers(0, 100), stops=st.sets(st.integers(1, 60)))
def test_packs_hold_every_sample_once_and_go_on_after_any_stop(
    window: int, seed: int, stops: set[int]
) -> None:
    one = stream(window, seed=seed)
    whole = [one.next_pack() for _ in range(60)]
    again, resumed = stream(window, seed=seed), []
    for number in range(60):
        if number in stops:
            again = stream(window, again.state, seed)
        resumed.append(again.next_pack())
    assert resumed == whole
    assert again.state == one.state
    used = Counter(number for pack in whole for number in pack)
    assert set(used.values()) == {1}
    packs, read, waiting = one.state
    assert packs == 60
    assert sorted([*used, *waiting]) == list(range(read))
    assert len(waiting) <= window
    for pack in whole:
        assert pack
        for kind, most in enumerate(BUDGET):
            assert sum(sizes_of(number, seed)[kind] for number in pack) <= most


def test_the_oldest_sample_is_never_passed_over_for_long() -> None:
    one = stream(window=16)
    for _ in range(200):
        pack = one.next_pack()
        oldest = min([*pack, *one.state.waiting])
        assert pack[0] == oldest


def test_a_window_fills_packs() -> None:
    def fill(window: int) -> float:
        one = stream(window)
        packs = [one.next_pack() for _ in range(300)]
        counts = [tuple(sum(k) for k in zip(*map(sizes_of, pack), strict=True)) for pack in packs]
        return float(np.mean([max(t / BUDGET[0], n / BUDGET[1]) for t, n in counts]))

    assert fill(1) < 0.93
    assert fill(16) > 0.97
    assert fill(64) > 0.985


@pytest.mark.parametrize("sizes", [(0, 0), (101, 1), (1, 13)])
def test_a_sample_that_no_pack_holds_is_a_mistake(sizes: Sizes) -> None:
    bad: Stream[int] = Stream(lambda n: n, lambda n: sizes, budget=BUDGET, window=4)
    with pytest.raises(ValueError, match=r"a sample of sizes .* for packs of \(100, 12\)"):
        bad.next_pack()


def test_a_list_is_packed_whole() -> None:
    packs = pack_all(range(500), sizes_of, BUDGET)
    assert sorted(number for pack in packs for number in pack) == list(range(500))
    total = sum(sizes_of(number)[0] for number in range(500))
    assert len(packs) < 1.05 * max(total / BUDGET[0], 500 / BUDGET[1]) + 1
    assert pack_all([], sizes_of, BUDGET) == []
