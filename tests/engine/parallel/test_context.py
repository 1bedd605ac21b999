"""Context parallelism: whole rows' attention and step from shares of them, and even work."""

from collections.abc import Callable, Iterable
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from carillon.engine.config import UserError, build
from carillon.engine.models.plans import decoder_problems
from carillon.engine.models.towers.decoder_config import DecoderConfig, MoeConfig
from carillon.engine.parallel.config import DistributedConfig
from carillon.engine.parallel.context_keys import Call, ring_call, whole_calls
from carillon.engine.parallel.parity import TOLERANCE_FP32
from carillon.engine.parallel.zigzag import PackedRows, Zigzag
from carillon.engine.train.run_config import RunConfig

# Partial results are rounded to bfloat16 once more than whole ones; independent roundings add up by
# their squares.
MORE_ROUNDING_BF16 = 2**0.5


@pytest.mark.parametrize(
    ("world_size", "num_attention", "num_decoder"), [(2, 240, 30), (4, 180, 72)]
)
def test_shares_give_what_whole_rows_give(
    run_worker: Callable[[str, int], Any], world_size: int, num_attention: int, num_decoder: int
) -> None:
    results: dict[str, list[dict[str, Any]]] = run_worker("context_worker.py", world_size)
    attention, decoder = results["attention"], results["decoder"]
    assert (len(attention), len(decoder)) == (num_attention, num_decoder)
    exact = [r for r in attention if r["dtype"] == "torch.float32"]
    rounded = [r for r in attention if r["dtype"] == "torch.bfloat16"]
    for errors, cases in (
        (("error", "error_float64"), exact),
        (("loss_error", "gradient_error", "tally_error"), decoder),
    ):
        worse = [r for r in cases if not max(r[error] for error in errors) <= TOLERANCE_FP32]
        assert not worse, worse
    worse = [r for r in rounded if r["error_float64"] > MORE_ROUNDING_BF16 * r["one_float64"]]
    assert rounded
    assert not worse, worse
    assert max(r["gradient_error"] for r in decoder) > 0  # another order of sums: it was cut


def test_a_cut_is_a_permutation_of_the_tokens() -> None:
    x_BL = torch.arange(2 * 24).view(2, 24)
    cuts = [Zigzag(3, rank) for rank in range(3)]
    shares = torch.stack([cut.share(x_BL) for cut in cuts])
    assert shares[0, 0].tolist() == [0, 1, 2, 3, 20, 21, 22, 23]
    assert torch.equal(cuts[0].join(shares), x_BL)
    assert torch.equal(cuts[0].part(x_BL), shares)


def test_labels_stay_with_their_tokens_and_offsets_are_whole() -> None:
    tokens = torch.arange(16).view(1, 16)
    rows = PackedRows(tokens, tokens + 100, torch.tensor([[0, 5, 16]]), tokens + 1)
    share = Zigzag(2, 1).share_of(rows)
    assert share.tokens.tolist() == [[4, 5, 6, 7, 8, 9, 10, 11]]
    assert torch.equal(share.labels, share.tokens + 1)
    assert torch.equal(share.positions, share.tokens + 100)
    assert torch.equal(share.offsets, rows.offsets)


def pairs(calls: Iterable[Call]) -> int:
    """Queries and keys that the op's masks let meet."""
    return sum(
        visible(l, m, call.causal)
        for call in calls
        for l, m in zip(lengths(call.starts_q), lengths(call.starts_k), strict=True)  # noqa: E741
    )


def visible(l: int, m: int, causal: bool) -> int:  # noqa: E741
    return sum(min(max(i + m - l + 1, 0), m) for i in range(l)) if causal else l * m


def lengths(starts: Tensor) -> list[int]:
    return [b - a for a, b in pairwise(starts.tolist())]


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("documents", [[0, 96], [0, 7, 7, 50, 96]], ids=str)
def test_no_pair_is_computed_twice_or_in_vain(
    size: int, causal: bool, documents: list[int]
) -> None:
    offsets, length = torch.tensor([documents]), 96 // (2 * size)
    whole = sum(visible(n, n, causal) for n in lengths(offsets[0]))
    cuts = [Zigzag(size, rank) for rank in range(size)]
    ring = [
        [pairs([ring_call(cut, owner, offsets, length, causal)]) for owner in range(size)]
        for cut in cuts
    ]
    gathered = [pairs(whole_calls(cut, offsets, length, causal)) for cut in cuts]
    assert [sum(steps) for steps in ring] == gathered
    assert sum(gathered) == whole
    if len(documents) == 2:  # one document: the same work for all, in each step of the ring too
        assert len(set(gathered)) == 1
        assert len({work for cut, steps in zip(cuts, ring, strict=True)
                    for owner, work in enumerate(steps) if owner != cut.rank}) == 1  # fmt: skip


@pytest.mark.parametrize(("size", "unevenness"), [(2, 1.5), (4, 1.75), (8, 1.875)])
def test_shares_cut_in_order_would_be_uneven(size: int, unevenness: float) -> None:
    """A causal row's pairs: the process that has most, over the mean."""
    keys_BL = torch.arange(1, 4097).view(1, -1)
    in_order = [int(part.sum()) for part in keys_BL.chunk(size, dim=1)]
    zigzag = [int(Zigzag(size, rank).share(keys_BL).sum()) for rank in range(size)]
    mean = int(keys_BL.sum()) / size
    assert max(in_order) / mean == pytest.approx(unevenness, rel=1e-3)
    assert max(zigzag) == mean


def errors(model: DecoderConfig, **settings: Any) -> str:
    return "\n".join(decoder_problems(model, DistributedConfig(**settings)))


SMALL = DecoderConfig(width=96, num_heads=12, num_kv_heads=4, context=96)


def test_what_cannot_be_cut_is_refused_with_what_can() -> None:
    assert errors(SMALL, cp=4) == ""
    assert errors(SMALL, cp=4, cp_method="ulysses") == ""
    odd = errors(replace(SMALL, context=100), cp=3)
    assert "rows of 100 tokens do not divide into 2 x cp = 6 chunks" in odd
    assert "use rows of 96 or 102 tokens, or cp=2 or 5; rows are model.context long" in odd
    assert "use rows of 4 tokens, or cp=1" in errors(replace(SMALL, context=3), cp=2)
    heads = errors(SMALL, cp=8, cp_method="ulysses")
    assert "shares 12 heads / tp 1 among cp; use cp=6 or 12, or cp_method=ring" in heads
    assert "12 heads / tp 4 among cp; use cp=1 or 3" in errors(
        SMALL, cp=2, tp=4, cp_method="ulysses"
    )
    capacity = replace(SMALL, moe=MoeConfig(num_experts=4, capacity_factor=1.0))
    assert "leave capacity_factor out" in errors(capacity, cp=2)
    assert errors(capacity) == ""


def test_a_share_of_rows_that_do_not_divide_is_refused() -> None:
    with pytest.raises(ValueError, match="rows of 30 tokens do not divide into 2 x cp = 4 chunks"):
        Zigzag(2, 0).share(torch.zeros(1, 30))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"cp": 2}, "the dual encoder's sequences are short"),
        ({"cp_method": "ulysses"}, "cp_method: ulysses given, but cp is 1; drop it, or raise cp"),
    ],
)
def test_runs_that_have_nothing_to_cut_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        build(RunConfig, {"distributed": settings})
