"""Tensor parallelism by a plan: DTensor parameters, and torch's styles around each module.

Modules see local tensors. What the plan does not name stays a plain tensor, whole on each process:
the inputs there are whole and equal, so its gradient is too.
Status: runs on CPU with gloo; not run on a GPU yet.
"""

from __future__ import annotations

from fnmatch import fnmatchcase

from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)

from carillon.engine.parallel.plan import Plan, Split

_HEADS_DIM = 1  # of queries and keys, (B, H, L, K)
_ROW_HEADS_DIM = 2  # of packed rows' queries and keys, (B, L, H, K)


def split_tensors(model: nn.Module, plan: Plan, mesh: DeviceMesh) -> None:
    """Split `model` over the tensor-parallel `mesh`, in place."""
    names = [name for name, _ in model.named_modules()]
    parallelize_module(
        model,
        mesh,
        {
            name: _style(split)
            for pattern, split in plan.items()
            for name in names
            if fnmatchcase(name, pattern)
        },
    )


def _style(split: Split) -> ParallelStyle:
    match split:
        case Split.COLUMNS:
            return ColwiseParallel()
        case Split.ROWS:
            return RowwiseParallel(input_layouts=Shard(-1))
        case Split.VOCABULARY:
            return RowwiseParallel(input_layouts=Replicate())
        case Split.HEADS:
            # Its gradient is summed over the heads of all processes.
            return SequenceParallel(sequence_dim=_HEADS_DIM, use_local_output=True)
        case Split.ROW_HEADS:
            return SequenceParallel(sequence_dim=_ROW_HEADS_DIM, use_local_output=True)
