"""packed_attention and its gradients: each provider against the definition in float64."""

from typing import Any

import pytest
import torch
from torch import Tensor

from carillon.kernels.table import load_native, resolve
from carillon.kernels.tolerances import TOLERANCES

DTYPES = [torch.float32, torch.bfloat16]
pytestmark = pytest.mark.op("packed_attention")

# Small enough for Triton's interpreter: odd lengths about a block of 64, one token, empty on
# either side, more queries than keys (rows that see nothing under a causal mask), groups of heads.
SMALL: dict[str, dict[str, Any]] = {
    "self": {"lengths_q": (5, 70, 1, 33)},
    "cross": {"lengths_q": (3, 0, 40, 2), "lengths_k": (70, 4, 0, 1), "heads": (4, 2)},
    "causal": {"lengths_q": (67, 1, 30), "causal": True, "heads": (2, 1), "head_dim": 32},
    "causal, fewer keys": {
        "lengths_q": (70, 9, 0, 2),
        "lengths_k": (20, 33, 3, 0),
        "causal": True,
        "head_dim": 40,
    },
    "prefix": {
        "lengths_q": (66, 40, 9),
        "lengths_k": (70, 10, 9),
        "causal": True,
        "prefixes": (68, 4, 0),
        "heads": (4, 1),
        "head_dim": 16,
    },
    "scale": {"lengths_q": (17, 8), "scale": -0.3, "head_dim": 8},
    "one row": {"lengths_q": (1,), "head_dim": 128},
    "head_dim 256": {"lengths_q": (9, 17), "head_dim": 256},
    "head_dim of a chunk and a part": {
        "lengths_q": (5, 40),
        "lengths_k": (35, 33),
        "causal": True,
        "prefixes": (2, 30),
        "heads": (2, 1),
        "head_dim": 72,
    },
}
# What crosses the native provider's blocks: 96 queries, 768 of a task, 640 and 256 keys.
LARGE: dict[str, dict[str, Any]] = {
    "one key block": {"lengths_q": (577, 96, 97, 50, 197), "heads": (1, 1)},
    "several key blocks": {
        "lengths_q": (100, 1, 790),
        "lengths_k": (1290, 641, 90),
        "causal": True,
        "prefixes": (700, 0, 50),
        "heads": (2, 1),
        "head_dim": 24,
    },
    "shorter after longer": {"lengths_q": (9, 9), "lengths_k": (641, 640), "head_dim": 8},
}
CASES = [
    *(pytest.param(case, id=name) for name, case in SMALL.items()),
    *(pytest.param(x, id=name, marks=pytest.mark.not_interpreted) for name, x in LARGE.items()),
]


def computed(batch: Any, provider: str) -> tuple[Tensor, ...]:
    """out, lse, dq, dk and dv, on the CPU."""
    inputs = [x.detach().requires_grad_() for x in (batch.q, batch.k, batch.v)]
    out, lse = resolve("packed_attention", batch.q.device, provider)(*inputs, *batch.arguments())
    assert out.is_contiguous()
    grads = torch.autograd.grad([out, lse], inputs, [batch.grad_out, batch.grad_lse])
    return tuple(x.detach().cpu() for x in (out, lse, *grads))


