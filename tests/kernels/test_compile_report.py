"""Every CUDA source compiles for sm_90a, and no kernel costs more than is recorded."""

import os
import shutil
from pathlib import Path

import pytest

from carillon.kernels.compile_report import (
    KernelFigures,
    compile_all,
    parse,
    read_status,
    worse,
    write_status,
)

ROOT = Path(__file__).resolve().parents[2]


def test_kernels_compile_and_none_grew() -> None:
    if shutil.which("nvcc") is None:
        if os.environ.get("CI") == "true":
            pytest.fail("CI must have nvcc: the CUDA sources are checked on every commit")
        pytest.skip("nvcc is not installed")
    assert worse(read_status(ROOT), compile_all(ROOT)) == []


def test_every_cuda_source_is_recorded() -> None:
    sources = {path.parent.name for path in (ROOT / "csrc").glob("*/*.cu")}
    assert {op for op, _ in read_status(ROOT)} == sources


def test_parse_reads_registers_and_spills() -> None:
    messages = (
        "ptxas info    : Compiling entry function 'void carillon::x::(anonymous namespace)"
        "::scan<float>' for 'sm_90a'\n"
        "ptxas info    : Function properties for scan\n"
        "    48 bytes stack frame, 40 bytes spill stores, 44 bytes spill loads\n"
        "ptxas info    : Used 168 registers, used 1 barriers, 16 bytes smem\n"
    )
    assert list(parse(messages)) == [("scan<float>", KernelFigures(168, 84))]


def test_worse_names_growth_and_what_is_not_recorded() -> None:
    recorded = {("a", "k"): KernelFigures(32, 0), ("a", "gone"): KernelFigures(8, 0)}
    measured = {("a", "k"): KernelFigures(32, 8), ("b", "new"): KernelFigures(4, 0)}
    problems = worse(recorded, measured)
    assert len(problems) == 3
    assert problems[0].startswith("a: gone is recorded")
    assert problems[1].startswith("a: k had")
    assert problems[2] == "b: new is not recorded"
    assert (
        worse(measured, {("a", "k"): KernelFigures(30, 0), ("b", "new"): KernelFigures(4, 0)}) == []
    )


def test_status_table_is_replaced_and_its_text_kept(tmp_path: Path) -> None:
    (tmp_path / "docs").mkdir()
    status = tmp_path / "docs" / "gpu-status.md"
    status.write_text(
        "Before\n\n| op | kernel | registers | spilled bytes |\n| --- | --- | --- | --- |\n"
        "| old | `k` | 1 | 2 |\n\nAfter\n"
    )
    report = {("new", "scan<float>"): KernelFigures(40, 12)}
    write_status(tmp_path, report)
    assert read_status(tmp_path) == report
    assert status.read_text().startswith("Before\n\n|")
    assert status.read_text().endswith("|\n\nAfter\n")
