"""The developers' data sets, which stand beside the repository and are no part of it.

And the choice of Triton's interpreter where there is no GPU: it is made when Triton is first
imported, which torch may do in any test, so it stands here. And signals stand after a test as
before it: a run that was asked to stop leaves them ignored, since its process ends.
"""

import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

REAL_DATA = Path(__file__).resolve().parents[2] / "shared" / "data"


@pytest.fixture(scope="session")
def real_data() -> Callable[[str], Path]:
    """Gives a data set's folder; where it is missing the test is skipped, in CI it fails."""

    def folder(name: str) -> Path:
        path = REAL_DATA / name
        if path.is_dir():
            return path
        message = (
            f"{path} is missing: real pictures, for what drawn ones cannot show. It comes with the "
            "developers' checkout, beside the repository"
        )
        if os.environ.get("CI") == "true":
            pytest.fail(f"CI must have it: {message}")
        pytest.skip(message)

    return folder


@pytest.fixture(autouse=True)
def _signals() -> Iterator[None]:
    kinds = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
    before = {kind: signal.getsignal(kind) for kind in kinds}
    yield
    for kind, handler in before.items():
        signal.signal(kind, handler)
