"""Copies batches to the device ahead of the step that takes them, in a thread.

On CUDA the copy runs on a stream of its own from pinned memory, and the step's stream waits for it.
A batch must be kept until its step is done; a training step ends with a read of the loss, so it is.
Status: the thread runs and is tested on CPU; the CUDA copy has not run on a GPU yet.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Generator
from typing import Generic, NamedTuple, TypeVar

import torch

B = TypeVar("B")

_DEPTH = 2  # batches on the device beside the one in use


class Copied(NamedTuple, Generic[B]):
    """A batch on the host, and its copy once `wait` was called on the step's stream."""

    host: B
    device: B
    event: torch.cuda.Event | None

    def wait(self) -> B:
        """The copy, safe to use on the current stream."""
        if self.event is not None:
            self.event.wait()
        return self.device


def ahead(
    take: Callable[[], B], copy: Callable[[B], B], device: torch.device
) -> Generator[Copied[B], None, None]:
    """What `take` gives, copied by `copy` up to two batches ahead; an error comes in its turn."""
    found: queue.Queue[Copied[B] | BaseException] = queue.Queue(_DEPTH)
    ended = threading.Event()

    def offer(item: Copied[B] | BaseException) -> None:
        while not ended.is_set():
            try:
                found.put(item, timeout=0.1)
                return
            except queue.Full:
                continue

    def work() -> None:
        try:
            stream = _stream(device)
            while not ended.is_set():
                offer(_copied(take(), copy, stream))
        except BaseException as error:
            offer(error)

    thread = threading.Thread(target=work, name="copies-ahead", daemon=True)
    thread.start()
    try:
        while True:
            item = found.get()
            if isinstance(item, BaseException):
                raise item
            yield item
    finally:
        ended.set()


def _stream(device: torch.device) -> torch.cuda.Stream | None:
    return torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]


def _copied(batch: B, copy: Callable[[B], B], stream: torch.cuda.Stream | None) -> Copied[B]:
    if stream is None:
        return Copied(batch, copy(batch), None)
    with torch.cuda.stream(stream):
        local, event = copy(batch), torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record(stream)
    return Copied(batch, local, event)
