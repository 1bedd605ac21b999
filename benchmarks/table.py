"""Prints the kernels' results in one table, with their bars: met or NOT met.

`python benchmarks/table.py` reads benchmarks/results and runs nothing. Ratios above 1 mean that
ours is faster. A result that is missing, or lacks a row that a bar is about, is an error (exit
code 2). A bar that is not met is one only with --strict (exit code 1).
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from bars import BARS, Bar

RESULTS = Path(__file__).resolve().parent / "results"
OPS = ("contrastive", "packed_attention", "moe_routing", "fp8_cast", "image_normalize")
HEAD = (
    *("op", "case", "pass", "size", "ours", "best peer", "its time", "ratio"),
    *("memory", "its least", "H100 floor", "bar", "", "measured"),
)
Row = dict[str, Any]


def read(results: Path) -> dict[str, dict[str, Any]]:
    """Each operator's results. Raises SystemExit where one is missing or of another form."""
    found, wrong = {}, []
    for op in OPS:
        path = results / f"{op}.json"
        try:
            found[op] = json.loads(path.read_text())
            if {row.get("op") for row in found[op]["rows"]} != {op}:
                wrong.append(f"{path} has no row of {op}, or others too")
        except (OSError, ValueError, KeyError) as error:
            wrong.append(f"{path}: {error}")
    wrong += [] if wrong else _without_row(found)
    if wrong:
        print("results are missing; `make bench-cpu` measures them:", file=sys.stderr)
        print("\n".join(wrong), file=sys.stderr)
        raise SystemExit(2)
    return found


def _without_row(found: dict[str, dict[str, Any]]) -> list[str]:
    rows = {_key(row): row for result in found.values() for row in result["rows"]}
    wrong = []
    for bar in BARS:
        row = rows.get(bar.key)
        named = ", ".join(map(str, bar.key))
        if row is None:
            wrong.append(f"no row for the bar of {named}")
        elif missing := [peer for peer in bar.against if peer not in row["ratio"]]:
            wrong.append(f"the row of {named} lacks {', '.join(missing)}, which its bar is against")
    return wrong


def lines(found: dict[str, dict[str, Any]]) -> Iterator[tuple[str, ...]]:
    """The table's rows, each bar on a line of its own."""
    for result in found.values():
        measured = f"{result['date']} {result['commit'][:7]}{'+' * result['commit'].endswith('+')}"
        for row in result["rows"]:
            judged = [_said(bar, row) for bar in BARS if bar.key == _key(row)] or [("", "")]
            yield (*_figures(row), *judged[0], measured)
            for more in judged[1:]:
                yield (*[""] * len(_figures(row)), *more, "")


def _figures(row: Row) -> tuple[str, ...]:
    peers = sorted(row["ratio"], key=row["seconds"].__getitem__)
    best = ("-", "-", "-")
    if peers:
        ratio = f"{row['ratio'][peers[0]]:.2f}"
        best = (peers[0], _time(row["seconds"][peers[0]]), ratio)
    least = min((row["extra_mb"][peer] for peer in peers), default=None)
    return (
        *(row["op"], row["case"], row["pass"], f"{row['size']:,} {row['unit']}"),
        *(_time(row["seconds"]["ours"]), *best),
        f"{row['extra_mb']['ours']:.1f} MB",
        "-" if least is None else f"{least:.1f} MB",
        _time(row["floor_h100_s"]),
    )


def _said(bar: Bar, row: Row) -> tuple[str, str]:
    said, met = bar.judge(row)
    return said, "met" if met else "NOT met"


def _key(row: Row) -> tuple[str, str, str, int]:
    return row["op"], row["case"], row["pass"], row["size"]


def _time(seconds: float) -> str:
    for unit, factor in (("s", 1.0), ("ms", 1e3)):
        if seconds * factor >= 1:
            return f"{seconds * factor:.3g} {unit}"
    return f"{seconds * 1e6:.3g} us"


def table(found: dict[str, dict[str, Any]]) -> str:
    """All of it as text: where it was measured, the rows, the peers that were left out."""
    rows = [HEAD, *lines(found)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    rows.insert(1, tuple("-" * width for width in widths))
    text = []
    for op, result in found.items():
        hardware, torch = result["hardware"], result["versions"]["torch"]
        threads = sorted({row["num_threads"] for row in result["rows"]})
        text.append(
            f"{op}: {hardware['cpu']}, {hardware['cores']} cores, load {hardware['load_average']} "
            f"at the end, threads {', '.join(map(str, threads))}, torch {torch}"
        )
    text += ["", *("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows), ""]
    reasons: dict[str, None] = {}
    for op, result in found.items():
        for row in result["rows"]:
            reasons |= {f"{op}: without {n}: {why}": None for n, why in row["left_out"].items()}
    return "\n".join([*text, *reasons])


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--strict", action="store_true", help="exit 1 where a bar is not met")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the JSON files")
    given = parser.parse_args(arguments)
    found = read(given.results)
    print(table(found))
    rows = {_key(row): row for result in found.values() for row in result["rows"]}
    unmet = sum(not bar.judge(rows[bar.key])[1] for bar in BARS)
    print(f"\n{len(BARS) - unmet} of {len(BARS)} bars met")
    return 1 if unmet and given.strict else 0


if __name__ == "__main__":
    raise SystemExit(main())
