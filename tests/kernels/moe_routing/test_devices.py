"""Every provider on every device that is here, at sizes of many blocks, against the reference in
the same types; on CUDA also what it does with indices that lead nowhere, which it cannot check.
"""

import pytest
import torch
from torch import Tensor

from carillon.kernels.moe_routing import check_values
from carillon.kernels.table import resolve
from carillon.kernels.tolerances import TOLERANCES


def randn(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def assert_same(op: str, got: Tensor, wanted: Tensor, times: int = 2) -> None:
    """Both may be off by the tolerance from the definition."""
    tolerance = TOLERANCES[op, got.dtype]
    torch.testing.assert_close(
        got.cpu(), wanted, atol=times * tolerance.atol, rtol=times * tolerance.rtol
    )


def compare(op: str, device: str, provider: str, leaves: list[Tensor], rest: list[object]) -> None:
    """Outputs and gradients of leaves; `rest` are the other arguments."""
    results = []
    for where, name in ((device, provider), ("cpu", "reference")):
        here = [leaf.detach().to(where).requires_grad_() for leaf in leaves]
        others = [r.to(where) if isinstance(r, Tensor) else r for r in rest]
        out = resolve(op, where, name)(*here, *others)
        outs = [out] if isinstance(out, Tensor) else list(out)
        floats = [o for o in outs if o.requires_grad]
        grads = [randn(*o.shape, dtype=o.dtype, seed=7).to(where) for o in floats]
        torch.autograd.backward(floats, grads)
        results.append([*(o.detach() for o in outs), *(leaf.grad for leaf in here)])
    for got, wanted in zip(*results, strict=True):
        assert got is not None
        assert wanted is not None
        if wanted.is_floating_point():
            assert_same(op, got, wanted)
        else:
            assert torch.equal(got.cpu(), wanted)


@pytest.mark.op("moe_topk")
@pytest.mark.not_interpreted
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
@pytest.mark.parametrize(
    "shape", [(1, 1, 1), (77, 8, 2), (300, 13, 4), (130, 64, 8), (65, 200, 6), (33, 512, 16)],
    ids=str,
)  # fmt: skip
def test_topk(
    device: str, provider: str, dtype: torch.dtype, score: str, shape: tuple[int, int, int]
) -> None:
    num_tokens, num_experts, k = shape
    bias = torch.linspace(-0.2, 0.2, num_experts) if score == "sigmoid" else None
    logits = randn(num_tokens, num_experts, dtype=dtype, seed=num_experts)
    compare("moe_topk", device, provider, [logits], [k, score, True, 1.5, bias])


@pytest.mark.op("moe_plan")
@pytest.mark.not_interpreted
@pytest.mark.parametrize(
    ("shape", "alignment", "capacity"),
    [((1, 1, 1), 1, None), ((900, 5, 2), 16, None), ((3000, 70, 3), 8, 40), ((0, 3, 2), 16, None)],
    ids=str,
)
def test_plan(
    device: str,
    provider: str,
    shape: tuple[int, int, int],
    alignment: int,
    capacity: int | None,
) -> None:
    num_tokens, num_experts, k = shape
    indices = randn(num_tokens, num_experts).topk(k, dim=1).indices.int()
    arguments = (num_experts, alignment, capacity)
    wanted = resolve("moe_plan", "cpu", "reference")(indices, *arguments)
    got = resolve("moe_plan", device, provider)(indices.to(device), *arguments)
    for ours, theirs in zip(got, wanted, strict=True):
        assert torch.equal(ours.cpu(), theirs)


def plan_of(num_tokens: int, num_experts: int, k: int, capacity: int | None) -> list[Tensor]:
    indices = randn(num_tokens, num_experts, seed=3).topk(k, dim=1).indices.int()
    return list(resolve("moe_plan", "cpu", "reference")(indices, num_experts, 8, capacity))


@pytest.mark.op("moe_permute")
@pytest.mark.not_interpreted
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("width", [1, 37, 64, 264])
@pytest.mark.parametrize("case", [(1, 1, 1, None), (61, 6, 3, 20), (40, 16, 11, None)], ids=str)
def test_rows(
    device: str,
    provider: str,
    dtype: torch.dtype,
    width: int,
    case: tuple[int, int, int, int | None],
) -> None:
    num_tokens, num_experts, k, capacity = case
    _, *maps = plan_of(num_tokens, num_experts, k, capacity)
    x, rows = randn(num_tokens, width, dtype=dtype), randn(len(maps[0]), width, dtype=dtype)
    compare("moe_permute", device, provider, [x], [*maps])
    compare("moe_unpermute", device, provider, [rows, randn(num_tokens, k, seed=2)], [*maps])


@pytest.mark.op("grouped_mm")
@pytest.mark.not_interpreted
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("widths", [(64, 128), (33, 19)], ids=str)
def test_grouped(device: str, provider: str, dtype: torch.dtype, widths: tuple[int, int]) -> None:
    width, out_width = widths
    offsets, *maps = plan_of(90, 6, 2, 30)
    matrices = randn(6, width, out_width, dtype=dtype, seed=1) / out_width
    rows = randn(len(maps[0]), width, dtype=dtype)
    compare("grouped_mm", device, provider, [rows, matrices], [offsets])
    x = randn(90, width, dtype=dtype)
    compare("gather_grouped_mm", device, provider, [x, matrices], [offsets, *maps])


def test_the_reference_drops_stray_values_that_it_does_not_read(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As on a device whose values are not read: the CPU's check is taken out."""
    monkeypatch.setattr(check_values, "check_indices", lambda *arguments: None)
    stray = torch.tensor([[0, 10**9], [-7, 2], [2**31 - 1, 1]], dtype=torch.int32)
    offsets, row_to_slot, slot_to_row = resolve("moe_plan", "cpu", "reference")(stray, 3, 4)
    assert offsets.tolist() == [0, 4, 8, 12]
    assert slot_to_row.tolist() == [[0, -1], [-1, 8], [-1, 4]]
    assert row_to_slot[:12].tolist() == [0, -1, -1, -1, 5, -1, -1, -1, 3, -1, -1, -1]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
@pytest.mark.parametrize("provider", ["native", "triton"])
def test_stray_values_touch_nothing_outside(provider: str) -> None:
    """The device cannot be asked for each value, so the kernels pass over what names nothing."""
    stray = torch.tensor([[0, 10**9], [-7, 2], [2**31 - 1, 1]], dtype=torch.int32).cuda()
    plan = resolve("moe_plan", "cuda", provider)(stray, 3, 4)
    assert plan[2].cpu().tolist() == [[0, -1], [-1, 8], [-1, 4]]
    x, weights = torch.ones(3, 40).cuda(), torch.ones(3, 2).cuda()
    rows = resolve("moe_permute", "cuda", provider)(x, plan[1], stray)
    out = resolve("moe_unpermute", "cuda", provider)(rows, weights, plan[1], stray)
    assert out.shape == x.shape
    torch.cuda.synchronize()
