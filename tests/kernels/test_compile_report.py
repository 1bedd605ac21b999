"""Every CUDA source compiles for sm_90a, and no kernel costs more than is recorded."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from carillon.kernels.compile_report import (
    KernelFigures,
    functions_with_wgmma,
    parse,
    read_status,
    read_versions,
    short_name,
    versions,
    worse,
    write_status,
)

ROOT = Path(__file__).resolve().parents[2]


def test_kernels_compile_and_none_grew() -> None:
    if shutil.which("nvcc") is None:
        if os.environ.get("CI") == "true":
            pytest.fail("CI must have nvcc: the CUDA sources are checked on every commit")
        pytest.skip("nvcc is not installed")
    recorded, here = read_versions(ROOT), versions()
    if recorded != here:
        message = f"the recorded figures are of {recorded}, here are {here}"
        if os.environ.get("CI") == "true":
            pytest.fail(message)
        pytest.skip(message)
    # A process of its own: in this one Triton kernels are defined for the interpreter.
    command = [sys.executable, "-m", "carillon.kernels.compile_report", "--check"]
    environment = os.environ | {"TRITON_INTERPRET": "0"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("source", sorted(ROOT.glob("csrc/*/cuda.cpp")), ids=str)
def test_cuda_bindings_compile(source: Path, tmp_path: Path) -> None:
    """What nvcc alone does not see: they stand on torch, whose CPU build has the headers too."""
    if shutil.which("nvcc") is None:
        if os.environ.get("CI") == "true":
            pytest.fail("CI must have nvcc: the CUDA sources are checked on every commit")
        pytest.skip("nvcc is not installed")
    headers = Path(torch.__file__).parent / "include"
    command = [
        *("nvcc", "-std=c++20", "-c", str(source), "-o", str(tmp_path / "binding.o")),
        *("-Xcompiler", "-Wall,-Wextra,-Werror", "-DC10_CUDA_NO_CMAKE_CONFIGURE_FILE"),
        *(f"-I{ROOT / 'csrc'}", "-isystem", str(headers)),
        *("-isystem", str(headers / "torch" / "csrc" / "api" / "include")),
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_every_cuda_source_is_recorded() -> None:
    sources = {path.parent.name for path in (ROOT / "csrc").glob("*/*.cu")}
    sources |= {path.parent.name for path in (ROOT / "kernels").glob("*/triton_impl.py")}
    assert {op for op, _ in read_status(ROOT)} == sources


def test_parse_reads_registers_and_spills() -> None:
    messages = (
        "ptxas info    : Compiling entry function 'void carillon::x::(anonymous namespace)"
        "::scan<float>' for 'sm_90a'\n"
        "ptxas info    : Function properties for scan\n"
        "    48 bytes stack frame, 40 bytes spill stores, 44 bytes spill loads\n"
        "ptxas info    : Used 168 registers, used 1 barriers, 16 bytes smem\n"
    )
    assert list(parse(messages)) == [("scan<float>", KernelFigures(168, 84, 16, False))]


def test_names_drop_their_namespaces() -> None:
    assert short_name("void a::b::wgmma_tiles<a::b::Weights>") == "wgmma_tiles<Weights>"
    assert short_name("a::(anonymous namespace)::finish") == "finish"


def test_worse_names_growth_and_what_is_not_recorded() -> None:
    def figures(registers: int, spilled: int = 0, wgmma: bool = False) -> KernelFigures:
        return KernelFigures(registers, spilled, 0, wgmma)

    recorded = {("a", "k"): figures(32), ("a", "gone"): figures(8), ("c", "w"): figures(9, 0, True)}
    measured = {("a", "k"): figures(32, 8), ("b", "new"): figures(4), ("c", "w"): figures(9)}
    problems = worse(recorded, measured)
    assert len(problems) == 4
    assert problems[0].startswith("a: gone is recorded")
    assert problems[1].startswith("a: k had")
    assert problems[2] == "b: new is not recorded"
    assert problems[3].startswith("c: w had")
    better = {("a", "k"): figures(30), ("b", "new"): figures(4), ("c", "w"): figures(9, 0, True)}
    assert worse(measured, better) == []
    huge = {("a", "k"): KernelFigures(30, 0, 1 << 20, False)}
    assert worse(huge, huge) == ["a: k takes 1048576 bytes of shared memory"]


def test_wgmma_is_found_in_machine_code() -> None:
    sass = (
        "\tFunction : void carillon::x::(anonymous namespace)::plain\n  FFMA R1, R2, R3 ;\n"
        "\tFunction : void carillon::x::(anonymous namespace)::fast<64>\n  HGMMA.64x64x16 R24 ;\n"
    )
    assert set(functions_with_wgmma(sass)) == {"fast<64>"}


def test_status_table_is_replaced_and_its_text_kept(tmp_path: Path) -> None:
    (tmp_path / "docs").mkdir()
    status = tmp_path / "docs" / "gpu-status.md"
    status.write_text(
        "Before\n\nFigures of nvcc 1, sm_90a:\n\n"
        "| op | kernel | registers | spilled bytes | shared bytes | wgmma |\n"
        "| --- | --- | --- | --- | --- | --- |\n| old | `k` | 1 | 2 | 3 | no |\n\nAfter\n"
    )
    report = {("new", "scan<float>"): KernelFigures(40, 12, 1024, True)}
    write_status(tmp_path, report, "nvcc 2 and Triton 3")
    assert read_status(tmp_path) == report
    assert read_versions(tmp_path) == "nvcc 2 and Triton 3"
    assert status.read_text().startswith("Before\n\nFigures of nvcc 2")
    assert status.read_text().endswith("|\n\nAfter\n")
