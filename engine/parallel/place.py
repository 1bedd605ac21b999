"""Which of a run's processes this one is, from the variables that torchrun sets.

Needs no torch, so that a command which fails early knows it too.
"""

from __future__ import annotations

import os
import sys
from typing import NamedTuple

from carillon.engine.config import UserError

_START = "start it by torchrun, which sets RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT"
_MAX_PORT = 2**16 - 1


class Place(NamedTuple):
    """This process among those of a run, and where rank 0 is met."""

    rank: int
    size: int
    local_rank: int = 0
    address: str | None = None  # none: no launcher, this process stands alone
    port: int = 0

    def __str__(self) -> str:
        return (
            f"rank {self.rank} of {self.size}, MASTER_ADDR={self.address}, MASTER_PORT={self.port}"
        )


def own_place() -> Place:
    """This process's place. Raises UserError when the variables make none."""
    if "RANK" not in os.environ:
        size = _number("WORLD_SIZE", least=1, default=1)
        if size > 1:
            raise UserError(
                f"WORLD_SIZE={size} is set and RANK is not: {_START}, or unset WORLD_SIZE to "
                "train in one process"
            )
        return Place(rank=0, size=1)
    missing = [
        name for name in ("WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT") if not os.environ.get(name)
    ]
    if missing:
        raise UserError(f"RANK is set and {' and '.join(missing)} not: {_START}")
    rank, size = _number("RANK", least=0), _number("WORLD_SIZE", least=1)
    if rank >= size:
        raise UserError(f"RANK: {rank} given, but WORLD_SIZE is {size}; use 0 to {size - 1}")
    return Place(
        rank=rank,
        size=size,
        local_rank=_number("LOCAL_RANK", least=0, default=0),
        address=os.environ["MASTER_ADDR"],
        port=_number("MASTER_PORT", least=1, most=_MAX_PORT),
    )


def is_another_rank() -> bool:
    """Whether the environment makes this process one beside rank 0, who tells what is wrong."""
    rank = os.environ.get("RANK", "0")
    return _is_whole(rank) and int(rank) > 0


def say(message: str) -> None:
    """A closing line of this process, with its rank unless that is 0."""
    who = f"[rank {os.environ['RANK']}] " if is_another_rank() else ""
    print(f"carillon: {who}{message}", file=sys.stderr, flush=True)


def _is_whole(text: str) -> bool:
    return text.isascii() and text.isdecimal() and len(text) < 10


def _number(name: str, *, least: int, most: int | None = None, default: int | None = None) -> int:
    given = os.environ.get(name, "")
    if name not in os.environ and default is not None:
        return default
    if _is_whole(given) and int(given) >= least and (most is None or int(given) <= most):
        return int(given)
    allowed = f"{least} or more" if most is None else f"{least} to {most}"
    raise UserError(f"{name}: {given!r} given; a whole number, {allowed}, is allowed: {_START}")