def assert_right(batch: Any, got: tuple[Tensor, ...], slack: float = 1.0) -> None:
    """`slack`: how much larger than usual the scores are."""
    wanted = batch.definition()
    dtype = batch.q.dtype
    largest = max([1e-30, *(float(x.abs().max()) for x in wanted[2:] if x.numel())])
    for name, of, like, x, y in zip(
        ("out", "lse", "dq", "dk", "dv"),
        ("packed_attention",) * 2 + ("packed_attention_backward",) * 3,
        (dtype, torch.float32, dtype, dtype, dtype),
        got,
        wanted,
        strict=True,
    ):
        tolerance = TOLERANCES[of, like]
        unit = 1.0 if of == "packed_attention" else largest
        assert x.dtype == like
        torch.testing.assert_close(
            x.double() / unit,
            y / unit,
            atol=tolerance.atol * slack,
            rtol=tolerance.rtol,
            msg=lambda text, name=name: f"{name}: {text}",
        )


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_matches_definition(
    new_batch: Any, provider: str, device: str, case: Any, dtype: torch.dtype
) -> None:
    batch = new_batch(dtype=dtype, device=device, **case)
    assert_right(batch, computed(batch, provider))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_large_scores(new_batch: Any, provider: str, device: str, dtype: torch.dtype) -> None:
    """Scores up to 1e3: weights that underflow, rows that are one key. An error of a score grows
    with it, and is a relative error of its weight."""
    batch = new_batch((40, 7), dtype=dtype, size=200.0, head_dim=32, device=device)
    largest = float(batch.definition()[1].abs().max())
    assert largest > 500
    assert_right(batch, computed(batch, provider), slack=largest / 8)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_slices_of_one_projection(
    new_batch: Any, provider: str, device: str, dtype: torch.dtype
) -> None:
    """q, k and v as a model cuts them, transposed, and at odd offsets and strides."""
    batch = new_batch((9, 30), dtype=dtype, head_dim=24, device=device)
    packed = torch.stack([batch.q, batch.k, batch.v], 2)
    odd = torch.zeros(3, 39, 2, 27, dtype=dtype, device=device)
    odd[..., 1:25] = packed.permute(2, 0, 1, 3)
    transposed = packed.transpose(0, 3).contiguous().transpose(0, 3)
    op = resolve("packed_attention", device, provider)
    dense = op(batch.q, batch.k, batch.v, *batch.arguments())
    for q, k, v in (packed.unbind(2), odd[..., 1:25].unbind(0), transposed.unbind(2)):
        assert not q.is_contiguous()
        out, lse = op(q, k, v, *batch.arguments())
        torch.testing.assert_close(out, dense[0])
        torch.testing.assert_close(lse, dense[1])
    backward = resolve("packed_attention_backward", device, provider)
    rest = (batch.q, batch.k, batch.v, *dense)
    grad_out = batch.grad_out.transpose(0, 1).contiguous().transpose(0, 1)
    grad_lse = batch.grad_lse.T.contiguous().T
    strided = backward(grad_out, grad_lse, *rest, *batch.arguments())
    dense = backward(batch.grad_out, batch.grad_lse, *rest, *batch.arguments())
    for a, b in zip(strided, dense, strict=True):
        torch.testing.assert_close(a, b)


