"""What the kernels are compared with computes the same thing: a race against another is nothing.

Compiled peers are compared where they are timed (benchmarks/race.py).
"""

from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from carillon.kernels.contrastive.reference import contrastive, contrastive_sigmoid
from carillon.kernels.fp8_cast.layout import GRANULARITIES
from carillon.kernels.fp8_cast.reference import fp8_cast
from carillon.kernels.moe_routing import reference as routing
from carillon.kernels.moe_routing.balance import load_balancing_loss
from carillon.kernels.packed_attention.reference import packed_attention

ROOT = Path(__file__).resolve().parents[2]
ROUNDING = 1e-5  # float32 sums of up to a few hundred terms in another order


@pytest.fixture(autouse=True)
def benchmarks_importable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT / "benchmarks")


def peer(module: str) -> Any:
    return import_module(f"peers.{module}")


def with_gradients(function: Any, inputs: Sequence[Tensor]) -> list[Tensor]:
    leaves = [value.clone().requires_grad_() for value in inputs]
    out = function(*leaves)
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(1))
    return [out.detach(), *torch.autograd.grad(out, leaves, weights.to(out.dtype))]


def assert_same(theirs: Sequence[Tensor], ours: Sequence[Tensor]) -> None:
    for their, our in zip(theirs, ours, strict=True):
        error = (their.double() - our.double()).norm() / our.double().norm()
        assert error <= ROUNDING


def features(num_pairs: int, dims: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    sides = [torch.randn(num_pairs, dims, generator=generator) for _ in range(2)]
    return [F.normalize(side, dim=-1) for side in sides] + [torch.tensor([20.0])]


def softmax_by_definition(image: Tensor, text: Tensor, scale: Tensor) -> Tensor:
    row_lse, column_lse, positive, _, _ = contrastive(image, text, scale)
    return ((row_lse + column_lse) / 2 - positive).mean()


@pytest.mark.parametrize(
    ("module", "function"),
    [("contrastive", "softmax"), ("inf_cl", "loss"), ("inf_cl_triton", "loss")],
)
def test_softmax_loss(module: str, function: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sizes that no tile divides."""
    if module == "inf_cl_triton":
        pytest.importorskip("triton")
    if module == "inf_cl":
        monkeypatch.setattr(peer(module), "TILE", 32)
    given = features(150, 80)
    theirs = with_gradients(getattr(peer(module), function), given)
    assert_same(theirs, with_gradients(softmax_by_definition, [x.double() for x in given]))


def test_sigmoid_loss() -> None:
    given = [*features(50, 24), torch.tensor([-10.0])]
    theirs = with_gradients(peer("contrastive").sigmoid, given)

    def definition(*inputs: Tensor) -> Tensor:
        return contrastive_sigmoid(*inputs).mean()

    assert_same(theirs, with_gradients(definition, [x.double() for x in given]))


@pytest.mark.parametrize(("name", "lengths"), [("sdpa_padded", (7, 1, 30)), ("sdpa", (9, 9))])
def test_attention(name: str, lengths: tuple[int, ...]) -> None:
    module = peer("packed_attention")
    generator = torch.Generator().manual_seed(0)
    qkv = [torch.randn(sum(lengths), 2, 16, generator=generator) for _ in range(3)]
    side = module.available("cpu", lengths, torch.float32, backward=True)[name]
    starts = torch.tensor([0, *lengths]).cumsum(0)

    def theirs(*packed: Tensor) -> Tensor:
        return side.pack(side.attend(*map(side.lay_out, packed)))

    def ours(*packed: Tensor) -> Tensor:
        return packed_attention(*packed, starts, starts, max(lengths), max(lengths))[0]

    assert_same(with_gradients(theirs, qkv), with_gradients(ours, qkv))


@pytest.mark.parametrize("name", ["gathering", "scattering"])
def test_routing(name: str) -> None:
    generator = torch.Generator().manual_seed(0)
    x_TD = torch.randn(33, 16, generator=generator)
    logits_TE = torch.randn(33, 8, generator=generator)
    route = peer("moe_routing").available("cpu")[name]

    def joined(out_TD: Tensor, losses: Tensor) -> Tensor:
        return torch.cat([out_TD.flatten(), losses.reshape(1)])

    def ours(x_TD: Tensor, logits_TE: Tensor) -> Tensor:
        weights_TK, indices_TK, counts_E, means_E, z = routing.moe_topk(logits_TE, 3)
        _, *maps = routing.moe_plan(indices_TK, 8)
        rows_RD = routing.moe_permute(x_TD, *maps)
        out_TD = routing.moe_unpermute(rows_RD, weights_TK, *maps)
        return joined(out_TD, load_balancing_loss(means_E, counts_E) + z)

    given = (x_TD, logits_TE)
    theirs = with_gradients(lambda *inputs: joined(*route(*inputs, 3)), given)
    assert_same(theirs, with_gradients(ours, given))


@pytest.mark.parametrize("granularity", [*GRANULARITIES, "given scale"])
def test_fp8_codes(granularity: str) -> None:
    """x * (1 / scale) and x / scale differ in one code of a thousand; tensorwise in none."""
    x = torch.randn(256, 384, generator=torch.Generator().manual_seed(0)).bfloat16()
    scale = torch.tensor(0.01) if granularity == "given scale" else None
    kind = "tensorwise" if scale is not None else granularity
    module = peer("fp8_cast")
    row, row_scale, column, column_scale = module.available("cpu")["float32"](x, kind, scale)
    ours = fp8_cast(x, kind, module.E4M3, scale, column=True)
    for codes, our_codes in ((row, ours.row), (column, ours.column)):
        assert codes.shape == our_codes.shape
        assert (codes.float() != our_codes.float()).float().mean() < 1e-3
    assert torch.equal(row_scale.flatten(), ours.row_scale.flatten())
    assert torch.equal(column_scale.flatten(), ours.column_scale.flatten())


def test_each_peer_runs_or_has_a_reason() -> None:
    lengths, dtype = (5, 9), torch.float32
    attention = ("cpu", lengths, dtype)
    reasons = peer("packed_attention").missing(*attention, backward=True)
    present = peer("packed_attention").available(*attention, backward=True)
    assert present.keys() | reasons.keys() == peer("packed_attention").PEERS.keys()
    assert not present.keys() & reasons.keys()
    for form in peer("contrastive").FORMS:
        reasons = peer("contrastive").missing("cpu", form)
        present = peer("contrastive").available("cpu", form)
        assert present.keys() | reasons.keys() == {"torch", "torch.compile", "open_clip", "inf_cl"}
        assert not present.keys() & reasons.keys()
    assert all(reasons.values())
