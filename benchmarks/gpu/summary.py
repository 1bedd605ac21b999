"""Turns the records of a run into summary.json and summary.md.

`python summary.py OUTDIR LOGS`. Called after each stage, and where the suite is ended early, so it
needs nothing but Python and takes whatever records there are.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from records import read
from verdicts import best, in_words, judged, said

_TAIL_LINES = 15
GOOD = ("ok", "unavailable")
Row = dict[str, Any]


def summarise(records: list[Row], logs: Path) -> Row:
    """All that is known of a run."""
    by_event: dict[str, list[Row]] = {}
    for record in records:
        by_event.setdefault(record["event"], []).append(
            {key: value for key, value in record.items() if key != "event"}
        )
    results = by_event.get("result", [])
    return {
        "machine": (by_event.get("machine") or [{}])[-1],
        "rates": (by_event.get("rates") or [{}])[-1],
        "build": (by_event.get("build") or [{}])[-1],
        "wheels": (by_event.get("wheels") or [{}])[-1],
        "stages": _stages(by_event.get("stage", []), logs),
        "checks": [row for row in results if row["group"] == "check"],
        "cases": list(_cases([row for row in results if row["group"] != "check"])),
        "tests": by_event.get("tests", []),
    }


def _stages(lines: list[Row], logs: Path) -> list[Row]:
    """The last line of each; one that failed, with the end of its log."""
    last = {line["name"]: line for line in lines}
    for name, line in last.items():
        log = logs / f"{name}.log"
        if line["status"] not in ("passed",) and log.exists():
            line["log"] = log.read_text(errors="replace").splitlines()[-_TAIL_LINES:]
    return list(last.values())


def _cases(rows: list[Row]) -> Iterator[Row]:
    """The sides of each case together, with its bars."""
    cases: dict[tuple[str, str, str], list[Row]] = {}
    for row in rows:
        cases.setdefault((row["group"], row["module"], row["case"]), []).append(row)
    for (group, module, case), sides in cases.items():
        about = {"group": group, "op": module, "case": case}
        values = next((row["values"] for row in sides if "values" in row), {})
        shared = ("group", "module", "case", "op", "values", "bars")
        own = [{k: v for k, v in row.items() if k not in shared} for row in sides]
        yield about | {"values": values, "bars": judged(sides), "sides": own}


def page(summary: Row) -> str:
    return "\n\n".join(["# GPU suite", *_sections(summary)]) + "\n"


def _sections(summary: Row) -> Iterator[str]:
    yield _machine(summary)
    yield _table(
        ["stage", "status", "seconds", "budget"],
        [
            [line["name"], line["status"], line.get("seconds", ""), line.get("budget_s", "")]
            for line in summary["stages"]
        ],
    )
    bars = [(case, bar) for case in summary["cases"] for bar in case["bars"]]
    if bars:
        yield "## Bars"
        yield _table(["op", "case", "bar", "measured", "met"], [_bar(*pair) for pair in bars])
    if summary["cases"]:
        yield "## Times"
        rows = [_time(case, side) for case in summary["cases"] for side in _ours(case)]
        yield _table(
            ["op", "case", "provider", "ms (10-90%)", "floor ms", "over floor", "rate", "MiB more",
             "fastest peer", "ratio"],
            rows,
        )  # fmt: skip
    if summary["tests"]:
        yield "## Tests"
        yield _table(
            ["operator", "status", "passed", "failed", "skipped"],
            [
                [t["folder"], t["status"], *(t.get(k, "") for k in ("passed", "failed", "skipped"))]
                for t in summary["tests"]
            ],
        )
    failures = list(_failures(summary))
    if failures:
        yield "## What failed"
        yield from failures
    absent = sorted(_absent(summary))
    if absent:
        yield "## What could not be compared"
        yield "\n".join(f"- {line}" for line in absent)


def _machine(summary: Row) -> str:
    machine, rates = summary["machine"], summary["rates"]
    gpus = machine.get("gpus", "not known")
    names = gpus if isinstance(gpus, str) else ", ".join(
        f"{gpu['name']} ({gpu['memory.total']}, driver {gpu['driver_version']})" for gpu in gpus
    )  # fmt: skip
    versions = machine.get("versions", {})
    installed = [f"{name} {v}" for name, v in versions.items() if v != "not installed"]
    lines = [
        f"- GPU: {names}",
        f"- commit {machine.get('commit')}, sources {machine.get('sources')}",
        f"- Python {machine.get('python')}, {', '.join(installed)}; {machine.get('nvcc')}",
        f"- module: {summary['build'] or 'none was built'}",
        f"- torch {rates.get('torch')}, cuDNN {rates.get('cudnn')}, on {rates.get('device')}",
    ]
    lines += [
        f"- rates, {whose}: {rates[whose]['bytes_per_s'] / 1e12:.3f} TB/s copy, "
        f"{rates[whose]['flops_per_s'] / 1e12:.0f} TFLOP/s bf16 product"
        for whose in ("measured", "known")
        if rates.get(whose)
    ]
    return "\n".join(lines)


def _bar(case: Row, bar: Row) -> list[Any]:
    measured = bar.get("reason") if bar["measured"] is None else f"{bar['measured']:g}"
    by = f" ({bar['by']}, against {bar['against']})" if "against" in bar else ""
    met = {True: "yes", False: "NO", None: "not known"}[bar["met"]]
    return [case["op"], case["case"], in_words(bar), f"{measured}{by}", met]


def _ours(case: Row) -> list[Row]:
    shown = ("ours", "definition") + (("peer",) if case["group"] == "train" else ())
    return [side for side in case["sides"] if side["kind"] in shown]


def _time(case: Row, side: Row) -> list[Any]:
    name = [case["op"], case["case"], side["side"]]
    if "median_ms" not in side:
        return [*name, said(side), *[""] * 6]
    peer = best(case["sides"], "peer")
    rate = f"{side['gigabytes_per_s']:g} GB/s"
    if side["teraflop_per_s"] > 1:
        rate = f"{side['teraflop_per_s']:g} TFLOP/s"
    if "images_per_s" in side:
        memory = f", {side['peak_mb']:g} MiB in all" if "peak_mb" in side else ""
        rate = f"{side['images_per_s']:g} images/s, MFU {100 * side['mfu']:.1f}%{memory}"
    return [
        *name,
        f"{side['median_ms']:.4g} ({side['low_ms']:.4g}-{side['high_ms']:.4g})",
        f"{side['floor_ms']:.4g}" if "floor_ms" in side else "",
        side.get("over_floor", ""),
        rate,
        side.get("extra_mb", ""),
        f"{peer['side']} {peer['median_ms']:.4g}" if peer else "none",
        f"{peer['median_ms'] / side['median_ms']:.2f}" if peer else "",
    ]


def _failures(summary: Row) -> Iterator[str]:
    for line in summary["stages"]:
        if line["status"] != "passed":
            log = "\n".join(line.get("log", []))
            yield f"**stage {line['name']}: {line['status']}**\n\n```\n{log}\n```"
    for op, case, row in _rows(summary):
        if row["status"] not in GOOD:
            detail = f"errors {row['errors']}, at most {row['limit']:g}" if "errors" in row else ""
            text = row.get("traceback") or row.get("log") or detail
            yield f"**{op}, {case}, {row['side']}: {said(row)}**\n\n```\n{text}\n```"
    for folder in summary["tests"]:
        for failure in folder.get("failures", []):
            yield f"**{failure['test']}**\n\n```\n{failure['said']}\n```"


def _absent(summary: Row) -> set[str]:
    """Each reason once."""
    absent = [(op, row) for op, _, row in _rows(summary) if row["status"] == "unavailable"]
    found = {f"{op}, {row['side']}: {row['reason']}" for op, row in absent}
    found |= {
        f"tests of {folder['folder']}, skipped: {skip.strip().splitlines()[-1][:300]}"
        for folder in summary["tests"]
        for skip in folder.get("skips", [])
    }
    wheels = summary["wheels"].get("outcome", {})
    return found | {f"wheel {w}: {what}" for w, what in wheels.items() if "installed" not in what}


def _rows(summary: Row) -> Iterator[tuple[str, str, Row]]:
    """Operator, case and side of every check and time."""
    for row in summary["checks"]:
        yield row["module"], row["case"], row
    for case in summary["cases"]:
        for side in case["sides"]:
            yield case["op"], case["case"], side


def _table(header: list[str], rows: list[list[Any]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(
        f"| {' | '.join(str(cell).replace('|', '/') for cell in line)} |" for line in lines
    )


def main() -> None:
    out, logs = (Path(argument) for argument in sys.argv[1:])
    summary = summarise(read(out / "records.jsonl"), logs)
    (out / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")
    (out / "summary.md").write_text(page(summary))


if __name__ == "__main__":
    main()