def test_keys_in_parts(new_batch: Any, provider: str, device: str) -> None:
    """Merged by the log-sum-exp, and back with the merged one: as over all keys at once."""
    lengths_k = (9, 40, 1, 0)
    batch = new_batch((5, 66, 3, 2), lengths_k, heads=(4, 2), head_dim=16, device=device)
    starts_q, starts_k, longest_q, longest_k, *_ = batch.arguments()
    keys = [torch.arange(n, device=device) + s for n, s in zip(lengths_k, starts_k, strict=False)]
    halves = [[part[: len(part) // 3] for part in keys], [part[len(part) // 3 :] for part in keys]]
    calls = []
    for half in halves:
        index = torch.cat(half)
        starts = torch.tensor([0, *map(len, half)], device=device).cumsum(0)
        calls.append((index, (starts_q, starts, longest_q, longest_k)))
    op = resolve("packed_attention", device, provider)
    parts = [op(batch.q, batch.k[i], batch.v[i], *lengths) for i, lengths in calls]
    lse = torch.logaddexp(parts[0][1], parts[1][1])
    shares = [(part_lse - lse).exp().nan_to_num(0.0).T[..., None] for _, part_lse in parts]
    out = sum(part * share for (part, _), share in zip(parts, shares, strict=True))
    backward = resolve("packed_attention_backward", device, provider)
    dq, dk, dv = (torch.zeros_like(x) for x in (batch.q, batch.k, batch.v))
    for i, lengths in calls:
        rest = (batch.q, batch.k[i], batch.v[i], out, lse)
        grads = backward(batch.grad_out, batch.grad_lse, *rest, *lengths)
        dq += grads[0]
        dk[i], dv[i] = grads[1:]
    assert_right(batch, tuple(x.cpu() for x in (out, lse, dq, dk, dv)))


@pytest.mark.parametrize("lengths", [(), (0,), (0, 0, 0)])
def test_empty(new_batch: Any, provider: str, device: str, lengths: tuple[int, ...]) -> None:
    batch = new_batch(lengths, head_dim=8, device=device)
    out, lse, *grads = computed(batch, provider)
    assert out.shape == (0, 2, 8)
    assert lse.shape == (2, 0)
    assert [x.shape for x in grads] == [(0, 2, 8)] * 3


def test_nan_stays_in_its_sequence_and_is_seen(new_batch: Any, provider: str, device: str) -> None:
    batch = new_batch((6, 9), head_dim=16, device=device)
    batch.k[8, 0, 3] = torch.nan
    out, lse = resolve("packed_attention", device, provider)(
        batch.q, batch.k, batch.v, *batch.arguments()
    )
    assert out[6:, 0].isnan().all()
    assert lse[0, 6:].isnan().all()
    assert out[:6].isfinite().all()
    assert out[:, 1].isfinite().all()


def test_one_result_may_go_unused(new_batch: Any, provider: str, device: str) -> None:
    """The gradient of one result alone; those of both are their sum."""
    batch = new_batch((7, 12), head_dim=8, device=device)
    inputs = [x.requires_grad_() for x in (batch.q, batch.k, batch.v)]
    op = resolve("packed_attention", device, provider)
    by_out = torch.autograd.grad(op(*inputs, *batch.arguments())[0], inputs, batch.grad_out)
    lse = op(*inputs, *batch.arguments())[1]
    by_lse = torch.autograd.grad(lse, inputs, batch.grad_lse)
    assert by_lse[2].abs().max() == 0
    both = computed(batch, provider)[2:]
    for a, b, c in zip(by_out, by_lse, both, strict=True):
        torch.testing.assert_close((a + b).cpu(), c, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_repeated_and_on_two_threads_the_same_bits(new_batch: Any, dtype: torch.dtype) -> None:
    batch = new_batch((50, 300, 8, 97), heads=(4, 2), head_dim=16, dtype=dtype)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one, again = computed(batch, "native"), computed(batch, "native")
        torch.set_num_threads(2)
        two = computed(batch, "native")
    finally:
        torch.set_num_threads(before)
    for a, b, c in zip(one, again, two, strict=True):
        assert torch.equal(a, b)
        assert torch.equal(a, c)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_instruction_set(new_batch: Any, instruction_set: str, dtype: torch.dtype) -> None:
    """What other processors run."""
    batch = new_batch((7, 100, 1), (300, 20, 9), heads=(4, 2), head_dim=40, dtype=dtype,
                      causal=True, prefixes=(20, 0, 9))  # fmt: skip
    inputs = [x.requires_grad_() for x in (batch.q, batch.k, batch.v)]
    results = resolve("packed_attention", "cpu", "native")(*inputs, *batch.arguments())
    gradients = torch.autograd.grad(results, inputs, [batch.grad_out, batch.grad_lse])
    assert_right(batch, tuple(x.detach() for x in (*results, *gradients)))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_opcheck(new_batch: Any, dtype: torch.dtype) -> None:
    load_native()
    batch = new_batch((5, 0, 9), heads=(2, 1), head_dim=8, dtype=dtype, causal=True,
                      prefixes=(2, 0, 3))  # fmt: skip
    inputs = [x.requires_grad_() for x in (batch.q, batch.k, batch.v)]
    torch.library.opcheck(torch.ops.carillon.packed_attention.default,
                          (*inputs, *batch.arguments()))  # fmt: skip
    plain = [x.detach() for x in inputs]
    results = torch.ops.carillon.packed_attention(*plain, *batch.arguments())
    arguments = (batch.grad_out, batch.grad_lse, *plain, *results, *batch.arguments())
    torch.library.opcheck(torch.ops.carillon.packed_attention_backward.default, arguments)


def test_torch_compile_has_no_graph_break(new_batch: Any) -> None:
    op = resolve("packed_attention", "cpu")
    batch = new_batch((5, 20), head_dim=16)
    inputs = [x.requires_grad_() for x in (batch.q, batch.k, batch.v)]

    def loss(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out, lse = op(q * 2, k, v, *batch.arguments())
        return (out * batch.grad_out).sum() + (lse * batch.grad_lse).sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    wanted = torch.autograd.grad(loss(*inputs), inputs)
    for a, b in zip(torch.autograd.grad(compiled(*inputs), inputs), wanted, strict=True):
        torch.testing.assert_close(a, b)


def test_second_derivative_is_refused(new_batch: Any) -> None:
    batch = new_batch((4,), head_dim=8)
    q = batch.q.requires_grad_()
    out, _ = resolve("packed_attention", "cpu")(q, batch.k, batch.v, *batch.arguments())
    (dq,) = torch.autograd.grad(out.square().sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        dq.sum().backward()
