"""How even the attention of one long causal row is over context-parallel processes: the cut in two
chunks a process (engine/parallel/zigzag.py) against a cut in order.

Each process' queries are timed alone, one after another in this process, both cuts in turns: what
is compared is work, not exchange, in seconds of the core, so that a busy machine does not count.
Prints a JSON line for each cut.

    python benchmarks/context_balance.py [--length 8192] [--processes 4] [--turns 5]
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Iterable

import torch
from torch import Tensor

from carillon.engine.parallel.context_keys import Call, whole_calls
from carillon.engine.parallel.zigzag import Zigzag
from carillon.kernels.table import resolve

_HEADS, _KEY_HEADS, _HEAD_DIM = 4, 1, 64


def in_order(cut: Zigzag, total: int) -> list[Call]:
    """The share of a process that holds one stretch of the row."""
    length = total // cut.size
    end = (cut.rank + 1) * length
    seen = torch.tensor([[0, end, total]])
    return [
        Call(
            slice(0, length),
            slice(0, total),
            cut.starts(seen, (cut.rank,), length),
            cut.starts(seen, (0,), total),
            True,
        )
    ]


def seconds(calls: Iterable[Call], q: Tensor, k: Tensor, v: Tensor) -> float:
    attend = resolve("packed_attention", q.device)
    begin = time.process_time()
    for call in calls:
        parts = (call.part_of(q, call.queries), *(call.part_of(x, call.keys) for x in (k, v)))
        attend(*parts, *call.lengths())
    return time.process_time() - begin


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--length", type=int, default=8192)
    parser.add_argument("--processes", type=int, default=4)
    parser.add_argument("--turns", type=int, default=5)
    arguments = parser.parse_args()
    total, size = arguments.length, arguments.processes
    offsets = torch.tensor([[0, total]])
    generator = torch.Generator().manual_seed(1)
    q, k, v = (
        torch.randn(1, length, heads, _HEAD_DIM, generator=generator)
        for length, heads in ((total // size, _HEADS), *[(total, _KEY_HEADS)] * 2)
    )
    cuts = [Zigzag(size, rank) for rank in range(size)]
    calls = {
        "zigzag": [list(whole_calls(cut, offsets, total // (2 * size), True)) for cut in cuts],
        "in order": [in_order(cut, total) for cut in cuts],
    }
    times: dict[str, list[list[float]]] = {name: [[] for _ in cuts] for name in calls}
    for turn in range(arguments.turns + 1):
        for name, of_ranks in calls.items():
            for rank, own in enumerate(of_ranks):
                took = seconds(own, q, k, v)
                if turn:  # the first warms up
                    times[name][rank].append(took)
    for name, of_ranks in times.items():
        medians = [statistics.median(own) for own in of_ranks]
        line = {
            "cut": name,
            "length": total,
            "processes": size,
            "ms": [round(1e3 * one, 1) for one in medians],
            "slowest_over_mean": round(max(medians) / statistics.mean(medians), 3),
        }
        print(json.dumps(line))


if __name__ == "__main__":
    main()
