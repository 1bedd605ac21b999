"""How processes come together: the same settings everywhere, the process group, the meshes.

What keeps them apart is one message that says so, not a traceback each: an error that any of them
met since its start, a port that is taken, a process that does not come, settings that differ.
Nothing is laid out before all have the same settings, since collectives of different layouts would
wait for each other. engine/parallel/meeting.py is how they find out.
Status: runs on CPU with gloo; CUDA with NCCL has not run on a GPU yet.
"""

from __future__ import annotations

import signal
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import Store

from carillon.engine.config import UserError
from carillon.engine.parallel.config import DistributedConfig
from carillon.engine.parallel.meeting import EXIT_USER_ERROR, REFUSED_S, meet
from carillon.engine.parallel.mesh import World, degrees_of, lay_out
from carillon.engine.parallel.place import Place, own_place, say
from carillon.engine.parallel.refusals import explained


@contextmanager
def told_by_one() -> Iterator[None]:
    """A UserError inside ends every process of the run, and one of them tells it.

    For what comes before start_world. Raises it as it is in a process that stands alone.
    """
    try:
        place = own_place()
    except UserError as error:  # nobody can be met
        say(str(error))
        raise SystemExit(EXIT_USER_ERROR) from None
    try:
        yield
    except UserError as error:
        if place.size == 1:
            raise
        meet(place, REFUSED_S, {}, str(error))


def start_world(config: DistributedConfig, settings: Mapping[str, Any]) -> World:
    """Join the processes that torchrun describes, or stand alone without it.

    Ends all of them (SystemExit with code 2), and one tells why, when they do not come together or
    the nested `settings` are not the same everywhere. Raises UserError in a process that stands
    alone.
    """
    with told_by_one():
        place = own_place()
        degrees = degrees_of(config, place.size)
        device = _device(config, place)
    if place.address is None:
        return World(rank=0, size=1, device=device, degrees=degrees, meshes=None)
    store = meet(place, config.rendezvous_s, settings)
    backend = config.backend
    if backend == "auto":
        backend = "nccl" if device.type == "cuda" else "gloo"
    _join(store, place, backend, timedelta(seconds=config.timeout_s))
    return lay_out(degrees, device)


def _device(config: DistributedConfig, place: Place) -> torch.device:
    kind = config.device
    if kind == "auto":
        kind = "cuda" if torch.cuda.is_available() else "cpu"
    if kind == "cpu":
        return torch.device(kind)
    count = torch.cuda.device_count()
    if place.local_rank >= count:
        raise UserError(
            f"LOCAL_RANK: {place.local_rank} given, but this machine has {count} GPU(s), of which "
            f"each process takes one; start {count} (torchrun --nproc-per-node={count})"
        )
    device = torch.device(kind, place.local_rank)
    torch.cuda.set_device(device)
    return device


def _join(store: Store, place: Place, backend: str, timeout: timedelta) -> None:
    """All have come, so this is short; what fails here is the network between them."""
    store.set_timeout(timeout)
    listener = signal.signal(signal.SIGTERM, signal.SIG_DFL)  # Python's would wait for torch
    try:
        dist.init_process_group(
            backend, store=store, rank=place.rank, world_size=place.size, timeout=timeout
        )
    except (RuntimeError, ValueError) as error:
        say(explained(str(error).split("\n", 1)[0], place))
        raise SystemExit(EXIT_USER_ERROR) from None
    finally:
        signal.signal(signal.SIGTERM, listener)
