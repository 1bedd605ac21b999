"""Which set a global position reads, and the how-many-eth sample of it: arithmetic, no table.

A mixture is a list of shares. Positions are cut into periods of PERIOD. In each, a set has the same
number of places, its share of them by largest remainders, and a keyed permutation says which: so
after any period every set has been drawn from exactly as often as its share says, and no set comes
in a burst. A set's own samples follow each other in its own order; its epochs are its own.
A set may join at a stated position: there a new phase of periods starts with the shares of all sets
that have joined. What was drawn before stays as it was, since it follows from the earlier phases.
Trade-off: shares are multiples of 1/PERIOD; one below half of that is refused, not rounded to none.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from carillon.engine.data.order import Permutation, Positions, stable_hash

PERIOD = 1 << 16
_MAX_KEPT = 4  # periods: a batch spans two at most, and a loader looks a few batches ahead


@dataclass(frozen=True, kw_only=True)
class Share:
    """A set of a mixture: its weight among those that have joined, and where it joins."""

    name: str
    weight: float
    from_position: int = 0


class Places(NamedTuple):
    """For each position which set, and which sample of that set's own stream (both int64)."""

    sets: Positions
    draws: Positions


class _Phase(NamedTuple):
    start: int  # a global position
    counts: NDArray[np.int64]  # places of each set in a period
    drawn: NDArray[np.int64]  # of each set before the phase


class Mixture:
    """The mixture as a function of the global position."""

    def __init__(self, shares: Sequence[Share], seed: int) -> None:
        """Raises ValueError for no set at position 0, weights below 0 or a share that is too small
        for a place."""
        self.shares, self.seed = tuple(shares), seed
        self._tables: OrderedDict[tuple[int, int], Places] = OrderedDict()
        self._phases: list[_Phase] = []
        for start in sorted({share.from_position for share in shares} | {0}):
            drawn = self.drawn(start) if self._phases else np.zeros(len(shares), np.int64)
            self._phases.append(_Phase(start, _counts(self.shares, start), drawn))

    def places(self, positions: Positions) -> Places:
        """Set and sample at global `positions` (int64, any shape)."""
        sets, index = np.empty_like(positions), np.empty_like(positions)
        number = self._phase_of(positions)
        for phase in np.unique(number).tolist():
            start, counts, drawn = self._phases[phase]
            here = number == phase
            periods, inside = np.divmod(positions[here] - start, PERIOD)
            own_sets, own_index = np.empty_like(inside), np.empty_like(inside)
            for period in np.unique(periods).tolist():
                now = periods == period
                table = self._table(phase, period)
                own_sets[now], own_index[now] = (part[inside[now]] for part in table)
            sets[here] = own_sets
            index[here] = drawn[own_sets] + periods * counts[own_sets] + own_index
        return Places(sets, index)

    def drawn(self, position: int) -> NDArray[np.int64]:
        """How many samples of each set stand before a global position."""
        number = int(self._phase_of(np.array([max(position - 1, 0)]))[0])
        phase = self._phases[number]
        periods, inside = divmod(position - phase.start, PERIOD)
        table = self._table(number, periods).sets[:inside]
        within = np.bincount(table, minlength=len(self.shares))
        return phase.drawn + periods * phase.counts + within

    def _phase_of(self, positions: Positions) -> NDArray[np.int64]:
        starts = np.array([phase.start for phase in self._phases])
        numbers: NDArray[np.int64] = np.searchsorted(starts, positions, side="right") - 1
        return numbers

    def _table(self, phase: int, period: int) -> Places:
        """The places of a period: of each its set and the rank among that set's own places."""
        key = phase, period
        if key not in self._tables:
            counts = self._phases[phase].counts
            shuffled = Permutation(PERIOD, stable_hash(self.seed, "mixture", phase, period))
            slots = shuffled(np.arange(PERIOD))
            sets: Positions = np.searchsorted(np.cumsum(counts), slots, side="right")
            by_set = np.argsort(sets, kind="stable")
            rank = np.empty(PERIOD, np.int64)
            rank[by_set] = np.arange(PERIOD) - np.repeat(np.cumsum(counts) - counts, counts)
            self._tables[key] = Places(sets, rank)
            while len(self._tables) > _MAX_KEPT:
                self._tables.popitem(last=False)
        return self._tables[key]


def _counts(shares: Sequence[Share], position: int) -> NDArray[np.int64]:
    """Places in a period of the sets that have joined at a position, by largest remainders."""
    there = [share.weight if share.from_position <= position else 0.0 for share in shares]
    if not all(0 <= weight < math.inf for weight in there) or not any(there):
        raise ValueError(
            f"at position {position:,} no set has a weight above 0: the first of a mixture have "
            "from_position 0 and finite weights"
        )
    # Exact: with floats, sets that come later could turn the rounding of those before them.
    total = sum(map(Fraction, there))
    exact = [Fraction(weight) * PERIOD / total for weight in there]
    counts = [math.floor(places) for places in exact]
    by_remainder = sorted(range(len(there)), key=lambda i: (counts[i] - exact[i], i))
    for number in by_remainder[: PERIOD - sum(counts)]:
        counts[number] += 1
    for share, weight, count in zip(shares, there, counts, strict=True):
        if weight > 0 and count == 0:
            raise ValueError(
                f"{share.name}: a share of {float(weight / total):.1e} is too small; at least "
                f"{1 / PERIOD:.1e} is needed. Raise its weight or leave it out."
            )
    return np.array(counts)


def tempered(
    sizes: Sequence[int], weights: Sequence[float | None], temperature: float
) -> list[float]:
    """Weights, or sizes where none is given, to the power 1/temperature: 1 keeps them, larger
    values make them more alike (Conneau et al. 2020, XLM-R, equation in section 3.1, with
    alpha = 1/temperature). Each follows from its own set alone."""
    given = [float(n) if w is None else w for n, w in zip(sizes, weights, strict=True)]
    return [weight ** (1 / temperature) for weight in given]
