"""Random arguments of every native op: sizes, memory layouts, and values spoiled one at a time.

Tensors end where their allocation ends, so that AddressSanitizer (make asan) sees a read past them.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from carillon.kernels.moe_routing import reference as moe
from carillon.kernels.packed_attention.reference import packed_attention as attend

Draw = Callable[[st.SearchStrategy[Any]], Any]
Arguments = dict[str, Any]
# By op: draws right arguments, in the op's order.
ARGUMENTS: dict[str, Callable[[Draw], Arguments]] = {}

SIZES = st.integers(0, 40)
FLOATS = st.sampled_from([torch.float32, torch.bfloat16])
# Too large to be allocated by mistake, and the ends of both integer types.
INTEGERS = [-1, 0, 1, 2, 2**31 - 1, -(2**31)]
LARGE_INTEGERS = [-1, 0, 1, 2**40, 2**62, -(2**62)]
NUMBERS = [math.nan, math.inf, 0.0, -0.25]
OTHER_DTYPES = [torch.float16, torch.float32, torch.bfloat16, torch.int32, torch.int64, torch.uint8]


def of_op(draws: Callable[[Draw], Arguments]) -> Callable[[Draw], Arguments]:
    """Enters a function under its name, which is the op's."""
    ARGUMENTS[draws.__name__] = draws
    return draws


def laid_out(draw: Draw, x: Tensor) -> Tensor:
    """The same values: dense, not aligned, every other element, or transposed."""
    layout = draw(st.sampled_from(["dense", "shifted", "stepped", "transposed"]))
    if layout == "shifted":
        return torch.cat([x.new_zeros(1), x.reshape(-1)])[1:].view(x.shape)
    if layout == "stepped" and x.dim():
        return torch.stack([x, x], dim=-1).reshape(*x.shape[:-1], 2 * x.shape[-1])[..., 1::2]
    if layout == "transposed" and x.dim() > 1:
        return x.transpose(0, -1).contiguous().transpose(0, -1)
    return x.clone()


