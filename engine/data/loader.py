"""Positions in, batches out: the training loader.

The dataset maps global positions to a batch, purely. Workers are therefore stateless, the loader's
whole state is the next position and what was counted, and any world size, worker count or restart
yields the same stream. Where streams fill packs, a batch says where they stand after it; that is
part of the state, and a stream is always served by the same worker. Once the share of bad samples
passes `max_bad_share` the run stops.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Generator, Iterator, Mapping
from typing import Any, Generic

import torch
from torch.utils.data import DataLoader

from carillon.engine.choices import divisors
from carillon.engine.config import UserError
from carillon.engine.data.packing import StreamState
from carillon.engine.data.positioned import B, Positioned

_MIN_JUDGED = 200  # samples read, bad ones included, before max_bad_share is judged


class _LocalPositions:
    """Positions of this process's contiguous share of each global batch, without end."""

    def __init__(self, start: int, batch_size: int, rank: int, world_size: int) -> None:
        self.start, self.batch_size = start, batch_size
        self.share = batch_size // world_size
        self.offset = rank * self.share

    def __iter__(self) -> Iterator[list[int]]:
        first = self.start + self.offset
        while True:
            yield list(range(first, first + self.share))
            first += self.batch_size


class TrainingLoader(Generic[B]):
    """Batches of this process from `position` on; its state is that position and the counts."""

    def __init__(
        self, samples: Positioned[B], *, rank: int, world_size: int, device: torch.device
    ) -> None:
        self.samples, self.rank, self.world_size = samples, rank, world_size
        self._pin = device.type == "cuda"
        self.position = 0
        self.num_read = 0
        self.num_bad = 0
        self.num_filtered = 0
        self.streams: dict[int, StreamState] = {}  # of this process
        self.read_up_to = 0  # when its state was loaded: nothing was read at or past this place

    @property
    def num_workers(self) -> int:
        """Those asked for, or with streams the most of them that take turns as the streams do."""
        asked, turns = self.samples.config.num_workers, self.samples.turns
        return (
            asked if turns is None else max((n for n in divisors(turns) if n <= asked), default=0)
        )

    def __iter__(self) -> Generator[B, None, None]:
        """Batches without end; close it, or its workers outlive an error that keeps its frame."""
        config = self.samples.config
        positions = _LocalPositions(self.position, config.batch_size, self.rank, self.world_size)
        workers = self.num_workers
        self.samples.start(self.streams)
        loader: DataLoader[Any] = DataLoader(
            self.samples,
            batch_sampler=positions,
            num_workers=workers,
            prefetch_factor=config.prefetch_batches if workers else None,
            collate_fn=_as_it_is,
            pin_memory=self._pin,
            worker_init_fn=_start_worker,
            multiprocessing_context="fork" if workers else None,
            timeout=600 if workers else 0,
        )
        for batch in loader:
            if isinstance(batch, UserError):
                raise batch
            self.position += config.batch_size
            self.num_read += len(batch.keys)
            self.num_bad += len(batch.bad)
            self.num_filtered += batch.num_filtered
            self.streams.update(batch.streams)
            yield batch

    def check_bad_share(self, *, num_bad: int, num_read: int, num_filtered: int = 0) -> None:
        """Raise UserError once the run's bad share passes the limit; judged from 200 reads on.

        Filtered samples were read and are sound: damage that the search for the few that qualify
        comes across is no larger a share than it is of the set.
        """
        limit = self.samples.config.max_bad_share
        total = num_read + num_filtered + num_bad
        if total >= _MIN_JUDGED and num_bad > limit * total:
            raise UserError(
                f"{num_bad} of {total} samples read are bad, more than "
                f"data.max_bad_share={limit:g}; see the log for keys and reasons"
            )

    def counts(self) -> dict[str, int]:
        """What this process read so far: samples used, bad ones and filtered ones."""
        return {
            "num_read": self.num_read,
            "num_bad": self.num_bad,
            "num_filtered": self.num_filtered,
        }

    def state_dict(self) -> dict[str, Any]:
        """Of this process; with several, counts are summed and streams joined."""
        streams = {str(n): [s.packs, s.read, *s.waiting] for n, s in sorted(self.streams.items())}
        return {"position": self.position, **self.counts(), "streams": streams}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Of any number of processes; each takes up the streams that are its own now."""
        streams = {
            int(number): StreamState(packs, read, tuple(waiting))
            for number, (packs, read, *waiting) in state["streams"].items()
        }
        batch_size = self.samples.config.batch_size
        share = batch_size // self.world_size
        self.streams = {n: s for n, s in streams.items() if n % batch_size // share == self.rank}
        self.position = int(state["position"])
        self.num_read, self.num_bad = int(state["num_read"]), int(state["num_bad"])
        self.num_filtered = int(state["num_filtered"])
        furthest = max((stream.read for stream in streams.values()), default=0)
        self.read_up_to = furthest * self.samples.num_streams if streams else self.position


def _as_it_is(batch: Any) -> Any:
    return batch


def _start_worker(worker: int) -> None:
    for kind in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        signal.signal(kind, signal.SIG_IGN)  # the training process decides when to end
    torch.set_num_threads(1)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # its thread pool does not survive a fork
