"""Whether a case reached its bars, from the records of its sides."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

Row = Mapping[str, Any]


def best(rows: Iterable[Row], kind: str) -> Row | None:
    """The fastest side of a kind that ended well."""
    well = [row for row in rows if row["kind"] == kind and row["status"] == "ok"]
    return min(well, key=lambda row: row["median_ms"], default=None)


def judged(rows: list[Row]) -> list[dict[str, Any]]:
    """The bars of one case, each with what was measured and whether it is met.

    `met` is None where it cannot be said; `reason` says why.
    """
    bars = max((row.get("bars", []) for row in rows), key=len, default=[])
    ours = best(rows, "ours")
    if ours is None:
        reasons = [f"{r['side']}: {said(r)}" for r in rows if r["kind"] == "ours"]
        reason = "; ".join(reasons) or "no provider of ours ran"
        return [dict(bar) | {"measured": None, "met": None, "reason": reason} for bar in bars]
    return [dict(bar) | _judged(bar, ours, rows) for bar in bars]


def _judged(bar: Row, ours: Row, rows: list[Row]) -> dict[str, Any]:
    if bar["what"] == "ms":
        return _verdict(ours["median_ms"], ours["median_ms"] <= bar["limit"], ours)
    if bar["what"] == "images/s":
        return _verdict(ours["images_per_s"], ours["images_per_s"] >= bar["limit"], ours)
    if bar["what"] == "MiB":
        if "peak_mb" not in ours:
            return {"measured": None, "met": None, "reason": "memory is known on a GPU alone"}
        return _verdict(ours["peak_mb"], ours["peak_mb"] <= bar["limit"], ours)
    name = bar["peer"]
    other = best((row for row in rows if name in ("", row["side"])), "peer")
    if bar["what"] == "bandwidth":
        other = best((row for row in rows if row["side"] == name), "yardstick")
    if other is None:
        reasons = [f"{r['side']}: {said(r)}" for r in rows if name == r["side"]]
        reason = "; ".join(reasons) or f"nothing to compare with ({name or 'any peer'})"
        return {"measured": None, "met": None, "reason": reason}
    if bar["what"] == "bandwidth":
        reached = ours["gigabytes_per_s"] / other["gigabytes_per_s"]
    else:
        reached = other["median_ms"] / ours["median_ms"]
    return _verdict(round(reached, 3), reached >= bar["limit"], ours) | {"against": other["side"]}


def _verdict(measured: float, met: bool, ours: Row) -> dict[str, Any]:
    return {"measured": measured, "met": met, "by": ours["side"]}


def said(row: Row) -> str:
    """Status and the first line of the reason."""
    lines = str(row.get("reason", "")).strip().splitlines()
    return row["status"] + (f" ({lines[0][:200]})" if lines else "")


def in_words(bar: Row) -> str:
    if bar["what"] == "ms":
        return f"at most {bar['limit']:g} ms"
    if bar["what"] == "MiB":
        return f"at most {bar['limit']:g} MiB in all"
    if bar["what"] == "images/s":
        return f"at least {bar['limit']:g} images/s"
    of = bar["peer"] or "the fastest peer"
    if bar["what"] == "bandwidth":
        return f"at least {100 * bar['limit']:g}% of the bandwidth of {of}"
    return f"at least {bar['limit']:g} times as fast as {of}"
