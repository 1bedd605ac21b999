"""Metrics against hand counts, torchmetrics, scikit-learn's tie rule and their own invariances."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torchmetrics.retrieval import RetrievalHitRate, RetrievalMRR, RetrievalNormalizedDCG

from carillon.engine.eval import retrieval
from carillon.engine.eval.retrieval import (
    bootstrap_intervals,
    chance_recall,
    rank_queries,
    retrieval_metrics,
)

# torchmetrics sums in float32, we in float64.
INDEPENDENT_LIBRARY = 1e-6


def _case(seed: int, num_queries: int, num_gallery: int, num_groups: int) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    queries = torch.randn(num_queries, 12, generator=generator)
    gallery = torch.randn(num_gallery, 12, generator=generator)
    gallery_groups = torch.arange(num_gallery) % num_groups
    query_groups = torch.randint(num_groups, (num_queries,), generator=generator)
    return queries, gallery, query_groups, gallery_groups


@pytest.mark.parametrize(("num_gallery", "num_groups"), [(37, 37), (60, 9), (12, 2), (5, 3)])
def test_agrees_with_torchmetrics(num_gallery: int, num_groups: int) -> None:
    queries, gallery, query_groups, gallery_groups = _case(3, 53, num_gallery, num_groups)
    ours = retrieval_metrics(queries, gallery, query_groups, gallery_groups, bootstrap_samples=2)
    unit = torch.nn.functional.normalize
    # torchmetrics leaves items with a score of zero or less out of MRR; a shift keeps the order.
    scores = (unit(queries.double()) @ unit(gallery.double()).T + 1.0).float()
    relevant = query_groups[:, None] == gallery_groups[None]
    rows = torch.arange(len(queries))[:, None].expand_as(scores)
    theirs = {f"r@{k}": RetrievalHitRate(top_k=k) for k in (1, 5, 10)}
    theirs |= {"mrr": RetrievalMRR(), "ndcg@10": RetrievalNormalizedDCG(top_k=10)}
    for name, metric in theirs.items():
        value = float(metric(scores.flatten(), relevant.flatten(), indexes=rows.flatten()))
        assert ours[name]["value"] == pytest.approx(value, abs=INDEPENDENT_LIBRARY), name


def test_hand_counted_ranks() -> None:
    # On a circle the order is the order of angles: the query at 0 sees items at 1, 2, 3, 4 degrees.
    angles = torch.tensor([1.0, 2.0, 3.0, 4.0]).deg2rad()
    gallery = torch.stack([angles.cos(), angles.sin()], dim=1)
    query = torch.tensor([[1.0, 0.0]])
    ranks = rank_queries(query, gallery, torch.tensor([7]), torch.tensor([1, 7, 2, 7]))
    assert ranks.first_rank.tolist() == [2]
    assert ranks.num_relevant.tolist() == [2]
    gain = 1 / math.log2(3) + 1 / math.log2(5)
    ideal = 1 + 1 / math.log2(3)
    assert float(ranks.ndcg) == pytest.approx(gain / ideal, abs=1e-12)


def test_a_constant_model_scores_nothing() -> None:
    constant = torch.ones(40, 8)
    groups = torch.arange(40)
    scores = retrieval_metrics(constant, constant, groups, groups, bootstrap_samples=5)
    assert scores["r@10"]["value"] == 0.0
    assert scores["mrr"]["value"] == pytest.approx(1 / 40)
    assert scores["ndcg@10"]["value"] == 0.0


def test_rounding_noise_does_not_break_a_tie_in_our_favour() -> None:
    # The right item comes out ahead by less than the order of summation could make.
    gallery = torch.ones(3, 4, dtype=torch.float64)
    gallery[0, 0] += 1e-12
    query = torch.tensor([[1.0, 0.0, 0.0, 0.0]], dtype=torch.float64)
    ranks = rank_queries(query, gallery, torch.tensor([0]), torch.arange(3))
    assert ranks.first_rank.tolist() == [3]


def test_a_perfect_model_scores_one() -> None:
    rows, groups = torch.eye(30), torch.arange(30)
    scores = retrieval_metrics(rows, rows, groups, groups, bootstrap_samples=5)
    for name in ("r@1", "r@5", "r@10", "mrr", "ndcg@10"):
        assert scores[name] | {"value": 1.0, "low": 1.0, "high": 1.0} == scores[name]
    assert scores["r@1"]["times_chance"] == pytest.approx(30)


def test_equal_names_count_as_right() -> None:
    gallery = torch.eye(4)
    ranks = rank_queries(gallery[[0]], gallery[[1, 0]], torch.tensor([5]), torch.tensor([5, 5]))
    assert ranks.first_rank.tolist() == [1]
    assert float(ranks.ndcg) == pytest.approx(1.0, abs=1e-12)


def test_block_size_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    case = _case(5, 23, 31, 6)
    whole = rank_queries(*case)
    monkeypatch.setattr(retrieval, "MAX_BLOCK_ELEMENTS", 70)
    for one, other in zip(whole, rank_queries(*case), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)


def test_autocast_does_not_touch_the_ranks() -> None:
    case = _case(6, 40, 300, 300)
    plain = rank_queries(*case)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = rank_queries(*case)
    assert torch.equal(plain.first_rank, cast.first_rank)


@given(seed=st.integers(0, 2**16), scale=st.floats(0.01, 100.0))
@settings(max_examples=25, deadline=None)
def test_order_and_scale_of_the_gallery_do_not_matter(seed: int, scale: float) -> None:
    queries, gallery, query_groups, gallery_groups = _case(seed, 9, 14, 5)
    order = torch.randperm(14, generator=torch.Generator().manual_seed(seed))
    plain = rank_queries(queries, gallery, query_groups, gallery_groups)
    moved = rank_queries(queries * scale, gallery[order], query_groups, gallery_groups[order])
    assert torch.equal(plain.first_rank, moved.first_rank)
    torch.testing.assert_close(plain.ndcg, moved.ndcg, rtol=0, atol=1e-12)


@given(seed=st.integers(0, 2**16))
@settings(max_examples=25, deadline=None)
def test_metrics_are_ordered_and_bounded(seed: int) -> None:
    scores = retrieval_metrics(*_case(seed, 8, 15, 4), bootstrap_samples=20)
    assert scores["r@1"]["value"] <= scores["r@5"]["value"] <= scores["r@10"]["value"] <= 1
    assert scores["r@1"]["value"] <= scores["mrr"]["value"] <= 1
    for name in ("r@1", "r@10", "mrr", "ndcg@10"):
        assert 0 <= scores[name]["low"] <= scores[name]["high"] <= 1


@given(num_gallery=st.integers(1, 40), data=st.data())
@settings(max_examples=60, deadline=None)
def test_chance_is_the_hypergeometric_formula(num_gallery: int, data: st.DataObject) -> None:
    relevant = data.draw(st.lists(st.integers(1, num_gallery), min_size=1, max_size=4))
    k = data.draw(st.integers(1, 50))
    drawn = min(k, num_gallery)
    expected = np.mean(
        [1 - math.comb(num_gallery - g, drawn) / math.comb(num_gallery, drawn) for g in relevant]
    )
    assert chance_recall(torch.tensor(relevant), num_gallery, k) == pytest.approx(expected)


def test_chance_matches_random_embeddings() -> None:
    generator = torch.Generator().manual_seed(0)
    queries = torch.randn(4000, 16, generator=generator)
    gallery = torch.randn(60, 16, generator=generator)
    scores = retrieval_metrics(queries, gallery, torch.arange(4000) % 20, torch.arange(60) % 20)
    # Three right items of 60, ten drawn: 0.43; queries share one gallery, so a few points of noise.
    assert scores["r@10"]["chance"] == pytest.approx(0.4270, abs=5e-4)
    assert scores["r@10"]["times_chance"] == pytest.approx(1.0, abs=0.1)


def test_bootstrap_interval_of_a_coin_is_the_normal_one() -> None:
    values = (torch.arange(400) % 2).double()[:, None]
    ((low, high),) = bootstrap_intervals(values, torch.arange(400), samples=4000, seed=1)
    # Standard error 0.025; 4,000 samples place a quantile to about 0.002.
    assert low == pytest.approx(0.5 - 1.96 * 0.025, abs=0.004)
    assert high == pytest.approx(0.5 + 1.96 * 0.025, abs=0.004)
    again = bootstrap_intervals(values, torch.arange(400), samples=4000, seed=1)
    assert again == [(low, high)]


def test_bootstrap_resamples_whole_groups() -> None:
    values = (torch.arange(500) // 5 % 2).double()[:, None]
    ((low, high),) = bootstrap_intervals(values, torch.arange(500) // 5, samples=4000, seed=1)
    # 100 independent groups, not 500 queries: the standard error is 0.05.
    assert high - low == pytest.approx(2 * 1.96 * 0.05, abs=0.015)


@pytest.mark.parametrize(
    ("row", "message"), [(float("nan"), "NaN"), (float("inf"), "infinity"), (0.0, "zero vector")]
)
def test_broken_embeddings_are_refused(row: float, message: str) -> None:
    queries, gallery, query_groups, gallery_groups = _case(1, 6, 6, 6)
    gallery[4] = row
    with pytest.raises(ValueError, match=rf"gallery: 1 of 6 .*{message}.*row 4"):
        rank_queries(queries, gallery, query_groups, gallery_groups)


def test_misfits_are_refused() -> None:
    queries, gallery, query_groups, gallery_groups = _case(1, 6, 6, 6)
    with pytest.raises(ValueError, match="12 dims but the gallery has 11"):
        rank_queries(queries, gallery[:, :-1], query_groups, gallery_groups)
    with pytest.raises(ValueError, match="expected 6 integers"):
        rank_queries(queries, gallery, query_groups[:-1], gallery_groups)
    with pytest.raises(ValueError, match="nothing right in the gallery"):
        rank_queries(queries, gallery, query_groups, gallery_groups + 100)
    with pytest.raises(ValueError, match="expected a matrix"):
        rank_queries(queries[:0], gallery, query_groups[:0], gallery_groups)
