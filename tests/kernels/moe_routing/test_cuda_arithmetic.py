"""What the CUDA kernels compute of indices, ranks and keys, against plain definitions."""

from collections.abc import Callable
from pathlib import Path

import pytest

SOURCES = sorted(Path(__file__).parent.glob("*.cpp"))


@pytest.mark.parametrize("source", SOURCES, ids=lambda source: source.stem)
def test_index_functions(source: Path, run_native_test: Callable[[Path], None]) -> None:
    run_native_test(source)
