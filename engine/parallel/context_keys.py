"""Attention of a share's queries over the keys of whole rows, which come in parts or gathered.

In parts, they travel around a ring while this process works on those that it holds. Under a causal
mask, half of one side is out of sight at every step but the first, by the cut of the rows: all
processes have the same work at each step, and nothing that the mask hides is computed.
Results over parts are merged by their log-sum-exp. The backward pass calls
packed_attention_backward on the same parts with the merged one, which is exact, and is lean: kept
for it are the share, its result and its log-sum-exp, whatever the number of parts.
Merged results and gradients are float32 (log-sum-exps float64 until they are kept), also where q, k
and v are bfloat16: gradients of keys then take twice the bytes of keys on their way home.
Deterministic; differentiable once.
Status: runs on CPU with gloo; CUDA with NCCL has not run on a GPU yet.

Legend: B rows, L tokens of a share, S starts of documents and the end, H heads, K head_dim.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from carillon.engine.parallel.collectives import gather_rows, scatter_sums
from carillon.engine.parallel.ring import Parts, Ring
from carillon.engine.parallel.zigzag import Zigzag
from carillon.kernels.table import resolve


class How(NamedTuple):
    """Which processes take part and how, what is seen, and what computes a part."""

    group: dist.ProcessGroup
    ring: Ring
    zigzag: Zigzag
    gathered: bool
    causal: bool
    provider: str | None


class Call(NamedTuple):
    """One use of the op: a range of this share's queries (per row) against some of the keys."""

    queries: slice
    keys: slice
    starts_q: Tensor
    starts_k: Tensor
    causal: bool

    def part_of(self, x_BL: Tensor, which: slice) -> Tensor:
        return x_BL[:, which].flatten(0, 1)

    def lengths(self) -> tuple[Tensor, Tensor, int, int, bool]:
        """What follows q, k and v in the op's arguments. No document is longer than a range."""
        queries, keys = (part.stop - part.start for part in (self.queries, self.keys))
        return self.starts_q, self.starts_k, queries, keys, self.causal


def ring_call(zigzag: Zigzag, owner: int, offsets_BS: Tensor, length: int, causal: bool) -> Call:
    """Against the share of `owner`; `length` is that of a chunk. Under the causal mask half of one
    side is out of sight, so every step of the ring has the same work."""
    own, theirs = ([*zigzag.chunks_of(rank)] for rank in (zigzag.rank, owner))
    queries = keys = slice(0, 2 * length)
    if causal and owner < zigzag.rank:  # their late chunk lies behind both of ours
        keys, theirs = slice(0, length), theirs[:1]
    if causal and owner > zigzag.rank:  # both of theirs lie between ours
        queries, own = slice(length, 2 * length), own[1:]
    starts_q, starts_k = (zigzag.starts(offsets_BS, chunks, length) for chunks in (own, theirs))
    # Of other owners, what is left is wholly in sight.
    return Call(queries, keys, starts_q, starts_k, causal and owner == zigzag.rank)


def whole_calls(zigzag: Zigzag, offsets_BS: Tensor, length: int, causal: bool) -> Iterator[Call]:
    """Against whole rows; `length` is that of a chunk."""
    own = zigzag.chunks_of(zigzag.rank)
    total = 2 * zigzag.size * length
    everything = slice(0, total)
    if not causal:
        starts_q = zigzag.starts(offsets_BS, own, length)
        yield Call(
            slice(0, 2 * length), everything, starts_q, _rows(zigzag, offsets_BS, total), False
        )
        return
    for place, chunk in enumerate(own):
        # Each document is cut at the chunk's end, and what follows has no queries: the op's mask,
        # aligned at the end of queries and keys, is then right.
        end = torch.full_like(offsets_BS[:, :1], (chunk + 1) * length)
        cut = torch.cat([offsets_BS, end], dim=1).sort(dim=1).values
        yield Call(
            slice(place * length, (place + 1) * length),
            everything,
            zigzag.starts(cut, (chunk,), length),
            _rows(zigzag, cut, total),
            True,
        )


def _rows(zigzag: Zigzag, offsets_BS: Tensor, total: int) -> Tensor:
    return zigzag.starts(offsets_BS, (0,), total)


