"""Tensor parallelism by a plan: DTensor parameters, and torch's styles around each module.

Modules see local tensors. What the plan does not name stays a plain tensor, whole on each process:
the inputs there are whole and equal, so its gradient is too.

With sequence parallelism the residual stream of a stack of blocks lies by tokens, so that norms and
sums are computed and kept once and not tp times; each sum over processes becomes a gather before
the products and a scatter after them. An encoder's tokens are padded up to a multiple of tp, the
padding hidden from all others, and its last block has all of them, since it may compute only the
one that is pooled. A mixture of experts sees all tokens too. Pieces of a decoder, whose rows have
one length, hand a share of the tokens on; pieces of an encoder all of them.
Between modules go plain tensors only, so that a compiled block may be cut anywhere: the compiler
(torch 2.13, inductor) takes a DTensor's gradient for contiguous where it is not, and has no
gradient for a tensor that is still on its way.
Source: Korthikanti et al. 2022 (Reducing Activation Recomputation), section 4.2.2.
Status: runs on CPU with gloo; not run on a GPU yet, and overlap_exchange nowhere.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
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

from carillon.engine.models.towers.decoder import Decoder
from carillon.engine.models.towers.decoder_stages import DecoderPiece
from carillon.engine.nn.moe import Moe
from carillon.engine.nn.norm import LayerNorm, RMSNorm
from carillon.engine.nn.transformer import Block, Transformer
from carillon.engine.parallel.plan import Plan, Split

_HEADS_DIM = 1  # of queries and keys, (B, H, L, K)
_TOKENS_DIM = 1  # of the residual stream, (B, L, D)
_ROW_HEADS_DIM = 2  # of packed rows' queries and keys, (B, L, H, K)


def split_tensors(
    model: nn.Module, plan: Plan, mesh: DeviceMesh, *, by_tokens: bool = False
) -> None:
    """Split `model` over the tensor-parallel `mesh`, in place; `by_tokens`: sequence parallel."""
    modules = dict(model.named_modules())
    streams = [
        modules[name]
        for pattern, split in plan.items()
        for name in modules
        if by_tokens and split is Split.STREAM and fnmatchcase(name, pattern)
    ]
    inside = {part for stream in streams for block in _blocks_by_tokens(stream) for part in block}
    styles: dict[str, ParallelStyle] = {}
    for name, module in modules.items():
        for pattern, split in plan.items():
            if split is not Split.STREAM and fnmatchcase(name, pattern):
                styles[name] = _style(split, by_tokens=module in inside)
        if isinstance(module, LayerNorm | RMSNorm) and module in inside and name not in styles:
            styles[name] = SequenceParallel(sequence_dim=_TOKENS_DIM, use_local_output=True)
    parallelize_module(model, mesh, styles)
    for name in styles:
        if isinstance(modules[name], nn.Embedding):  # its sum over processes is not waited for
            modules[name].register_forward_hook(lambda _, given, x_BLD: x_BLD.clone())
    for stream in streams:
        _lay_by_tokens(stream, mesh)


def _blocks_by_tokens(stream: nn.Module) -> Iterator[list[nn.Module]]:
    """The modules of each block that sees a share of the tokens, less those that need all."""
    if isinstance(stream, Decoder | DecoderPiece):
        for block in _own_blocks(stream):
            whole = {part for mixture in _mixtures(block) for part in mixture.modules()}
            yield [part for part in block.modules() if part not in whole]
    elif isinstance(stream, Transformer):
        for block in list(stream.blocks)[:-1]:
            if isinstance(block, Block):
                yield list(block.modules())
    else:
        raise TypeError(f"{type(stream).__name__} has no residual stream that is known here")


def _own_blocks(stream: Decoder | DecoderPiece) -> list[nn.Module]:
    return list(stream.blocks if isinstance(stream, Decoder) else stream.own_blocks())


def _mixtures(module: nn.Module) -> Iterator[Moe]:
    return (part for part in module.modules() if isinstance(part, Moe))


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


def _lay_by_tokens(stream: nn.Module, mesh: DeviceMesh) -> None:
    """Cut what enters a stack of blocks into shares of tokens; join them where all are needed."""

    def cut(x_BLD: Tensor) -> Tensor:
        whole = DTensor.from_local(x_BLD, mesh, [Replicate()], run_check=False)
        return whole.redistribute(placements=[Shard(_TOKENS_DIM)]).to_local()

    def joined(x_BLD: Tensor) -> Tensor:
        shares = DTensor.from_local(x_BLD, mesh, [Shard(_TOKENS_DIM)], run_check=False)
        return shares.redistribute(placements=[Replicate()]).to_local()

    def join(module: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
        return (joined(arguments[0]), *arguments[1:])

    if isinstance(stream, Decoder | DecoderPiece):
        if stream.token is not None:  # else a share comes from the piece before
            _own_blocks(stream)[0].register_forward_pre_hook(
                lambda _, arguments: (cut(arguments[0]), *arguments[1:])
            )
        if stream.norm is not None:
            stream.norm.register_forward_pre_hook(join)
        for mixture in _mixtures(stream):
            mixture.register_forward_pre_hook(join)
            mixture.register_forward_hook(lambda _, arguments, y_BLD: cut(y_BLD))
    elif isinstance(stream, Transformer) and len(stream.blocks) > 1:
        last = stream.blocks[-1]
        if isinstance(last, Block):  # else another piece of the stack has it
            last.register_forward_pre_hook(join)
        _pad(stream, cut, joined, mesh.size())


def _pad(
    stack: Transformer,
    cut: Callable[[Tensor], Tensor],
    joined: Callable[[Tensor], Tensor],
    degree: int,
) -> None:
    """Have as many tokens go through `stack` as shares need, and only the own ones come out."""
    whole_forward = stack.forward

    def forward(
        x_BLD: Tensor,
        mask: Tensor | None = None,
        pool_token: Tensor | int | None = None,
        pool_mask: Tensor | None = None,
    ) -> Tensor:
        length = x_BLD.shape[_TOKENS_DIM]
        missing = -length % degree
        if missing:
            x_BLD = F.pad(x_BLD, (0, 0, 0, missing))
            pool_mask = _hide(pool_mask, length, missing, x_BLD.device)
            if mask is not None or not stack.shape.causal:
                mask = _hide(mask, length, missing, x_BLD.device)
        y_BLD = whole_forward(cut(x_BLD), mask, pool_token, pool_mask)
        # A copy: what is sent to the next piece must not be on its way itself.
        return y_BLD[:, :length] if has_last else joined(y_BLD)[:, :length].clone()

    has_last = isinstance(stack.blocks[-1], Block)
    stack.forward = forward  # type: ignore[method-assign]


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
