"""Deterministic mode: the same config in the same layout, on one machine type and torch version,
gives the same bits in every run.

Order of samples, augmentation and weights follow from the seed in any mode. What is left is the
arithmetic: torch takes algorithms whose sums have one order and raises where it has none, cuBLAS
gets a workspace of its own (before CUDA starts, when it is read), and NCCL one algorithm for its
sums. Compiled kernels are chosen by timing, so they are refused, as are Transformer Engine's and
DeepEP's.
Layouts still differ from each other by rounding: docs/architecture.md lists those that claim this.
Status: runs on CPU with gloo; not run on a GPU yet.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch

from carillon.engine.config import UserError

if TYPE_CHECKING:
    from carillon.engine.parallel.config import DistributedConfig

_WORKSPACE = "CUBLAS_WORKSPACE_CONFIG"
_WORKSPACES = (":4096:8", ":16:8")  # those that cuBLAS documents as reproducible


def nondeterministic(config: DistributedConfig) -> Iterator[str]:
    """What of the config cannot be the same in every run."""
    if config.compile:
        yield "deterministic: compiled kernels are chosen by timing; set distributed.compile=false"
    if config.fp8_provider == "transformer_engine":
        yield (
            "deterministic: nothing is known of Transformer Engine's order of sums; set "
            "distributed.fp8_provider=native"
        )
    if config.dispatcher == "deepep":
        yield (
            "deterministic: nothing is known of DeepEP's order of sums; set "
            "distributed.dispatcher=all_to_all"
        )


@contextmanager
def fixed_order(enabled: bool) -> Iterator[None]:
    """Inside, this process computes sums in one order, if `enabled`; enter before CUDA starts.

    Raises UserError when CUDA has started, or the environment asks for what has no fixed order.
    """
    if not enabled:
        yield
        return
    asked = os.environ.setdefault(_WORKSPACE, _WORKSPACES[0])
    if asked not in _WORKSPACES:
        raise UserError(
            f"distributed.deterministic: {_WORKSPACE}={asked} is set, which leaves cuBLAS free; "
            f"use {' or '.join(_WORKSPACES)}, or unset it"
        )
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        raise UserError(
            "distributed.deterministic: CUDA has already started in this process; train in a "
            "process of its own (carillon train)"
        )
    os.environ.setdefault("NCCL_ALGO", "Ring")
    cudnn = torch.backends.cudnn
    before = torch.are_deterministic_algorithms_enabled(), cudnn.deterministic, cudnn.benchmark
    try:
        torch.use_deterministic_algorithms(True)
        cudnn.deterministic, cudnn.benchmark = True, False
        yield
    finally:
        torch.use_deterministic_algorithms(before[0])
        cudnn.deterministic, cudnn.benchmark = before[1:]
