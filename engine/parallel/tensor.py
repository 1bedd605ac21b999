"""Tensor parallelism by a plan: DTensor parameters, and torch's styles around each module.

Modules see local tensors. What the plan does not name stays a plain tensor, whole on each process:
the inputs there are whole and equal, so its gradient is too.

With sequence parallelism the residual stream of a stack of blocks lies by tokens, so that norms and
sums are computed and kept once and not tp times; each sum over processes becomes a gather before
the products and a scatter after them. Tokens are padded up to a multiple of tp, the padding hidden
from all others. The last block has whole tokens, since it may compute only the one that is pooled.
Source: Korthikanti et al. 2022 (Reducing Activation Recomputation), section 4.2.2.
Status: runs on CPU with gloo; not run on a GPU yet, and overlap_exchange nowhere.
"""

from __future__ import annotations

from collections.abc import Iterator
from fnmatch import fnmatchcase
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)

from carillon.engine.nn.norm import LayerNorm
from carillon.engine.nn.transformer import Block, Transformer
from carillon.engine.parallel.plan import Plan, Split

_HEADS_DIM = 1  # of queries and keys, (B, H, L, K)
_TOKENS_DIM = 1  # of the residual stream, (B, L, D)
_ROW_HEADS_DIM = 2  # of packed rows' queries and keys, (B, L, H, K)


def split_tensors(
    model: nn.Module, plan: Plan, mesh: DeviceMesh, *, by_tokens: bool = False
) -> None:
    """Split `model` over the tensor-parallel `mesh`, in place; `by_tokens`: sequence parallel."""
    styles: dict[str, ParallelStyle] = {}
    streams = list(_streams(model, plan)) if by_tokens else []
    for name, module in model.named_modules():
        for pattern, split in plan.items():
            if split is not Split.STREAM and fnmatchcase(name, pattern):
                inside = any(name.startswith(prefix) for prefix in streams)
                styles[name] = _style(split, by_tokens=inside)
        if isinstance(module, LayerNorm) and name.rpartition(".")[0] + "." in streams:
            styles[name] = SequenceParallel(sequence_dim=_TOKENS_DIM)
    parallelize_module(model, mesh, styles)
    if by_tokens:
        for name, module in model.named_modules():
            if any(fnmatchcase(name, p) and s is Split.STREAM for p, s in plan.items()):
                _lay_by_tokens(module, mesh)


def _streams(model: nn.Module, plan: Plan) -> Iterator[str]:
    """Prefixes of the blocks whose residual stream lies by tokens."""
    patterns = [pattern for pattern, split in plan.items() if split is Split.STREAM]
    for name, module in model.named_modules():
        if isinstance(module, Transformer) and any(fnmatchcase(name, p) for p in patterns):
            yield from (f"{name}.blocks.{index}." for index in range(len(module.blocks) - 1))


def _style(split: Split, *, by_tokens: bool) -> ParallelStyle:
    tokens = Shard(_TOKENS_DIM)
    match split:
        case Split.COLUMNS:
            return ColwiseParallel(input_layouts=tokens if by_tokens else Replicate())
        case Split.ROWS:
            return RowwiseParallel(
                input_layouts=Shard(-1), output_layouts=tokens if by_tokens else Replicate()
            )
        case Split.VOCABULARY:
            return RowwiseParallel(input_layouts=Replicate())
        case Split.HEADS:
            # Its gradient is summed over the heads of all processes.
            return SequenceParallel(sequence_dim=_HEADS_DIM, use_local_output=True)
        case Split.ROW_HEADS:
            return SequenceParallel(sequence_dim=_ROW_HEADS_DIM, use_local_output=True)
        case Split.STREAM:
            raise ValueError("a stream is laid out around its blocks, not by a style")


def _lay_by_tokens(stack: nn.Module, mesh: DeviceMesh) -> None:
    """Cut what enters a stack of blocks into shares of tokens, and join them for the last block."""
    assert isinstance(stack, Transformer)
    whole_forward = stack.forward

    def forward(
        x_BLD: Tensor,
        mask: Tensor | None = None,
        pool_token: Tensor | int | None = None,
        pool_mask: Tensor | None = None,
    ) -> Tensor:
        length = x_BLD.shape[_TOKENS_DIM]
        missing = -length % mesh.size()
        if missing:
            x_BLD = F.pad(x_BLD, (0, 0, 0, missing))
            pool_mask = _hide(pool_mask, length, missing, x_BLD.device)
            if mask is not None or not stack.shape.causal:
                mask = _hide(mask, length, missing, x_BLD.device)
        if len(stack.blocks) > 1:
            whole = DTensor.from_local(x_BLD, mesh, [Replicate()], run_check=False)
            x_BLD = whole.redistribute(placements=[Shard(_TOKENS_DIM)]).to_local()
        y_BLD: Tensor = whole_forward(x_BLD, mask, pool_token, pool_mask)
        # A copy: what is sent to the next piece must not be on its way itself.
        return y_BLD[:, :length] if has_last else joined(y_BLD)[:, :length].clone()

    def joined(share_BLD: Tensor) -> Tensor:
        share = DTensor.from_local(share_BLD, mesh, [Shard(_TOKENS_DIM)], run_check=False)
        whole_BLD: Tensor = share.redistribute(placements=[Replicate()]).to_local()
        return whole_BLD

    def join(block: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
        return (joined(arguments[0]), *arguments[1:])

    stack.forward = forward  # type: ignore[method-assign]
    last = stack.blocks[-1]
    has_last = isinstance(last, Block)  # else another piece of the stack has it
    if has_last and len(stack.blocks) > 1:
        last.register_forward_pre_hook(join)


def _hide(mask: Tensor | None, length: int, missing: int, device: torch.device) -> Tensor:
    """A mask of keys, (B, 1, 1, L) or none, that hides those of the padding too."""
    if mask is None:
        return (torch.arange(length + missing, device=device) < length)[None, None, None]
    return F.pad(mask, (0, missing))


def overlap_exchange(mesh: DeviceMesh) -> None:
    """Asynchronous tensor parallelism: compiled blocks overlap products with their exchange.

    For torch.compile on CUDA with symmetric memory, of PyTorch's own.
    """
    from torch._inductor import config
    from torch.distributed._symmetric_memory import enable_symm_mem_for_group

    config._micro_pipeline_tp = True
    enable_symm_mem_for_group(mesh.get_group().group_name)
