"""What the CUDA kernels compute apart from their instructions, in C++ on the CPU."""

from collections.abc import Callable
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent


@pytest.mark.parametrize("name", ["cuda_layout", "cuda_schedule", "cuda_dataflow"])
def test_cuda_on_cpu(run_native_test: Callable[[Path], None], name: str) -> None:
    run_native_test(HERE / f"{name}.cpp")
