"""Keeps what a run of the GPU suite found: benchmarks/results/gpu/*.json and docs/gpu-status.md.

`python benchmarks/gpu/keep.py OUTDIR` in the checkout that the run was of: the sources' digests are
compared, and the commit is filled in where the machine had no git. A case without a time is kept
too, with the reason.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from machine import ROOT, commit, digest
from verdicts import best, in_words, said

RESULTS = ROOT / "benchmarks" / "results" / "gpu"
STATUS = ROOT / "docs" / "gpu-status.md"
HEADER = "| op | case | provider | ms | floor ms | fastest peer | bar | met |"
RULE = "| --- | --- | --- | --- | --- | --- | --- | --- |"
Row = dict[str, Any]


def with_commit(machine: Row) -> Row:
    """Raises SystemExit where the run was of other sources than this checkout's."""
    if machine.get("sources") != digest():
        raise SystemExit(
            f"the run was of sources {machine.get('sources')}, this checkout has {digest()}: "
            "check out the commit that ran"
        )
    known = machine.get("commit", "unknown")
    return machine | {"commit": commit() if known == "unknown" else known}


def results(summary: Row, machine: Row) -> dict[str, Row]:
    """What is kept of each operator, by the name of its file."""
    shared = {"benchmark": "benchmarks/gpu/run.sh", "machine": machine, "rates": summary["rates"]}
    kept: dict[str, Row] = {}
    for case in summary["cases"]:
        op = kept.setdefault(case["op"], shared | {"checks": [], "cases": []})
        op["cases"].append({key: value for key, value in case.items() if key != "op"})
    for check in summary["checks"]:
        op = kept.setdefault(check["module"], shared | {"checks": [], "cases": []})
        op["checks"].append({key: value for key, value in check.items() if key != "module"})
    kept["tests"] = shared | {"stages": summary["stages"], "tests": summary["tests"]}
    return kept


def table(summary: Row) -> list[str]:
    """A row for each bar, and for a case without one."""
    lines = [HEADER, RULE]
    for case in summary["cases"]:
        ours, peer = best(case["sides"], "ours"), best(case["sides"], "peer")
        if ours is None:
            found = "; ".join(said(side) for side in case["sides"] if side["kind"] == "ours")
            cells = [found or "none", "", ""]
        else:
            cells = [ours["side"], f"{ours['median_ms']:.4g}", f"{ours.get('floor_ms', 0):.4g}"]
        cells.append(f"{peer['side']} {peer['median_ms']:.4g}" if peer else "none ran")
        for bar in case["bars"] or [None]:
            judged = ["", ""] if bar is None else [in_words(bar), _met(bar)]
            row = [case["op"], case["case"], *cells, *judged]
            lines.append(f"| {' | '.join(cell.replace('|', '/') for cell in row)} |")
    return lines


def _met(bar: Row) -> str:
    measured = bar["reason"] if bar["measured"] is None else f"{bar['measured']:g}"
    return f"{ {True: 'yes', False: 'no', None: 'not known'}[bar['met']] }: {measured}"


def write_table(page: Path, lines: list[str]) -> None:
    """Replaces the page's table of measurements, leaving the text around it."""
    before, header, after = page.read_text().partition(HEADER)
    if not header:
        raise SystemExit(f"{page} has no table that begins with {HEADER}")
    rest = after.split("\n")[1:]
    while rest and rest[0].startswith("|"):
        rest.pop(0)
    page.write_text(before + "\n".join([*lines, *rest]))


def main() -> None:
    if len(sys.argv) != 2:
        raise SystemExit("usage: python benchmarks/gpu/keep.py OUTDIR")
    summary = json.loads(Path(sys.argv[1], "summary.json").read_text())
    machine = with_commit(summary["machine"])
    if isinstance(machine["gpus"], str):
        raise SystemExit(f"the run had no GPU ({machine['gpus']}): it is not kept")
    RESULTS.mkdir(parents=True, exist_ok=True)
    for name, content in results(summary, machine).items():
        (RESULTS / f"{name}.json").write_text(json.dumps(content, indent=1) + "\n")
    write_table(STATUS, table(summary))
    print(
        f"kept in {RESULTS} and {STATUS}; now bring the first table of the page up to date by hand"
    )


if __name__ == "__main__":
    main()
