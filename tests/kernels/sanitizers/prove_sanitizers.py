"""Proves that the sanitizers see faults in the module that `make asan` tests: each fault ends a
process of its own with its report, and the same call without the fault returns.

Run by `make asan`, with the module and the environment that its tests get.
"""

import subprocess
import sys

import pytest

SETS = ("portable", "avx2", "avx512", "avx512_bf16")
PREPARE = """
import sys, torch
from carillon.kernels.table import load_native
load_native()
if torch.ops.carillon.limit_instruction_set(sys.argv[1]) != sys.argv[1]:
    sys.exit(77)
faults, x = torch.ops.carillon_faults, torch.ones(int(sys.argv[2]))
"""
# A call that is right, and the fault that differs from it by one place.
FAULTS = {
    "read past the end": ("sum_between(x, 0, 19)", "sum_between(x, 0, 20)", "heap-buffer-overflow"),
    "read before the beginning": (
        "sum_between(x, 0, 19)",
        "sum_between(x, -1, 19)",
        "heap-buffer-overflow",
    ),
    "write past the end": ("write_at(x, 18)", "write_at(x, 19)", "heap-buffer-overflow"),
    "overflow": (
        "add_int32(2**31 - 2, 1)",
        "add_int32(2**31 - 1, 1)",
        "signed integer overflow",
    ),
}
VECTORS = ("vector_sum_between(x, 0, 19)", "vector_sum_between(x, 0, 20)", "heap-buffer-overflow")
CASES = [
    *(pytest.param("portable", *case, id=name) for name, case in FAULTS.items()),
    *(pytest.param(name, *VECTORS, id=f"read past the end by {name}") for name in SETS),
]


@pytest.mark.parametrize(("instruction_set", "right", "fault", "report"), CASES)
def test_fault_is_reported(instruction_set: str, right: str, fault: str, report: str) -> None:
    code = f"{PREPARE}faults.{right}\nprint('right', flush=True)\nfaults.{fault}\n"
    command = [sys.executable, "-c", code, instruction_set, "19"]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode == 77:
        pytest.skip(f"this processor has no {instruction_set}")
    assert done.stdout == "right\n", done.stderr
    assert done.returncode != 0
    assert report in done.stderr
    assert "tests/kernels/sanitizers/fault" in done.stderr  # where it happened
