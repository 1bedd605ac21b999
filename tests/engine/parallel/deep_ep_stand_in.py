"""A stand-in for the package deep_ep: the same signatures and meanings, by collectives on CPU.

From the docstrings of DeepEP's deep_ep/buffer.py. Unlike the package it takes float32, so that what
is sent through it can be compared to 1e-5.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


class Config:
    def get_nvl_buffer_size_hint(self, hidden_bytes: int, num_ranks: int) -> int:
        return hidden_bytes * num_ranks

    def get_rdma_buffer_size_hint(self, hidden_bytes: int, num_ranks: int) -> int:
        return 0


class Buffer:
    def __init__(self, group: Any, num_nvl_bytes: int = 0, num_rdma_bytes: int = 0) -> None:
        assert num_nvl_bytes > 0
        assert num_rdma_bytes == 0
        self.group, self.size = group, dist.get_world_size(group)

    @staticmethod
    def get_dispatch_config(num_ranks: int) -> Config:
        return Config()

    @staticmethod
    def get_combine_config(num_ranks: int) -> Config:
        return Config()

    def get_dispatch_layout(self, topk_idx: Tensor, num_experts: int) -> tuple[Any, ...]:
        assert topk_idx.dtype is torch.int64
        own = num_experts // self.size
        ranks = torch.where(topk_idx >= 0, topk_idx // own, -1)
        in_rank = torch.stack([(ranks == rank).any(1) for rank in range(self.size)], dim=1)
        chosen = topk_idx[topk_idx >= 0]
        per_expert = torch.bincount(chosen, minlength=num_experts).int()
        return in_rank.sum(0).int(), None, per_expert, in_rank, None

    def dispatch(
        self,
        x: Tensor,
        handle: Any = None,
        num_tokens_per_rank: Tensor | None = None,
        num_tokens_per_rdma_rank: Tensor | None = None,
        is_token_in_rank: Tensor | None = None,
        num_tokens_per_expert: Tensor | None = None,
        topk_idx: Tensor | None = None,
        topk_weights: Tensor | None = None,
    ) -> tuple[Any, ...]:
        if handle is not None:
            assert topk_idx is None
            assert topk_weights is None
            tokens, send, receive, _ = handle
            return self._send(x[tokens], send, receive), None, None, None, None, None
        assert num_tokens_per_rank is not None
        assert num_tokens_per_rdma_rank is None
        assert is_token_in_rank is not None
        assert num_tokens_per_expert is not None
        assert topk_idx is not None
        assert topk_weights is not None
        assert topk_weights.dtype is torch.float32
        own = len(num_tokens_per_expert) // self.size
        counts = torch.empty_like(num_tokens_per_rank)
        dist.all_to_all_single(counts, num_tokens_per_rank, group=self.group)
        send, receive = num_tokens_per_rank.tolist(), counts.tolist()
        to_rank, tokens = is_token_in_rank.t().nonzero(as_tuple=True)
        indices = topk_idx[tokens] - to_rank[:, None] * own
        theirs = (indices >= 0) & (indices < own) & (topk_idx[tokens] >= 0)
        indices, weights = indices.where(theirs, -1), topk_weights[tokens].where(theirs, 0.0)
        received = [self._send(rows, send, receive) for rows in (x[tokens], indices, weights)]
        per_expert = [int((received[1] == expert).sum()) for expert in range(own)]
        return *received, per_expert, (tokens, send, receive, len(x)), None

    def combine(
        self, x: Tensor, handle: Any, topk_weights: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None, None]:
        tokens, send, receive, num_tokens = handle

        def home(rows: Tensor) -> Tensor:
            sums = rows.new_zeros(num_tokens, rows.shape[1])
            return sums.index_add(0, tokens, self._send(rows, receive, send))

        return home(x), None if topk_weights is None else home(topk_weights), None

    def _send(self, rows: Tensor, send: list[int], receive: list[int]) -> Tensor:
        received = rows.new_empty((sum(receive), *rows.shape[1:]))
        dist.all_to_all_single(received, rows.contiguous(), receive, send, group=self.group)
        return received