def floats(draw: Draw, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(draw(st.integers(0, 1000)))
    return laid_out(draw, torch.randn(shape, generator=generator).clamp(-4, 4).to(dtype))


def integers(draw: Draw, low: int, high: int, *shape: int, dtype: torch.dtype) -> Tensor:
    generator = torch.Generator().manual_seed(draw(st.integers(0, 1000)))
    return laid_out(draw, torch.randint(low, high, shape, generator=generator).to(dtype))


def spoil(draw: Draw, arguments: Arguments) -> Arguments:
    """Replaces one argument by another of the same kind, which may still be a right one."""
    given = [name for name, value in arguments.items() if value is not None]
    name = draw(st.sampled_from(given))
    return arguments | {name: _spoiled(draw, arguments[name])}


def _spoiled(draw: Draw, value: Any) -> Any:
    if isinstance(value, Tensor):
        return _spoiled_tensor(draw, value)
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        return draw(st.sampled_from(LARGE_INTEGERS))
    if isinstance(value, float):
        return draw(st.sampled_from(NUMBERS))
    if isinstance(value, torch.dtype):
        return draw(st.sampled_from([*OTHER_DTYPES, torch.float8_e5m2]))
    if isinstance(value, str):
        return draw(st.sampled_from([value + "s", "", "softmax", "rowwise"]))
    return [*value[:-1], draw(st.sampled_from(NUMBERS))] if draw(st.booleans()) else value[:-1]


def _spoiled_tensor(draw: Draw, x: Tensor) -> Tensor:
    kinds = ["dtype", "flat", "deeper"] + ["shorter", "longer", "narrower"] * (x.dim() > 0)
    if not x.is_floating_point() and x.dtype != torch.uint8 and x.numel():
        kinds += ["value"] * 6
    kind = draw(st.sampled_from(kinds))
    if kind == "dtype":
        return x.to(draw(st.sampled_from(OTHER_DTYPES)))
    if kind == "flat":
        return x.reshape(-1)
    if kind == "deeper":
        return x[None]
    if kind == "shorter":
        return x[1:].clone()
    if kind == "narrower":
        return x[..., 1:].clone()
    if kind == "longer":
        return torch.cat([x, x[:1]])
    values = x.flatten().clone()
    values[draw(st.integers(0, x.numel() - 1))] = draw(st.sampled_from([*INTEGERS, x.numel()]))
    return values.view(x.shape)


@of_op
def image_normalize(draw: Draw) -> Arguments:
    shape = (draw(st.integers(0, 3)), draw(SIZES), draw(SIZES), 3)
    return {
        "images": integers(draw, 0, 256, *shape, dtype=torch.uint8),
        "mean": [0.5, 0.25, 0.75],
        "std": [0.5, 1.0, 0.25],
        "dtype": draw(FLOATS),
    }


@of_op
def contrastive(draw: Draw) -> Arguments:
    n, others, width = draw(SIZES), draw(SIZES), draw(SIZES)
    dtype, with_ids = draw(FLOATS), draw(st.booleans())

    def ids(count: int) -> Tensor | None:
        return integers(draw, -1, 6, count, dtype=torch.int64) if with_ids else None

    return {
        "rows": floats(draw, n, width, dtype=dtype),
        "columns": floats(draw, n + others, width, dtype=dtype),
        "scale": torch.tensor([0.5]),
        "first_column": draw(st.integers(-9, 20) | st.sampled_from([-(2**62), 2**62])),
        "row_ids": ids(n),
        "column_ids": ids(n + others),
        "with_sums": draw(st.booleans()),
    }


@of_op
def contrastive_backward(draw: Draw) -> Arguments:
    forward = contrastive(draw)
    n, m, with_sums = len(forward["rows"]), len(forward["columns"]), forward.pop("with_sums")
    lengths = {"row_lse": n, "column_lse": m, "row_lse_grad": n, "column_lse_grad": m}
    vectors = {name: floats(draw, length) for name, length in lengths.items()}
    sums = {"row_sum_grad": n, "column_sum_grad": m}
    return (
        forward
        | vectors
        | {"positive_grad": floats(draw, n)}
        | {name: floats(draw, size) if with_sums else None for name, size in sums.items()}
    )


@of_op
def contrastive_sigmoid(draw: Draw) -> Arguments:
    given = contrastive(draw)
    del given["with_sums"]
    names = ["rows", "columns", "scale", "bias", "first_column", "row_ids", "column_ids"]
    given["bias"] = torch.tensor([-1.0])
    return {name: given[name] for name in names}


@of_op
def contrastive_sigmoid_backward(draw: Draw) -> Arguments:
    given = contrastive_sigmoid(draw)
    return given | {"row_loss_grad": floats(draw, len(given["rows"]))}


@of_op
def packed_attention(draw: Draw) -> Arguments:
    lengths = [
        (draw(st.integers(0, 12)), draw(st.integers(0, 12)), draw(st.integers(0, 12)))
        for _ in range(draw(st.integers(0, 3)))
    ]
    kv_heads, group, width = (
        draw(st.integers(1, 2)),
        draw(st.integers(1, 2)),
        8 * draw(st.integers(1, 3)),
    )
    dtype, causal = draw(FLOATS), draw(st.booleans())
    starts = {}
    for i, of in enumerate("qk"):
        ends = torch.tensor([0, *(length[i] for length in lengths)]).cumsum(0)
        starts[of] = ends.to(draw(st.sampled_from([torch.int32, torch.int64])))
    heads = {"q": kv_heads * group, "k": kv_heads, "v": kv_heads}
    totals = {name: int(starts["q" if name == "q" else "k"][-1]) for name in heads}
    prefixes = torch.tensor([min(p, m) for _, m, p in lengths], dtype=torch.int64)
    return {
        **{name: floats(draw, totals[name], heads[name], width, dtype=dtype) for name in heads},
        "cu_seqlens_q": laid_out(draw, starts["q"]),
        "cu_seqlens_k": laid_out(draw, starts["k"]),
        "max_seqlen_q": max((length[0] for length in lengths), default=0),
        "max_seqlen_k": max((length[1] for length in lengths), default=0),
        "causal": causal,
        "prefix_lengths": laid_out(draw, prefixes) if causal and draw(st.booleans()) else None,
        "scale": draw(st.sampled_from([None, 0.25])),
    }


@of_op
def packed_attention_backward(draw: Draw) -> Arguments:
    forward = packed_attention(draw)
    q = forward["q"]
    out, lse = attend(*forward.values())
    mask = {name: forward.pop(name) for name in list(forward)[3:]}
    total, num_heads, width = q.shape
    return {
        "grad_out": floats(draw, total, num_heads, width, dtype=q.dtype),
        "grad_lse": floats(draw, num_heads, total) if draw(st.booleans()) else None,
        **forward,
        "out": laid_out(draw, out),
        "lse": laid_out(draw, lse),
        **mask,
    }


@of_op
def fp8_cast(draw: Draw) -> Arguments:
    sizes = st.integers(0, 5) | st.integers(120, 140)
    granularity = draw(st.sampled_from(["tensorwise", "rowwise", "1x128", "128x128"]))
    given = granularity == "tensorwise" and draw(st.booleans())
    return {
        "x": floats(draw, draw(sizes), draw(sizes), dtype=draw(FLOATS)),
        "granularity": granularity,
        "dtype": draw(st.sampled_from([torch.float8_e4m3fn, torch.float8_e5m2])),
        "scale": torch.tensor(0.25) if given else None,
        "column": draw(st.booleans()),
        "power_of_two": not given and draw(st.booleans()),
        "check_finite": draw(st.booleans()),
    }


@of_op
def moe_topk(draw: Draw) -> Arguments:
    num_experts = draw(st.integers(1, 40))
    score = draw(st.sampled_from(["softmax", "sigmoid"]))
    with_bias = score == "sigmoid" and draw(st.booleans())
    return {
        "logits": floats(draw, draw(SIZES), num_experts, dtype=draw(FLOATS)),
        "k": draw(st.integers(1, num_experts)),
        "score": score,
        "renormalize": draw(st.booleans()),
        "scale": 2.5,
        "selection_bias": floats(draw, num_experts) if with_bias else None,
    }


@of_op
def moe_topk_backward(draw: Draw) -> Arguments:
    forward = moe_topk(draw)
    (num_tokens, num_experts), k = forward["logits"].shape, forward["k"]
    order = torch.argsort(floats(draw, num_tokens, num_experts), dim=1)[:, :k]
    return {
        "grad_weights": floats(draw, num_tokens, k),
        "grad_mean_scores": floats(draw, num_experts),
        "grad_z_loss": floats(draw),
        "logits": forward["logits"],
        "indices": laid_out(draw, order.int()),
        **{name: forward[name] for name in ("score", "renormalize", "scale")},
    }


@of_op
def moe_plan(draw: Draw) -> Arguments:
    num_experts, k = draw(st.integers(1, 9)), draw(st.integers(1, 3))
    return {
        "indices": integers(draw, 0, num_experts, draw(SIZES), k, dtype=torch.int32),
        "num_experts": num_experts,
        "alignment": draw(st.integers(1, 9)),
        "capacity": draw(st.none() | st.integers(1, 9)),
    }


def _maps(draw: Draw) -> tuple[Tensor, Arguments]:
    """Offsets, and both maps of a plan."""
    offsets, rows, slots = moe.moe_plan(*moe_plan(draw).values())
    maps = {"row_to_slot": laid_out(draw, rows), "slot_to_row": laid_out(draw, slots)}
    return laid_out(draw, offsets), maps


@of_op
def moe_permute(draw: Draw) -> Arguments:
    maps = _maps(draw)[1]
    return {"x": floats(draw, len(maps["slot_to_row"]), draw(SIZES), dtype=draw(FLOATS))} | maps


@of_op
def moe_permute_backward(draw: Draw) -> Arguments:
    maps = _maps(draw)[1]
    return {"grad": floats(draw, len(maps["row_to_slot"]), draw(SIZES), dtype=draw(FLOATS))} | maps


@of_op
def moe_unpermute(draw: Draw) -> Arguments:
    maps = _maps(draw)[1]
    return {
        "rows": floats(draw, len(maps["row_to_slot"]), draw(SIZES), dtype=draw(FLOATS)),
        "weights": floats(draw, *maps["slot_to_row"].shape),
        **maps,
    }


@of_op
def moe_unpermute_backward(draw: Draw) -> Arguments:
    given = moe_unpermute(draw)
    rows = given["rows"]
    shape = (len(given["slot_to_row"]), rows.shape[1])
    return {"grad": floats(draw, *shape, dtype=rows.dtype)} | given


@of_op
def grouped_mm(draw: Draw) -> Arguments:
    offsets, maps = _maps(draw)
    width, dtype = draw(SIZES), draw(FLOATS)
    return {
        "x": floats(draw, len(maps["row_to_slot"]), width, dtype=dtype),
        "weights": floats(draw, len(offsets) - 1, width, draw(SIZES), dtype=dtype),
        "offsets": offsets,
    }


@of_op
def grouped_mm_backward(draw: Draw) -> Arguments:
    given = grouped_mm(draw)
    shape = (len(given["x"]), given["weights"].shape[2])
    return {"grad": floats(draw, *shape, dtype=given["x"].dtype)} | given


@of_op
def gather_grouped_mm(draw: Draw) -> Arguments:
    offsets, maps = _maps(draw)
    width, dtype = draw(SIZES), draw(FLOATS)
    return {
        "x": floats(draw, len(maps["slot_to_row"]), width, dtype=dtype),
        "weights": floats(draw, len(offsets) - 1, width, draw(SIZES), dtype=dtype),
        "offsets": offsets,
        **maps,
    }


@of_op
def gather_grouped_mm_backward(draw: Draw) -> Arguments:
    given = gather_grouped_mm(draw)
    shape = (len(given["row_to_slot"]), given["weights"].shape[2])
    return {"grad": floats(draw, *shape, dtype=given["x"].dtype)} | given
