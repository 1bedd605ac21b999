"""Compiles every CUDA source for sm_90a and records what ptxas says of each kernel.

Registers and spills are known without a GPU. They stand in docs/gpu-status.md, and a test compares
them with a fresh compile, so that a kernel that grows is seen in the commit that grows it.
Run in the checkout: python -m carillon.kernels.compile_report
Left out: shared memory chosen at launch, and occupancy.
"""

import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

STATUS_FILE = Path("docs", "gpu-status.md")
_ENTRY = re.compile(r"Compiling entry function '(?P<kernel>[^']+)'")
_SPILLS = re.compile(r"(?P<stores>\d+) bytes spill stores, (?P<loads>\d+) bytes spill loads")
_REGISTERS = re.compile(r"Used (?P<registers>\d+) registers")
_ROW = re.compile(
    r"^\| (?P<op>\w+) \| `(?P<kernel>[^`]+)` \| (?P<registers>\d+) \| (?P<spills>\d+) \|$"
)
_HEADER = "| op | kernel | registers | spilled bytes |"


class KernelFigures(NamedTuple):
    """What one kernel costs a thread on sm_90a."""

    registers: int
    spilled_bytes: int


Report = dict[tuple[str, str], KernelFigures]


def compile_all(root: Path) -> Report:
    """Compiles csrc/<op>/*.cu under `root`; returns the figures by (op, kernel).

    Raises:
        FileNotFoundError: nvcc is not on PATH.
        RuntimeError: a source does not compile; the message is the compiler's.
    """
    report: Report = {}
    for source in sorted((root / "csrc").glob("*/*.cu")):
        report |= {
            (source.parent.name, kernel): figures
            for kernel, figures in parse(compile_source(source, root / "csrc"))
        }
    return report


def compile_source(source: Path, include: Path) -> str:
    """The messages of nvcc and ptxas for one source, names demangled."""
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        raise FileNotFoundError("nvcc is not on PATH: install the CUDA toolkit")
    target = ["-gencode=arch=compute_90a,code=sm_90a", "-Xptxas", "-v"]
    options = ["-std=c++20", "-O3", f"-I{include}", *target, "-c", "-o", "/dev/null"]
    done = subprocess.run([nvcc, *options, str(source)], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{source} does not compile for sm_90a:\n{done.stderr}")
    demangle = ["c++filt", "--no-params"]
    return subprocess.run(
        demangle, input=done.stderr, capture_output=True, text=True, check=True
    ).stdout


def parse(messages: str) -> Iterator[tuple[str, KernelFigures]]:
    """Yields (kernel, figures) from the messages of `ptxas -v`."""
    kernel, spilled = "", 0
    for line in messages.splitlines():
        if entry := _ENTRY.search(line):
            kernel = short_name(entry["kernel"])
        elif spills := _SPILLS.search(line):
            spilled = int(spills["stores"]) + int(spills["loads"])
        elif registers := _REGISTERS.search(line):
            yield kernel, KernelFigures(int(registers["registers"]), spilled)


def short_name(kernel: str) -> str:
    """Drops the return type and the namespaces."""
    return kernel.removeprefix("void ").rpartition("(anonymous namespace)::")[2]


def read_status(root: Path) -> Report:
    """The figures that docs/gpu-status.md records."""
    rows = map(_ROW.match, (root / STATUS_FILE).read_text().splitlines())
    return {
        (row["op"], row["kernel"]): KernelFigures(int(row["registers"]), int(row["spills"]))
        for row in rows
        if row
    }


def write_status(root: Path, report: Report) -> None:
    """Replaces the table of docs/gpu-status.md, leaving the text around it."""
    path = root / STATUS_FILE
    before, _, after = path.read_text().partition(_HEADER)
    rest = after.splitlines(keepends=True)[1:]
    while rest and rest[0].startswith("|"):
        rest.pop(0)
    rows = [
        f"| {op} | `{kernel}` | {figures.registers} | {figures.spilled_bytes} |\n"
        for (op, kernel), figures in sorted(report.items())
    ]
    path.write_text("".join([before, _HEADER, "\n| --- | --- | --- | --- |\n", *rows, *rest]))


def worse(recorded: Report, measured: Report) -> list[str]:
    """Says which kernels grew, appeared or vanished since the record."""
    problems = [
        f"{op}: {kernel} is recorded but not compiled"
        for op, kernel in recorded.keys() - measured.keys()
    ]
    for (op, kernel), now in measured.items():
        before = recorded.get((op, kernel))
        if before is None:
            problems.append(f"{op}: {kernel} is not recorded")
        elif now.registers > before.registers or now.spilled_bytes > before.spilled_bytes:
            problems.append(f"{op}: {kernel} had {before} and has {now}")
    return sorted(problems)


def main() -> int:
    root = Path.cwd()
    if not (root / STATUS_FILE).exists():
        print(f"{root} has no {STATUS_FILE}: run this in the checkout", file=sys.stderr)
        return 2
    write_status(root, compile_all(root))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
