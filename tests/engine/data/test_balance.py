"""Dealing a batch over data ranks: even, exact, and the same batch and loss."""

import itertools

import numpy as np
import pytest
import torch

from carillon.engine.data.balance import deal, imbalance
from carillon.engine.data.packed_rows import PackedRows
from carillon.engine.models.towers.decoder import build_decoder
from carillon.engine.models.towers.decoder_config import DecoderConfig
from carillon.engine.train.language_step import language_forward_backward


@pytest.mark.parametrize(("num_ranks", "share"), [(1, 5), (2, 8), (4, 32), (8, 1), (3, 0)])
def test_each_sample_is_dealt_once_and_each_rank_gets_as_many(num_ranks: int, share: int) -> None:
    costs = np.random.default_rng(0).integers(1, 100, num_ranks * share).tolist()
    dealt = deal(costs, num_ranks)
    assert [len(own) for own in dealt] == [share] * num_ranks
    assert sorted(itertools.chain(*dealt)) == list(range(len(costs)))
    assert all(own == sorted(own) for own in dealt)


def test_known_costs() -> None:
    assert deal([9, 1, 1, 1, 8, 2], 2) == [[0, 1, 2], [3, 4, 5]]
    assert deal([5, 5, 5, 5], 2) == [[0, 2], [1, 3]]  # ties by index
    assert imbalance([9, 1, 1, 1, 8, 2], [[0, 1, 2], [3, 4, 5]]) == 1
    assert imbalance([3, 1], [[0], [1]]) == 1.5


def test_it_is_near_the_best_of_all_ways() -> None:
    """Graham's bound without the condition of equal numbers is 4/3 - 1/(3 ranks)."""
    generator = np.random.default_rng(1)
    for _ in range(20):
        costs = (generator.lognormal(0, 1, 8) * 100).astype(int).tolist()
        ways = itertools.combinations(range(8), 4)
        best = min(imbalance(costs, [way, sorted(set(range(8)) - set(way))]) for way in ways)
        assert imbalance(costs, deal(costs, 2)) <= (4 / 3 - 1 / 6) * best


def test_costs_of_many_sizes_come_out_even() -> None:
    costs = (np.random.default_rng(2).lognormal(3, 0.7, 8 * 64) ** 2).tolist()
    in_order = [range(64 * rank, 64 * rank + 64) for rank in range(8)]
    assert imbalance(costs, in_order) > 1.15
    assert imbalance(costs, deal(costs, 8)) < 1.01


@pytest.mark.parametrize(("num", "ranks"), [(5, 2), (4, 0), (1, 3)])
def test_what_does_not_divide_is_refused(num: int, ranks: int) -> None:
    with pytest.raises(ValueError, match=f"{num} samples do not divide over {ranks} ranks"):
        deal([1.0] * num, ranks)


OFFSETS = torch.tensor(
    [[0, 16, 16, 16, 16], [0, 4, 8, 12, 16], [0, 15, 16, 16, 16], [0, 8, 9, 10, 16]]
)


def test_attention_pairs_are_counted_one_by_one() -> None:
    rows = PackedRows.of(torch.zeros(4, 16, dtype=torch.long), OFFSETS)
    allowed = [
        sum(place + 1 for place in own) for own in rows.positions.tolist()
    ]  # a token sees those before it in its document, and itself
    assert rows.attention_pairs().tolist() == allowed


def test_dealt_rows_are_the_same_batch_and_loss() -> None:
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, 50, (4, 16), generator=generator)
    rows = PackedRows.of(tokens, OFFSETS)
    config = DecoderConfig(width=16, depth=1, num_heads=2, num_kv_heads=1, mlp_width=32)

    def step(parts: list[PackedRows]) -> tuple[float, list[torch.Tensor]]:
        model = build_decoder(config, vocab_size=50, generator=torch.Generator().manual_seed(1))
        joined = PackedRows(*(torch.cat(part) for part in zip(*parts, strict=True)))
        loss = language_forward_backward(
            model,
            joined,
            len(parts),
            world=None,
            autocast=lambda: torch.autocast("cpu", enabled=False),
        )
        return float(loss), [p.grad for p in model.parameters() if p.grad is not None]

    parts = rows.deal(2)
    pairs = [int(part.attention_pairs().sum()) for part in parts]
    assert max(pairs) / sum(pairs) * 2 < 1.2
    (loss, gradients), (dealt_loss, dealt_gradients) = step(rows.split(2)), step(parts)
    assert dealt_loss == pytest.approx(loss, rel=1e-6)
    assert len(gradients) == len(dealt_gradients) > 0
    for one, other in zip(gradients, dealt_gradients, strict=True):
        assert float((one - other).norm()) <= 1e-5 * max(float(one.norm()), 1e-3)
