"""The parity table: every layout's step against one process, written by one command.

    python -m carillon.engine.train.parity --out docs/parity.md

starts one group of processes for each world size, in which all its layouts run one after another,
and writes the table and, beside it, parity.json. Under torchrun the module is that group's process.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from carillon.engine.parallel.mesh import Degrees, World, degrees_of, lay_out
from carillon.engine.parallel.parity import TOLERANCE_FP32, gradient_errors
from carillon.engine.train.parity.columns import COLUMNS
from carillon.engine.train.parity.evidence import Evidence, looked_at
from carillon.engine.train.parity.rows import ROWS, Row
from carillon.engine.train.parity.step import Step, Variant

Result = dict[str, Any]
ERRORS = ("loss", "gradient", "norm")
_TIMEOUT_S = 900
_HEAD = """# Every layout computes one process's step

Written by `make parity`; a test runs every row and holds this page to the cases and the bar. Each
cell: the relative error of the loss, and the largest of the gradients, per tensor
||difference|| / max(||reference||, 1e-3 x the global gradient norm), against one process in fp32;
the worst of all processes and of the row's variants. Allowed: {tolerance:.0e}. Weights held: the
share of a model's values that the process with most of them keeps between steps, small models'
whole layers included. Every case is in parity.json, with what the main process did: the test holds
schedules, exchanges and recompute to what the row names.
"""


def run_cases(size: int, *, tested_only: bool) -> list[Result]:
    """Every case of this world size, or those that tests run, in a process group that
    has started."""
    cuda = torch.cuda.is_available() and dist.get_backend() == "nccl"
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if cuda else torch.device("cpu")
    references: dict[tuple[str, int], Step] = {}
    worlds: dict[Degrees, World] = {}
    results = []
    for row in ROWS:
        if row.size != size:
            continue
        for column, variant in row.tested if tested_only else row.cases:
            model = (column, row.depth)
            if model not in references:
                references[model] = COLUMNS[column](None, None, Variant(), row.depth)
            layout = row.layout(variant)
            torch.compiler.reset()  # else what many cases compiled would pass its limit
            degrees = degrees_of(layout, size)
            # Every group of a world has threads, but what is compiled wants a world of its own.
            if degrees not in worlds or variant.compile:
                worlds[degrees] = lay_out(degrees, device)
            world = worlds[degrees]
            with nullcontext(Evidence()) if variant.compile else looked_at() as evidence:
                found = COLUMNS[column](layout, world, variant, row.depth)
            result = _result(row, column, variant, found, references[model])
            results.append(_of_all(result) | {"did": evidence.facts()})
    return results


def _of_all(result: Result) -> Result:
    """The same with the largest errors of all processes: each has gathered gradients of its own."""
    parts: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(parts, result)
    worst = max(parts, key=lambda part: part["gradient"])
    return result | {"tensor": worst["tensor"]} | {e: max(p[e] for p in parts) for e in ERRORS}


def _result(row: Row, column: str, variant: Variant, found: Step, reference: Step) -> Result:
    errors = gradient_errors(found.gradients, reference.gradients)
    worst = max(errors, key=errors.__getitem__)
    return {
        "row": row.name,
        "size": row.size,
        "column": column,
        "variant": variant.name,
        "loss": abs(found.loss - reference.loss) / abs(reference.loss),
        "gradient": errors[worst],
        "tensor": worst,
        "norm": abs(found.norm - reference.norm) / reference.norm,
        "held": found.held,
        "kept_bytes": found.kept_bytes,
    }


def launch(size: int, *, tested_only: bool = False) -> list[Result]:
    """Start `size` processes on this machine that run their cases; returns the results.

    Raises RuntimeError with what they wrote when they fail.
    """
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "results.json"
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        command += [f"--nproc-per-node={size}", "-m", "carillon.engine.train.parity"]
        done = subprocess.run(
            [*command, "--results", str(out), *["--tested-only"] * tested_only],
            capture_output=True,
            text=True,
            timeout=_TIMEOUT_S,
        )
        if done.returncode:
            told = [line for line in done.stderr.splitlines() if line.startswith("[rank")]
            text = "\n".join(told or done.stderr.splitlines())
            raise RuntimeError(f"{size} processes failed:\n{text[-6000:]}")
        results: list[Result] = json.loads(out.read_text())
        return results


def markdown(results: Sequence[Result]) -> str:
    """The page: a table of the worst of each row's variants, and what the variants were."""
    lines = [
        _HEAD.format(tolerance=TOLERANCE_FP32),
        "| layout | processes | " + " | ".join(COLUMNS) + " | weights held | variants |",
        "| --- | --- |" + " --- |" * (len(COLUMNS) + 2),
    ]
    for row in ROWS:
        own = [result for result in results if result["row"] == row.name]
        cells = []
        for column in COLUMNS:
            cell = [result for result in own if result["column"] == column]
            worst = (max((r[what] for r in cell), default=0.0) for what in ("loss", "gradient"))
            cells.append(" / ".join(f"{error:.0e}" for error in worst) if cell else "-")
        held = max((result["held"] for result in own), default=1.0)
        variants = ", ".join(variant.name for variant in row.variants)
        cells += [f"{held:.0%}", variants]
        lines.append(f"| {row.name} | {row.size} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, help="the page to write")
    parser.add_argument("--results", type=Path, help="in a process group: JSON of its cases")
    parser.add_argument("--tested-only", action="store_true", help="the cases that tests run")
    arguments = parser.parse_args()
    if arguments.results is not None:
        torch.set_num_threads(1)
        dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
        results = run_cases(dist.get_world_size(), tested_only=arguments.tested_only)
        if dist.get_rank() == 0:
            arguments.results.write_text(json.dumps(results))
        dist.destroy_process_group()
        return 0
    results = []
    for size in sorted({row.size for row in ROWS}):
        results += launch(size)
    if arguments.out is not None:
        arguments.out.write_text(markdown(results))
        text = json.dumps(results, indent=1)
        arguments.out.with_suffix(".json").write_text(text + "\n")
    bad = [r for r in results if not max(r[error] for error in ERRORS) <= TOLERANCE_FP32]
    for result in bad:
        print("too far:", result)
    print(f"{len(results) - len(bad)} of {len(results)} cases within {TOLERANCE_FP32:.0e}")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
