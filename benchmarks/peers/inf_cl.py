"""Inf-CL's algorithm on torch's operators: what it computes and in which order, not its code.

20 N^2 D FLOPs. Each direction is a loss of its own: a forward pass over tiles keeps a running
log-sum-exp (2 N^2 D), the backward pass computes the logits anew for the gradient of the queries
(4) and once more for that of the keys (4). Nothing of size N x N is held.
Its tiles are of 64 x 64 on a GPU. Here a tile costs some calls of torch, so they are larger, which
is faster: with tiles of 64 most of the time would be torch's calls and not the algorithm.
Source: Cheng et al. 2024, Breaking the Memory Barrier (arXiv 2410.17243), section 3.
"""

from typing import Any

import torch
from torch import Tensor

TILE = 512


def loss(image: Tensor, text: Tensor, scale: Tensor) -> Tensor:
    """Shapes: (N, D), (N, D), (1,) -> (), the mean of both directions' cross-entropy."""
    return (_direction(image, text, scale) + _direction(text, image, scale)) / 2


def _direction(queries: Tensor, keys: Tensor, scale: Tensor) -> Tensor:
    losses: Tensor = _Direction.apply(queries * scale.to(queries.dtype), keys)
    return losses.mean()


class _Direction(torch.autograd.Function):
    """Cross-entropy of each query among all keys, where query i matches key i."""

    @staticmethod
    def forward(context: Any, queries_ND: Tensor, keys_ND: Tensor) -> Tensor:
        lse_N = queries_ND.new_full((len(queries_ND),), float("-inf"), dtype=torch.float32)
        for rows in _tiles(queries_ND):
            for columns in _tiles(keys_ND):
                logits = (queries_ND[rows] @ keys_ND[columns].T).float()
                lse_N[rows] = torch.logaddexp(lse_N[rows], logits.logsumexp(1))
        context.save_for_backward(queries_ND, keys_ND, lse_N)
        return lse_N - (queries_ND * keys_ND).sum(1, dtype=torch.float32)

    @staticmethod
    def backward(context: Any, grad_N: Tensor) -> tuple[Tensor, Tensor]:
        queries_ND, keys_ND, lse_N = context.saved_tensors
        grad_queries = torch.zeros_like(queries_ND, dtype=torch.float32)
        grad_keys = torch.zeros_like(keys_ND, dtype=torch.float32)

        def weights(rows: slice, columns: slice) -> Tensor:
            logits = (queries_ND[rows] @ keys_ND[columns].T).float()
            share = logits.sub_(lse_N[rows, None]).exp_().mul_(grad_N[rows, None])
            return share.to(queries_ND.dtype)

        for rows in _tiles(queries_ND):
            for columns in _tiles(keys_ND):
                grad_queries[rows] += weights(rows, columns) @ keys_ND[columns]
        for columns in _tiles(keys_ND):
            for rows in _tiles(queries_ND):
                grad_keys[columns] += weights(rows, columns).T @ queries_ND[rows]
        grad_queries -= grad_N[:, None] * keys_ND
        grad_keys -= grad_N[:, None] * queries_ND
        return grad_queries.to(queries_ND.dtype), grad_keys.to(keys_ND.dtype)


def _tiles(features_ND: Tensor) -> list[slice]:
    starts = range(0, len(features_ND), TILE)
    return [slice(start, min(start + TILE, len(features_ND))) for start in starts]
