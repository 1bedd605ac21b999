"""Pairs of near vectors among many, the same whoever looks for them and with how many processes.

Up to EXACT_ROWS vectors every pair is looked at. Above, vectors are dealt to cells by the signs of
fixed random projections, some 2,000 to a cell, and a query looks into its own cell and those across
the three planes that it is nearest to. Left out: graphs and trained quantisers, whose result
depends on the order of insertion.

Legend: N vectors, D dims.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np

EXACT_ROWS = 1 << 16
_CELL_ROWS = 2000
_NUM_FLIPS = 3
_BLOCK_ROWS = 512
_BLOCK_PRODUCTS = 1 << 24  # 64 MB of fp32 cosines at a time

Float32 = np.ndarray[Any, np.dtype[np.float32]]


class NearPair(NamedTuple):
    """Row `one` as it is, and view `view` of row `other`, are `cosine` alike."""

    one: int
    other: int
    view: int
    cosine: float


def near_pairs(
    vectors_ND: Float32,
    views: Callable[[slice], list[Float32]] | None = None,
    *,
    min_cosine: float,
    most: int = 16,
    exact_rows: int = EXACT_ROWS,
) -> Iterator[NearPair]:
    """For every row as `other`, its up to `most` nearest other rows, nearest first.

    `views` gives vectors for a slice of rows that are compared with all whole vectors; without it
    these are the vectors themselves.
    """
    cells = _Cells(vectors_ND, exact_rows)
    for start in range(0, len(vectors_ND), _BLOCK_ROWS):
        block = slice(start, min(start + _BLOCK_ROWS, len(vectors_ND)))
        found: list[NearPair] = []
        for view, queries in enumerate(views(block) if views else [vectors_ND[block]]):
            for row, other, cosine in cells.near(queries, min_cosine):
                if other != start + row:
                    found.append(NearPair(other, start + row, view, cosine))
        yield from _nearest(found, most)


def _nearest(found: list[NearPair], most: int) -> Iterator[NearPair]:
    """The best view of every pair, and of these the best `most` of each `other`."""
    found.sort(key=lambda pair: (pair.other, -pair.cosine, pair.one, pair.view))
    seen: set[int] = set()
    current = -1
    for pair in found:
        if pair.other != current:
            current = pair.other
            seen.clear()
        if pair.one not in seen and len(seen) < most:
            seen.add(pair.one)
            yield pair


class _Cells:
    """The vectors by cells; one cell that holds all of them when they are few."""

    def __init__(self, vectors_ND: Float32, exact_rows: int) -> None:
        self._vectors = vectors_ND
        few = len(vectors_ND) <= exact_rows
        num_planes = 0 if few else int(np.ceil(np.log2(len(vectors_ND) / _CELL_ROWS)))
        planes = np.random.default_rng(0).standard_normal((vectors_ND.shape[1], num_planes))
        self._planes = planes.astype(np.float32)
        self._powers = 1 << np.arange(num_planes)
        cells = (vectors_ND @ self._planes > 0) @ self._powers
        self._order = np.argsort(cells, kind="stable")
        self._starts = np.searchsorted(cells[self._order], np.arange((1 << num_planes) + 1))

    def near(self, queries: Float32, min_cosine: float) -> Iterator[tuple[int, int, float]]:
        """(row of the queries, row of the vectors, cosine) of all near pairs."""
        probes = self._probes(queries)
        for cell in np.unique(probes):
            members = self._order[self._starts[cell] : self._starts[cell + 1]]
            asking = np.flatnonzero((probes == cell).any(axis=1))
            step = max(1, _BLOCK_PRODUCTS // max(1, len(asking)))
            for at in range(0, len(members), step):
                part = members[at : at + step]
                cosines = queries[asking] @ self._vectors[part].T
                rows, columns = np.nonzero(cosines >= min_cosine)
                yield from zip(
                    asking[rows].tolist(),
                    part[columns].tolist(),
                    cosines[rows, columns].tolist(),
                    strict=True,
                )

    def _probes(self, queries: Float32) -> Any:
        """The cells to look into. Shapes: (Q, D) -> (Q, number of cells)."""
        sides = queries @ self._planes
        own = (sides > 0) @ self._powers
        num_flips = min(_NUM_FLIPS, len(self._powers))
        near = np.argsort(np.abs(sides), axis=1, kind="stable")[:, :num_flips]
        bits = self._powers[near]
        chosen = (np.arange(1 << num_flips)[:, None] >> np.arange(num_flips)) & 1
        return own[:, None] ^ (bits @ chosen.T)
