"""The numbers that a refusal offers instead of one that cannot be used."""

from __future__ import annotations

from collections.abc import Iterable, Sequence


def divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]


def nearest(allowed: Sequence[int], given: int) -> list[int]:
    """The values next to `given`, of sorted ones; 1 where none is allowed, which cuts nothing."""
    below, above = [n for n in allowed if n < given], [n for n in allowed if n > given]
    return [*below[-1:], *above[:1]] or [1]


def multiples(step: int, given: int) -> list[int]:
    """The multiples of `step` next to `given`, which is none; 0 is not offered."""
    below = given // step * step
    return [n for n in (below, below + step) if n]


def either(values: Iterable[int]) -> str:
    return " or ".join(map(str, sorted(values)))


def listed(values: Iterable[int]) -> str:
    return ", ".join(map(str, values))
