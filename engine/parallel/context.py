"""Attention over packed rows of which each process holds a share of the tokens.

Three ways, one result, that of packed_attention over whole rows:
- ulysses: an all-to-all turns shares of the tokens into shares of the heads and back. Least
  traffic; at most as many processes as query heads. Key heads that cp does not divide are repeated.
- ring: keys and values travel around the ring while this process works on those that it holds.
  Memory is that of a share, for any number of heads; the exchange hides behind long chunks.
- all_gather: keys and values of whole rows are gathered for one attention, and again for its
  backward pass: between the passes only the share is kept. Few large messages, none of them hidden.
The last two are in context_keys.py, the cut of the rows in zigzag.py. The result is deterministic;
differentiable once. What else of a decoder looks at whole rows is the routers' balancing loss: it
takes the slots of a row from all of its processes. Left out: capacity of experts, which drops
tokens by their order in the whole row (refused when the config is loaded).
Source: Jacobs et al. 2023 (DeepSpeed-Ulysses); Liu et al. 2023 (Ring Attention); Llama team 2024
(Llama 3), section 3.3.2, for all_gather.
Status: runs on CPU with gloo; CUDA with NCCL has not run on a GPU yet.

Legend: B rows, L tokens of a share, S starts of documents and the end, H heads, G key heads, K
head_dim.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn

from carillon.engine.nn.packed_self_attention import PackedSelfAttention
from carillon.engine.nn.router import Router
from carillon.engine.parallel.collectives import exchange_blocks, sum_over
from carillon.engine.parallel.config import ContextMethod
from carillon.engine.parallel.context_keys import AttentionByKeys, How
from carillon.engine.parallel.ring import Ring
from carillon.engine.parallel.zigzag import Zigzag
from carillon.kernels.table import resolve


class ContextAttention:
    """The core of an attention block on one of the processes of `group`; keeps no state."""

    def __init__(
        self,
        method: ContextMethod,
        group: dist.ProcessGroup,
        *,
        causal: bool = True,
        provider: str | None = None,
    ) -> None:
        self.method = method
        self.causal = causal
        self._ring = Ring(group)
        self._group = group
        self._zigzag = Zigzag(self._ring.size, self._ring.rank)
        self._provider = provider

    # Sends and receives cannot be traced; the rest of a compiled block still is.
    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def __call__(
        self, q_BLHK: Tensor, k_BLGK: Tensor, v_BLGK: Tensor, offsets_BS: Tensor
    ) -> Tensor:
        """This share's part of attention over whole rows: documents of `offsets_BS`, each for
        itself. Shapes: as q -> as q."""
        if self.method == "ulysses":
            return self._by_heads(q_BLHK, k_BLGK, v_BLGK, offsets_BS)
        how = How(
            group=self._group,
            ring=self._ring,
            zigzag=self._zigzag,
            gathered=self.method == "all_gather",
            causal=self.causal,
            provider=self._provider,
        )
        out: Tensor = AttentionByKeys.apply(q_BLHK, k_BLGK, v_BLGK, offsets_BS, how)  # type: ignore[no-untyped-call]
        return out

    def _by_heads(self, q: Tensor, k: Tensor, v: Tensor, offsets_BS: Tensor) -> Tensor:
        size, heads = self._ring.size, q.shape[2]
        repeats = _key_repeats(heads, k.shape[2], size)
        if repeats > 1:
            k, v = (x.repeat_interleave(repeats, dim=2) for x in (k, v))
        sizes = [x.shape[2] // size for x in (q, k, v)]
        # One message: the heads of each process, those of q, k and v one after another.
        shares = torch.cat([torch.unflatten(x, 2, (size, -1)) for x in (q, k, v)], dim=3)
        arrived = exchange_blocks(shares.movedim(2, 0), self._group)
        q, k, v = self._zigzag.join(arrived).split(sizes, dim=2)  # type: ignore[no-untyped-call]
        batch, length = q.shape[:2]
        starts = self._zigzag.starts(offsets_BS, (0,), length)
        out, _ = resolve("packed_attention", q.device, self._provider)(
            *(x.flatten(0, 1) for x in (q, k, v)), starts, starts, length, length, self.causal
        )
        home = exchange_blocks(
            self._zigzag.part(out.view(batch, length, *out.shape[1:])), self._group
        )
        return home.movedim(0, 2).flatten(2, 3)


def _key_repeats(heads: int, key_heads: int, size: int) -> int:
    """How often key heads are repeated so that `size` divides them, still in the order of the
    query heads that read them; at most one for each query head."""
    group = heads // key_heads
    return next(n for n in range(1, group + 1) if group % n == 0 and key_heads * n % size == 0)


def share_context(model: nn.Module, method: ContextMethod, group: dist.ProcessGroup) -> None:
    """Let `model` work on this process's share of the tokens, in place."""
    core = ContextAttention(method, group)

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def sum_over_row(slots_BE: Tensor) -> Tensor:
        return sum_over(slots_BE.clone(), group)

    for module in model.modules():
        if isinstance(module, PackedSelfAttention):
            module.core = core
        if isinstance(module, Router):
            module.sum_over_row = sum_over_row
