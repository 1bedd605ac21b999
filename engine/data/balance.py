"""Which data rank takes which sample of a global batch, so that all have as much to do.

A pure function of the samples' costs, so it holds for any number of workers and keeps resume exact.
Each rank gets as many samples as before, so shapes, and a loss that is a mean over ranks, stay what
they are. Mechanism: the costliest sample that is left goes to the rank that has least so far, of
those with room (Graham 1969, the LPT rule, with room for equal numbers). Trade-off: greedy, no
optimum; a sample that costs more than a rank's mean can only be given to a rank alone.
It pays where cost follows a sample's own length: pictures of their own sizes, rows of documents.
The dual encoder's loader does not use it: pictures have one size there, captions are padded, and
whatever is dealt, some rank has the longest of the batch. Costs would be known only after reading
and tokenising the whole batch on every rank. docs/architecture.md has figures.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence


def deal(costs: Sequence[float], num_ranks: int) -> list[list[int]]:
    """The samples of each rank, by their index in the batch, in its order.

    Equal costs go by index, so equal batches are dealt equally everywhere.

    Raises ValueError where the samples do not divide over the ranks.
    """
    if num_ranks < 1 or len(costs) % num_ranks:
        raise ValueError(
            f"{len(costs)} samples do not divide over {num_ranks} ranks; "
            "give each of at least 1 rank as many"
        )
    room = len(costs) // num_ranks
    dealt: list[list[int]] = [[] for _ in range(num_ranks)]
    open_ranks = [(0.0, rank) for rank in range(num_ranks)]
    for index in sorted(range(len(costs)), key=lambda index: (-costs[index], index)):
        total, rank = heapq.heappop(open_ranks)
        dealt[rank].append(index)
        if len(dealt[rank]) < room:
            heapq.heappush(open_ranks, (total + costs[index], rank))
    return [sorted(own) for own in dealt]


def imbalance(costs: Sequence[float], dealt: Sequence[Sequence[int]]) -> float:
    """The largest sum of a rank's costs over the mean: 1 where all ranks have as much to do."""
    sums = [sum(costs[index] for index in own) for own in dealt]
    return max(sums) * len(sums) / sum(sums)
