"""How processes come together: the process group, the same config everywhere, then the meshes.

What keeps them apart is one message that says so, not a traceback each: a port that is taken, a
process that doesn't come within `timeout_s`, an address that nobody answers at, settings that
differ. Nothing is laid out before all have the same settings, since collectives of different
layouts would wait for each other.
Status: runs on CPU with gloo; CUDA with NCCL has not run on a GPU yet.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from carillon.engine.config import UserError
from carillon.engine.log import logger
from carillon.engine.parallel.config import DistributedConfig
from carillon.engine.parallel.mesh import World, degrees_of, lay_out

_EXIT_USER_ERROR = 2
_MOST_NAMED = 5  # settings that differ


def start_world(config: DistributedConfig, settings: Mapping[str, Any]) -> World:
    """Join the process group that torchrun describes, or stand alone without one.

    Raises UserError when it does not come together, and on rank 0 when the nested `settings` are
    not the same on all ranks (SystemExit on the others).
    """
    degrees = degrees_of(config, int(os.environ.get("WORLD_SIZE", "1")))
    kind = config.device
    if kind == "auto":
        kind = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(kind)
    if kind == "cuda":
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(device)
    if "RANK" not in os.environ:
        return World(rank=0, size=1, device=device, degrees=degrees, meshes=None)
    backend = config.backend if config.backend != "auto" else "nccl" if kind == "cuda" else "gloo"
    _join(backend, config.timeout_s)
    _agree(settings)
    return lay_out(degrees, device)


def _join(backend: str, timeout_s: int) -> None:
    try:
        dist.init_process_group(backend, timeout=timedelta(seconds=timeout_s))
    except (dist.DistError, ValueError) as error:
        problem = UserError(_explained(str(error).split("\n", 1)[0], timeout_s))
        if os.environ["RANK"] != "0":  # whose own trouble may be another
            logger.error("%s", problem)
        raise problem from None


def _explained(error: str, timeout_s: int) -> str:
    rank, size = os.environ["RANK"], os.environ.get("WORLD_SIZE", "?")
    address = os.environ.get("MASTER_ADDR", "(unset)")
    port = os.environ.get("MASTER_PORT", "(unset)")
    where = f"rank {rank} of {size}, MASTER_ADDR={address}, MASTER_PORT={port}"
    if "EADDRINUSE" in error:
        advice = (
            f"port {port} is in use on this machine: end what listens there, or take another "
            "(torchrun --master-port, or --standalone on one machine)"
        )
    elif "clients joined" in error:
        advice = (
            f"not all {size} processes came within {timeout_s} s: look why one did not start, "
            "and that --nnodes, --nproc-per-node and the address are the same on all machines"
        )
    elif "expected, but not set" in error:
        advice = "start it by torchrun, which sets RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT"
    else:
        advice = (
            "the processes did not come together: look that rank 0 runs, and that its address can "
            "be reached from here"
        )
    return f"{advice} ({where}: {error})"


def _agree(settings: Mapping[str, Any]) -> None:
    """All ranks must have been started with the same settings."""
    own = dict(_flat(settings))
    every: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(every, own)
    if all(other == own for other in every):
        return
    if dist.get_rank() != 0:
        raise SystemExit(_EXIT_USER_ERROR)
    differences = [
        f"{name} is {own.get(name)!r} on rank 0 and {other.get(name)!r} on rank {rank}"
        for name in own
        for rank, other in list(enumerate(every))
        if other.get(name) != own.get(name)
    ]
    more = len(differences) - _MOST_NAMED
    raise UserError(
        "ranks were started with different settings: "
        + "; ".join(differences[:_MOST_NAMED])
        + (f"; and {more} more" if more > 0 else "")
        + ". Start all of them by the same command, from the same config file"
    )


def _flat(settings: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in settings.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value
