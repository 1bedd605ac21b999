import numpy as np
import pytest

from carillon.engine.data.order import (
    BlockOrder,
    HeldOut,
    Permutation,
    SampleOrder,
    position_generator,
    stable_hash,
)


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 16, 17, 1000, 4097, 65536, 100_003])
def test_a_permutation_is_a_bijection(n: int) -> None:
    image = Permutation(n, 7)(np.arange(n))
    assert np.array_equal(np.sort(image), np.arange(n))


def test_positions_are_well_mixed() -> None:
    image = Permutation(10_000, 3)(np.arange(10_000))
    # Rank correlation of a random permutation has deviation 1/sqrt(n) = 0.01; 5 deviations.
    assert abs(np.corrcoef(np.arange(10_000), image)[0, 1]) < 0.05
    assert np.mean(np.abs(np.diff(image)) < 10) < 0.01  # neighbours part ways


def test_each_epoch_visits_each_row_once_in_its_own_order() -> None:
    order = SampleOrder(101, seed=5)
    epochs = order.rows(np.arange(303)).reshape(3, 101)
    for epoch in epochs:
        assert np.array_equal(np.sort(epoch), np.arange(101))
    assert not np.array_equal(epochs[0], epochs[1])
    assert not np.array_equal(epochs[0], SampleOrder(101, seed=6).rows(np.arange(101)))


def test_rows_do_not_depend_on_how_they_are_asked_for() -> None:
    order = SampleOrder(37, seed=1)
    whole = order.rows(np.arange(200))
    for i in (150, 3, 199, 36, 37):
        assert SampleOrder(37, seed=1).rows(np.array([i]))[0] == whole[i]


def test_the_order_is_pinned() -> None:
    """A changed order breaks the resume of every run on disk: change it with a new class."""
    assert SampleOrder(1000, seed=1337).rows(np.array([0, 1, 2, 999, 1000, 123_456])).tolist() == (
        [532, 210, 953, 818, 65, 92]
    )


def test_a_huge_set_costs_no_start_up() -> None:
    rows = SampleOrder(10**12, seed=0).rows(np.arange(1000))
    assert len(np.unique(rows)) == 1000
    assert rows.min() >= 0
    assert rows.max() < 10**12


def test_replacements_are_drawn_by_position_and_attempt() -> None:
    order = SampleOrder(1000, seed=2)
    drawn = [order.replacement(position, attempt) for position in range(50) for attempt in range(3)]
    assert len(set(drawn)) > 120
    assert all(0 <= row < 1000 for row in drawn)
    assert drawn[7] == SampleOrder(1000, seed=2).replacement(2, 1)


def test_position_generators_repeat_and_differ() -> None:
    draws = {position_generator(1, "sample", p).random() for p in range(100)}
    assert len(draws) == 100
    assert position_generator(1, "sample", 5).random() in draws
    assert position_generator(2, "sample", 5).random() not in draws
    assert position_generator(1, "other", 5).random() not in draws


@pytest.mark.parametrize("every", [2, 3, 10])
def test_held_out_rows_and_training_rows_share_the_set(every: int) -> None:
    for n in (9, 10, 11, 57):
        held_out = HeldOut(n, every)
        training = held_out.training_row(np.arange(held_out.num_training))
        validation = held_out.validation_rows()
        assert np.array_equal(np.sort(np.concatenate([training, validation])), np.arange(n))
        assert all(row % every == every - 1 for row in validation)


def test_nothing_is_held_out_by_default() -> None:
    held_out = HeldOut(5, 0)
    assert held_out.num_training == 5
    assert held_out.training_row(np.arange(5)).tolist() == [0, 1, 2, 3, 4]
    assert held_out.validation_rows().tolist() == []


def test_stable_hash_is_pinned_and_order_is_positive() -> None:
    assert stable_hash(1, "a") == stable_hash(1, "a") != stable_hash("1a")
    with pytest.raises(ValueError, match="at least one"):
        SampleOrder(0, 1)


@pytest.mark.parametrize("n", [1, 5, 16, 17, 101, 1000])
@pytest.mark.parametrize(("block", "window"), [(1, 1), (4, 3), (7, 1), (16, 4), (2000, 2)])
def test_blocks_visit_each_row_once_an_epoch(n: int, block: int, window: int) -> None:
    order = BlockOrder(n, 5, block=block, window=window)
    epochs = order.rows(np.arange(3 * n)).reshape(3, n)
    assert all(np.array_equal(np.sort(epoch), np.arange(n)) for epoch in epochs)
    assert n < 16 or not np.array_equal(epochs[0], epochs[1])
    whole = epochs.flatten()
    for i in (3 * n - 1, 0, n // 2, n):
        assert BlockOrder(n, 5, block=block, window=window).rows(np.array([i]))[0] == whole[i]


def test_a_window_reads_few_runs_of_rows() -> None:
    n, block, window = 10_000, 50, 8
    order = BlockOrder(n, 1, block=block, window=window)
    seen = set()
    for first in range(0, n, block * window):
        rows = np.sort(order.rows(np.arange(first, first + block * window)))
        runs = 1 + int((np.diff(rows) != 1).sum())
        assert runs <= window + 1  # the turn may cut one at the end of the set
        seen.add(int(rows[0]))
    assert len(seen) == n // (block * window)
    shuffled = order.rows(np.arange(block * window))
    assert np.mean(np.diff(shuffled) == 1) < 0.02  # and not one block after the other


def test_the_order_of_blocks_is_pinned_and_starts_at_once() -> None:
    order = BlockOrder(1000, 1337, block=16, window=4)
    places = np.array([0, 1, 2, 999, 1000, 123_456])
    assert order.rows(places).tolist() == [488, 760, 627, 274, 378, 494]
    huge = BlockOrder(10**12, 0, block=1024, window=64).rows(np.arange(1000))
    assert len(np.unique(huge)) == 1000
    assert huge.max() < 10**12
    with pytest.raises(ValueError, match="block=0"):
        BlockOrder(5, 1, block=0, window=1)
