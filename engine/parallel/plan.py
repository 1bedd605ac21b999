"""How modules are split over tensor-parallel processes: data that a model declares about itself.

A plan has patterns of module names (fnmatch's `*`) and a split each; what no pattern names is whole
on every process. Only engine/parallel/tensor.py knows what a split does.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import Enum


class Split(Enum):
    """What is divided, and what stands on each process before and after the module."""

    COLUMNS = "a linear's outputs: whole features in, a share of them out"
    ROWS = "a linear's inputs: a share of the features in, whole features out (one sum)"
    VOCABULARY = "an embedding's rows: whole ids in, whole features out (one sum)"
    HEADS = "nothing: a norm that all heads share, applied to a share of the heads (dim 1)"
    ROW_HEADS = "the same where heads come after the tokens of a row (dim 2)"
    STREAM = "with sequence parallelism: the residual stream of a stack of blocks, by tokens"


Plan = Mapping[str, Split]
