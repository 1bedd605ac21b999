from collections.abc import Iterator
from itertools import islice
from math import sqrt

import pytest

from carillon.engine.data.process_map import ordered_map


@pytest.mark.parametrize("workers", [1, 2])
def test_results_come_in_order(workers: int) -> None:
    numbers = [float(number) for number in range(300)]
    assert list(ordered_map(sqrt, numbers, workers=workers)) == [sqrt(n) for n in numbers]
    assert list(ordered_map(sqrt, [], workers=workers)) == []


def test_an_endless_input_is_read_only_as_far_as_needed() -> None:
    taken = 0

    def endless() -> Iterator[float]:
        nonlocal taken
        while True:
            taken += 1
            yield float(taken)

    results = ordered_map(sqrt, endless(), workers=2)
    assert list(islice(results, 10)) == [sqrt(n) for n in range(1, 11)]
    results.close()  # type: ignore[attr-defined]
    assert taken <= 10 * 32  # eight chunks of 32 under way, one refilled


def test_an_error_of_the_function_reaches_the_caller() -> None:
    with pytest.raises(ValueError, match="math domain error"):
        list(ordered_map(sqrt, [1.0, -1.0], workers=2))
