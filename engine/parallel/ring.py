"""A ring over the ranks of a group: chunks travel around it while they are worked on.

Each rank starts with a chunk of its own, hands the one that it holds to the rank before it and
takes the next from the rank behind, so that after as many steps as there are ranks each has seen
every chunk. What the ranks find of a chunk follows it one step behind, merged rank by rank, and
ends where the chunk came from. Sends and receives are posted together and never block, so no order
of ranks can deadlock; the next chunk is in flight while this one is worked on. Held at once: two
chunks, and what is found of three. Left out: chunks smaller than a rank's own, which would bound
that by a constant and cost as many more messages.
Status: runs on CPU with gloo; CUDA with NCCL has not run on a GPU yet.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

Parts = dict[str, Tensor]
# Takes a chunk's owner and the chunk; gives what this rank finds of it.
Visit = Callable[[int, Parts], Parts]
# Merges what the ranks before found of a chunk with what this one has.
Merge = Callable[[Parts, Parts], Parts]


class Ring:
    """The ranks of `group` in their order; without a group, this process alone."""

    def __init__(self, group: dist.ProcessGroup | None) -> None:
        self._group = group
        self.size = dist.get_world_size(group) if group is not None else 1
        self.rank = dist.get_rank(group) if group is not None else 0

    def around(self, chunk: Parts, visit: Visit, merge: Merge) -> Parts:
        """Takes every rank's chunk past `visit` on every rank; returns what all found of this
        rank's own. Every rank's parts must have the same names, shapes and dtypes.
        """
        found = None
        for step in range(self.size):
            coming = self._pass_on(chunk) if step < self.size - 1 else None
            own = visit((self.rank + step) % self.size, chunk)
            found = self._pass_on(own if found is None else merge(found.wait(), own))
            if coming is not None:
                chunk = coming.wait()
        assert found is not None  # a ring has at least this rank
        return found.wait()

    def _pass_on(self, parts: Parts) -> _Passing:
        """Starts to send to the rank before this one, and to receive from the one behind."""
        if self._group is None or self.size == 1:
            return _Passing(parts, {}, [])
        before, behind = (
            dist.get_global_rank(self._group, (self.rank + step) % self.size) for step in (-1, 1)
        )
        sent = {name: part.contiguous() for name, part in parts.items()}
        arriving = {name: torch.empty_like(part) for name, part in sent.items()}
        posted = []
        for tag, name in enumerate(sent):
            posted.append(dist.P2POp(dist.isend, sent[name], before, self._group, tag))
            posted.append(dist.P2POp(dist.irecv, arriving[name], behind, self._group, tag))
        return _Passing(arriving, sent, dist.batch_isend_irecv(posted) if posted else [])


class _Passing(NamedTuple):
    """Tensors on their way: those that arrive, and those sent, which must live until they have."""

    arriving: Parts
    sent: Parts
    works: list[dist.Work]

    def wait(self) -> Parts:
        for work in self.works:
            work.wait()
        return self.arriving
