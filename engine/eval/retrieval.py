"""Retrieval metrics on embeddings: hit rate R@k, MRR and nDCG@10, with intervals and chance levels.

Relevance is given by group ids: a gallery item is right for a query when their groups are equal,
so several captions of one picture, or several pictures of one name, all count. Scores are
products of unit vectors in float64, one block of queries at a time: the full matrix never exists,
and neither autocast nor a tf32 setting can change a rank. Ties are broken against the model: among
scores closer than TIE_MARGIN the right item stands last, so a constant model scores 0, not 1.
Intervals are percentile bootstraps that resample whole groups of queries, because five captions
of one picture are not five independent trials. Graded relevance is left out.

Legend: Q queries, M gallery items, D dims, B block of queries, S bootstrap samples, C clusters.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from carillon.engine.config import UserError

RECALL_AT = (1, 5, 10)
NDCG_AT = 10
# Products of float32 vectors summed in float64 differ by about 1e-16 with the order of summation.
TIE_MARGIN = 1e-9
# Scores held at once: 32 MB a buffer in float64.
MAX_BLOCK_ELEMENTS = 1 << 22


class QueryRanks(NamedTuple):
    """Per query (Q,): rank (from 1) of the best right item, nDCG@10, number of right items."""

    first_rank: Tensor
    ndcg: Tensor
    num_relevant: Tensor


def unit_rows(embeddings: Tensor, name: str) -> Tensor:
    """Check a matrix of embeddings and return it as float64 rows of unit length.

    Shapes: (N, D) -> (N, D).
    Raises: ValueError when it is no matrix or empty, UserError for NaN, infinity or a zero row.
    """
    if embeddings.ndim != 2 or 0 in embeddings.shape:
        raise ValueError(f"{name}: expected a matrix (items, dims), got {tuple(embeddings.shape)}")
    rows = embeddings.detach().to(torch.float64)
    norms = rows.norm(dim=1)
    for bad, what in ((~torch.isfinite(norms), "NaN or infinity"), (norms == 0, "a zero vector")):
        if bad.any():
            first = int(bad.nonzero()[0, 0])
            raise UserError(
                f"{name}: {int(bad.sum())} of {len(rows)} embeddings hold {what}, "
                f"the first is row {first}; no score is defined for them"
            )
    units: Tensor = rows / norms[:, None]
    return units


def rank_queries(
    queries: Tensor, gallery: Tensor, query_groups: Tensor, gallery_groups: Tensor
) -> QueryRanks:
    """Rank the gallery for every query, one block of queries at a time.

    Shapes: queries (Q, D), gallery (M, D), query_groups (Q,), gallery_groups (M,) integers.
    Raises: ValueError for embeddings without a score, groups that do not fit, or a query for
    which nothing in the gallery is right.
    """
    queries_QD, gallery_MD = unit_rows(queries, "queries"), unit_rows(gallery, "gallery")
    if queries_QD.shape[1] != gallery_MD.shape[1]:
        raise ValueError(
            f"queries have {queries_QD.shape[1]} dims but the gallery has {gallery_MD.shape[1]}"
        )
    groups_Q = _check_groups(query_groups, queries_QD, "query_groups")
    groups_M = _check_groups(gallery_groups, gallery_MD, "gallery_groups")
    size = max(1, MAX_BLOCK_ELEMENTS // len(gallery_MD))
    blocks = [
        _rank_block(
            queries_QD[start : start + size] @ gallery_MD.T,
            groups_Q[start : start + size, None] == groups_M[None],
        )
        for start in range(0, len(queries_QD), size)
    ]
    ranks = QueryRanks(*(torch.cat(parts) for parts in zip(*blocks, strict=True)))
    if (ranks.num_relevant == 0).any():
        lost = int((ranks.num_relevant == 0).nonzero()[0, 0])
        raise ValueError(
            f"query {lost} (group {int(groups_Q[lost])}) has nothing right in the gallery: "
            "give it an item of its group or leave the query out"
        )
    return ranks


def _check_groups(groups: Tensor, rows: Tensor, name: str) -> Tensor:
    if groups.shape != (len(rows),) or groups.is_floating_point():
        raise ValueError(
            f"{name}: expected {len(rows)} integers, got {tuple(groups.shape)} of {groups.dtype}"
        )
    return groups.to(rows.device)


def _rank_block(scores_BM: Tensor, relevant_BM: Tensor) -> QueryRanks:
    """Pessimistic ranks: a wrong item within TIE_MARGIN of a right one stands before it."""
    depth = min(NDCG_AT, scores_BM.shape[1])
    nothing = float("-inf")
    right_BK = scores_BM.masked_fill(~relevant_BM, nothing).topk(depth, dim=1).values
    wrong_BM = scores_BM.masked_fill(relevant_BM, nothing)
    limit_BK = right_BK - TIE_MARGIN
    first_B = 1 + (wrong_BM >= limit_BK[:, :1]).sum(dim=1)
    # Past ten better wrong items a right one is outside nDCG@10, so the ten best suffice.
    wrong_BK = wrong_BM.topk(depth, dim=1).values
    order_K = torch.arange(1, depth + 1, device=scores_BM.device)
    position_BK = order_K + (wrong_BK[:, None, :] >= limit_BK[:, :, None]).sum(dim=2)
    counted_BK = torch.isfinite(right_BK) & (position_BK <= NDCG_AT)
    gain_B = ((1.0 / torch.log2(1.0 + position_BK.double())) * counted_BK).sum(dim=1)
    ideal_K = (1.0 / torch.log2(1.0 + order_K.double())).cumsum(dim=0)
    num_B = relevant_BM.sum(dim=1)
    ideal_B = ideal_K[(num_B.clamp(1, depth) - 1)]
    return QueryRanks(first_B, gain_B / ideal_B, num_B)


def chance_recall(num_relevant_Q: Tensor, num_gallery: int, k: int) -> float:
    """Expected R@k of a random ranking: the mean over queries of 1 - C(M-g, k) / C(M, k).

    Source: the hypergeometric distribution; g right items among M, k drawn without replacement.
    """
    g_Q = num_relevant_Q.to(torch.float64)
    drawn = torch.arange(min(k, num_gallery), dtype=torch.float64, device=g_Q.device)
    miss_QK = (num_gallery - g_Q[:, None] - drawn).clamp(min=0) / (num_gallery - drawn)
    return float((1.0 - miss_QK.prod(dim=1)).mean())


def bootstrap_intervals(
    values: Tensor, clusters: Tensor, *, samples: int = 1000, seed: int = 0, level: float = 0.95
) -> list[tuple[float, float]]:
    """Percentile bootstrap intervals of the mean of each column, resampling whole clusters.

    Shapes: values (Q, number of metrics), clusters (Q,) integers.
    Raises: ValueError when samples is below 1 or level outside (0, 1).
    """
    if samples < 1 or not 0.0 < level < 1.0:
        raise ValueError(f"needs samples >= 1 and 0 < level < 1, got {samples} and {level}")
    _, cluster_Q = np.unique(clusters.cpu().numpy(), return_inverse=True)
    values_QV = values.detach().to("cpu", torch.float64).numpy()
    num_clusters = int(cluster_Q.max()) + 1
    sums = np.zeros((num_clusters, values_QV.shape[1] + 1))
    np.add.at(sums, cluster_Q, np.column_stack([values_QV, np.ones(len(values_QV))]))
    totals = np.concatenate([w @ sums for w in _resampled_counts(num_clusters, samples, seed)])
    means_SV = totals[:, :-1] / totals[:, -1:]
    tail = (1.0 - level) / 2
    low, high = np.quantile(means_SV, [tail, 1.0 - tail], axis=0)
    return [(float(a), float(b)) for a, b in zip(low, high, strict=True)]


def _resampled_counts(num_clusters: int, samples: int, seed: int) -> Iterator[np.ndarray]:
    """Yield blocks of rows that say how often each cluster was drawn in one bootstrap sample."""
    generator = np.random.default_rng(seed)
    size = max(1, MAX_BLOCK_ELEMENTS // num_clusters)
    for start in range(0, samples, size):
        rows = min(size, samples - start)
        drawn = generator.integers(num_clusters, size=(rows, num_clusters))
        flat = (drawn + np.arange(rows)[:, None] * num_clusters).ravel()
        counts = np.bincount(flat, minlength=rows * num_clusters)
        yield counts.reshape(rows, num_clusters).astype(np.float64)


def retrieval_metrics(
    queries: Tensor,
    gallery: Tensor,
    query_groups: Tensor,
    gallery_groups: Tensor,
    *,
    bootstrap_samples: int = 1000,
    seed: int = 0,
) -> dict[str, Any]:
    """All metrics of one direction as a JSON-able dict.

    Keys: num_queries, num_gallery; r@1, r@5, r@10, mrr and ndcg@10, each with value and the 95%
    interval (low, high); r@k also with chance and times_chance.
    Raises: as rank_queries.
    """
    ranks = rank_queries(queries, gallery, query_groups, gallery_groups)
    first_Q = ranks.first_rank
    columns = {f"r@{k}": (first_Q <= k).double() for k in RECALL_AT}
    columns |= {"mrr": 1.0 / first_Q.double(), f"ndcg@{NDCG_AT}": ranks.ndcg}
    values_QV = torch.stack(list(columns.values()), dim=1)
    bounds = bootstrap_intervals(values_QV, query_groups, samples=bootstrap_samples, seed=seed)
    result: dict[str, Any] = {"num_queries": len(queries), "num_gallery": len(gallery)}
    for name, mean, (low, high) in zip(columns, values_QV.mean(dim=0), bounds, strict=True):
        result[name] = {"value": float(mean), "low": low, "high": high}
    for k in RECALL_AT:
        chance = chance_recall(ranks.num_relevant, len(gallery), k)
        entry = result[f"r@{k}"]
        entry |= {"chance": chance, "times_chance": entry["value"] / chance}
    return result