class AttentionByKeys(torch.autograd.Function):
    """This share's queries against all keys, which come in parts (ring) or gathered."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, offsets_BS: Tensor, how: How) -> Tensor:
        op = resolve("packed_attention", q.device, how.provider)
        length = q.shape[1] // 2
        out = torch.zeros_like(q, dtype=torch.float32)
        lse = q.new_full(q.shape[:3], -torch.inf, dtype=torch.float64)

        def attend(call: Call, k: Tensor, v: Tensor) -> None:
            given = call.part_of(q, call.queries), *(call.part_of(x, call.keys) for x in (k, v))
            found, found_lse = op(*given, *call.lengths())
            _merge(
                out[:, call.queries],
                lse[:, call.queries],
                found.view_as(out[:, call.queries]),
                found_lse.T.view_as(lse[:, call.queries]),
            )

        def visit(owner: int, chunk: Parts) -> Parts:
            attend(
                ring_call(how.zigzag, owner, offsets_BS, length, how.causal), chunk["k"], chunk["v"]
            )
            return {}

        if not how.gathered:
            how.ring.around({"k": k, "v": v}, visit, _add)
        else:
            k_all, v_all = _gather(k, v, how)
            for call in whole_calls(how.zigzag, offsets_BS, length, how.causal):
                attend(call, k_all, v_all)
        out = out.to(q.dtype)
        ctx.how = how
        ctx.save_for_backward(q, k, v, offsets_BS, out, lse.float())
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, offsets_BS, out, lse = ctx.saved_tensors
        how: How = ctx.how
        op = resolve("packed_attention_backward", q.device, how.provider)
        length = q.shape[1] // 2
        dq = torch.zeros_like(q, dtype=torch.float32)

        def attend(call: Call, k: Tensor, v: Tensor, dk: Tensor, dv: Tensor) -> None:
            part_q, part_out, part_grad = (
                call.part_of(x, call.queries) for x in (q, out, grad_out)
            )
            part_k, part_v = (call.part_of(x, call.keys) for x in (k, v))
            part_lse = call.part_of(lse, call.queries).T.contiguous()
            grads = op(
                *(part_grad, None, part_q, part_k, part_v, part_out, part_lse), *call.lengths()
            )
            parts = (dq[:, call.queries], dk[:, call.keys], dv[:, call.keys])
            for sums, grad in zip(parts, grads, strict=True):
                sums.add_(grad.view_as(sums))

        def visit(owner: int, chunk: Parts) -> Parts:
            call = ring_call(how.zigzag, owner, offsets_BS, length, how.causal)
            dk, dv = (torch.zeros_like(x, dtype=torch.float32) for x in (k, v))
            attend(call, chunk["k"], chunk["v"], dk, dv)
            return {"k": dk, "v": dv}

        if not how.gathered:
            home = how.ring.around({"k": k, "v": v}, visit, _add)
            dk, dv = home["k"], home["v"]
        else:
            k_all, v_all = _gather(k, v, how)
            dk, dv = (torch.zeros_like(x, dtype=torch.float32) for x in (k_all, v_all))
            for call in whole_calls(how.zigzag, offsets_BS, length, how.causal):
                attend(call, k_all, v_all, dk, dv)
            shares = how.zigzag.part(torch.cat([dk, dv], dim=2))
            dk, dv = scatter_sums(shares, how.group).squeeze(0).chunk(2, dim=2)
        return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype), None, None


def _gather(k: Tensor, v: Tensor, how: How) -> tuple[Tensor, ...]:
    shares = gather_rows(torch.cat([k, v], dim=2).unsqueeze(0), how.group)
    return how.zigzag.join(shares).chunk(2, dim=2)


def _merge(out: Tensor, lse: Tensor, found: Tensor, found_lse: Tensor) -> None:
    """Adds a result over further keys, in place. Shapes: (B, L, H, K) and (B, L, H).

    Every query sees a key of the part that comes first, its own, so no sum is over nothing.
    """
    merged = torch.logaddexp(lse, found_lse.double())
    before, now = (torch.exp(x - merged).float().unsqueeze(-1) for x in (lse, found_lse))
    out.mul_(before).add_(found * now)
    lse.copy_(merged)


def _add(before: Parts, own: Parts) -> Parts:
    return {name: part + own[name] for name, part in before.items()}
