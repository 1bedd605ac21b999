"""Packed batches, and packed attention written out in float64 over one dense mask."""

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Arguments of packed_attention, and gradients of its results to go back with."""

    q: Tensor
    k: Tensor
    v: Tensor
    lengths_q: tuple[int, ...]
    lengths_k: tuple[int, ...]
    causal: bool = False
    prefixes: tuple[int, ...] | None = None
    scale: float | None = None
    grad_out: Tensor
    grad_lse: Tensor

    def arguments(self) -> tuple[object, ...]:
        """All that follows q, k and v."""
        device = self.q.device
        prefixes = None if self.prefixes is None else torch.tensor(self.prefixes, device=device)
        most = (max(self.lengths_q, default=0), max(self.lengths_k, default=0))
        starts = (_starts(self.lengths_q).int().to(device), _starts(self.lengths_k).to(device))
        return (*starts, *most, self.causal, prefixes, self.scale)

    def definition(self) -> tuple[Tensor, ...]:
        """out, lse, dq, dk and dv in float64, on the CPU."""
        inputs = (self.q, self.k, self.v)
        q, k, v = (x.detach().cpu().double().requires_grad_() for x in inputs)
        mask = self._mask()
        group = q.shape[1] // k.shape[1]
        scores = torch.einsum("qhd,khd->hqk", q, k.repeat_interleave(group, 1))
        scores = scores * (q.shape[2] ** -0.5 if self.scale is None else self.scale)
        rows = mask.any(1)  # softmax of the others has no value: out is 0 and lse -inf
        seen = scores[:, rows].masked_fill(~mask[rows], -torch.inf)
        some = torch.einsum("hqk,khd->qhd", seen.softmax(2), v.repeat_interleave(group, 1))
        out = torch.zeros_like(q).index_put((rows.nonzero()[:, 0],), some)
        lse = torch.full(scores.shape[:2], -torch.inf, dtype=torch.float64)
        lse[:, rows] = seen.logsumexp(2)
        grad_lse = self.grad_lse.cpu().double()
        kept = torch.where(torch.isfinite(lse), grad_lse * lse, 0.0).sum()
        loss = (self.grad_out.cpu().double() * out).sum() + kept
        grads = torch.autograd.grad(loss, [q, k, v])
        return out.detach(), lse.detach(), *grads

    def _mask(self) -> Tensor:
        mask = torch.zeros(sum(self.lengths_q), sum(self.lengths_k), dtype=torch.bool)
        row = key = 0
        for s, (l, m) in enumerate(zip(self.lengths_q, self.lengths_k, strict=True)):  # noqa: E741
            own = torch.ones(l, m, dtype=torch.bool)
            if self.causal:
                own = own.tril(m - l)
                own[:, : self.prefixes[s] if self.prefixes else 0] = True
            mask[row : row + l, key : key + m] = own
            row, key = row + l, key + m
        return mask


def _starts(lengths: tuple[int, ...]) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0)


@pytest.fixture
def new_batch() -> Callable[..., Batch]:
    def make(
        lengths_q: tuple[int, ...],
        lengths_k: tuple[int, ...] | None = None,
        *,
        heads: tuple[int, int] = (2, 2),
        head_dim: int = 64,
        dtype: torch.dtype = torch.float32,
        size: float = 1.0,
        device: str = "cpu",
        **mask: object,
    ) -> Batch:
        lengths_k = lengths_q if lengths_k is None else lengths_k
        generator = torch.Generator().manual_seed(11)

        def draw(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator).clamp(-4, 4).to(device)

        q_shape = (sum(lengths_q), heads[0], head_dim)
        k_shape = (sum(lengths_k), heads[1], head_dim)
        return Batch(
            q=(draw(*q_shape) * size).to(dtype),
            k=draw(*k_shape).to(dtype),
            v=draw(*k_shape).to(dtype),
            lengths_q=lengths_q,
            lengths_k=lengths_k,
            grad_out=draw(*q_shape).to(dtype),
            grad_lse=draw(heads[0], sum(lengths_q)),
            **mask,  # type: ignore[arg-type]
        )

    return make
