"""What is told of processes that do not come together: what is wrong, and how to mend it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from carillon.engine.parallel.place import Place

_MOST_NAMED = 5  # settings that differ, or ranks


def explained(error: str, place: Place, timeout_s: float = 0.0) -> str:
    """What keeps processes apart, by torch's or our words for it, and what to do."""
    if "EADDRINUSE" in error:
        advice = (
            f"port {place.port} is in use on this machine: end what listens there, or take another "
            "(torchrun --master-port, or --standalone on one machine)"
        )
    elif "have not come" in error:
        advice = (
            f"not all {place.size} processes came within {timeout_s:.0f} s "
            "(distributed.rendezvous_s): look why one did not start, and that --nnodes, "
            "--nproc-per-node and the address are the same on all machines"
        )
    else:
        advice = (
            "the processes did not come together: look that rank 0 runs, and that its address can "
            "be reached from here"
        )
    return f"{advice} ({place}: {error})"


def refusal_of(came: Mapping[int, Any]) -> str | None:
    """Why those who came cannot go on, from what each left; none when they can.

    Rank 0's own problem, else that of others, else settings that differ.
    """
    own = came[0]
    if own["problem"] is not None:
        return str(own["problem"])
    ranks_of: dict[str, list[int]] = {}
    for rank in sorted(came):
        if came[rank]["problem"] is not None:
            ranks_of.setdefault(came[rank]["problem"], []).append(rank)
    if ranks_of:
        return "; ".join(f"{listed(ranks)}: {problem}" for problem, ranks in ranks_of.items())
    names = dict.fromkeys(name for rank in sorted(came) for name in came[rank]["settings"])
    differences = [
        f"{name} {_set(own['settings'], name, 'is')} on rank 0 and "
        f"{_set(came[rank]['settings'], name)} on rank {rank}"
        for name in names
        for rank in sorted(came)
        if came[rank]["settings"].get(name) != own["settings"].get(name)
    ]
    if not differences:
        return None
    more = len(differences) - _MOST_NAMED
    return (
        "ranks were started with different settings: "
        + "; ".join(differences[:_MOST_NAMED])
        + (f"; and {more} more" if more > 0 else "")
        + ". Start all of them by the same command, from the same config file"
    )


def _set(settings: Mapping[str, str], name: str, verb: str = "") -> str:
    return f"{verb} {settings[name]}".strip() if name in settings else "is not set"


def listed(ranks: list[int]) -> str:
    named = ", ".join(map(str, ranks[:_MOST_NAMED]))
    more = len(ranks) - _MOST_NAMED
    return f"rank{'s' * (len(ranks) > 1)} {named}" + (f" and {more} more" if more > 0 else "")


def flat(settings: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Nested settings under dotted names."""
    for name, value in settings.items():
        if isinstance(value, Mapping):
            yield from flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value
