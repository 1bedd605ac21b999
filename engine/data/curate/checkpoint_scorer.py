"""The way from a stage to a model: imported by name when a stage first asks for one.

The data plane knows no models; whoever asks for a checkpoint in a pipeline needs what the command
`carillon embed` needs.
"""

from __future__ import annotations

from collections.abc import Iterator
from importlib import import_module
from typing import Any, Protocol

from carillon.engine.config import UserError

_MODULE = "carillon.engine.index.scorer"


class Scorer(Protocol):
    """Unit vectors in one space."""

    def picture(self, pixels: Any) -> Any: ...
    def text(self, text: str) -> Any: ...


def scorer_of(run: str, checkpoint: str) -> Scorer:
    """The model of a run. Raises UserError when it cannot be opened."""
    found: Scorer = import_module(_MODULE).open_scorer(run, checkpoint)
    return found


def hash_of(run: str, checkpoint: str) -> str:
    """The checkpoint's content hash. Raises UserError when there is none."""
    return str(import_module(_MODULE).checkpoint_hash(run, checkpoint))


def problems(run: str, checkpoint: str) -> Iterator[str]:
    """Why a run cannot be used, for a stage's `check`."""
    try:
        hash_of(run, checkpoint)
    except UserError as error:
        yield f"run: {error}"
