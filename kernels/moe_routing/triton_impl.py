"""The moe ops by Triton: arguments checked as everywhere, then the kernels of triton_*.py.

Status: compiled for sm_90 and run in the interpreter; not run on a GPU yet.
Left out: more than 512 experts or k above 16 in moe_topk.
"""

from collections.abc import Callable, Iterator, Mapping
from types import MappingProxyType
from typing import Any

from torch import Tensor

from carillon.kernels.compile_report import CompileCase
from carillon.kernels.moe_routing import (
    check,
    check_values,
    triton_grouped,
    triton_plan,
    triton_rows,
    triton_topk,
)
from carillon.kernels.moe_routing.triton_grouped import FLOAT32, GROUP_TILES, LARGE, NARROW, SMALL


def moe_topk(
    logits_TE: Tensor,
    k: int,
    score: str = "softmax",
    renormalize: bool = True,
    scale: float = 1.0,
    selection_bias_E: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    check.check_topk(logits_TE, k, score, scale, selection_bias_E)
    check_values.check_finite("moe_topk", "logits", logits_TE)
    if selection_bias_E is not None:
        check_values.check_finite("moe_topk", "selection_bias", selection_bias_E)
    return triton_topk.route(logits_TE, k, score, renormalize, scale, selection_bias_E)


def moe_topk_backward(
    grad_weights_TK: Tensor,
    grad_mean_scores_E: Tensor,
    grad_z_loss: Tensor,
    logits_TE: Tensor,
    indices_TK: Tensor,
    score: str,
    renormalize: bool,
    scale: float,
) -> Tensor:
    grads = (grad_weights_TK, grad_mean_scores_E, grad_z_loss)
    check.check_topk_backward(*grads, logits_TE, indices_TK, score, scale)
    check_values.check_indices("moe_topk_backward", indices_TK, logits_TE.shape[1])
    return triton_topk.route_backward(*grads, logits_TE, indices_TK, score, renormalize, scale)


def moe_plan(
    indices_TK: Tensor, num_experts: int, alignment: int = 16, capacity: int | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    check.check_plan(indices_TK, num_experts, alignment, capacity)
    check_values.check_indices("moe_plan", indices_TK, num_experts)
    return triton_plan.plan(indices_TK, num_experts, alignment, capacity)


def moe_permute(x_TD: Tensor, row_to_slot_R: Tensor, slot_to_row_TK: Tensor) -> Tensor:
    check.check_permute(x_TD, row_to_slot_R, slot_to_row_TK)
    check_values.check_inverse("moe_permute", row_to_slot_R, slot_to_row_TK)
    return triton_rows.permute(x_TD, row_to_slot_R, slot_to_row_TK)


def moe_permute_backward(grad_RD: Tensor, row_to_slot_R: Tensor, slot_to_row_TK: Tensor) -> Tensor:
    check.check_permute_backward(grad_RD, row_to_slot_R, slot_to_row_TK)
    check_values.check_inverse("moe_permute_backward", row_to_slot_R, slot_to_row_TK)
    return triton_rows.sum_rows(grad_RD, None, slot_to_row_TK)


def moe_unpermute(
    rows_RD: Tensor, weights_TK: Tensor, row_to_slot_R: Tensor, slot_to_row_TK: Tensor
) -> Tensor:
    check.check_unpermute("moe_unpermute", rows_RD, weights_TK, row_to_slot_R, slot_to_row_TK)
    check_values.check_inverse("moe_unpermute", row_to_slot_R, slot_to_row_TK)
    return triton_rows.sum_rows(rows_RD, weights_TK, slot_to_row_TK)


def moe_unpermute_backward(
    grad_TD: Tensor,
    rows_RD: Tensor,
    weights_TK: Tensor,
    row_to_slot_R: Tensor,
    slot_to_row_TK: Tensor,
) -> tuple[Tensor, Tensor]:
    op = "moe_unpermute_backward"
    check.check_unpermute(op, rows_RD, weights_TK, row_to_slot_R, slot_to_row_TK)
    check.require_grad(op, grad_TD, rows_RD, slot_to_row_TK.shape[0], rows_RD.shape[1])
    check_values.check_inverse(op, row_to_slot_R, slot_to_row_TK)
    maps = (row_to_slot_R, slot_to_row_TK)
    return triton_rows.unpermute_backward(grad_TD, rows_RD, weights_TK, *maps)


def grouped_mm(x_RD: Tensor, weights_EDF: Tensor, offsets: Tensor) -> Tensor:
    check.check_grouped_mm("grouped_mm", x_RD, weights_EDF, offsets)
    check_values.check_offsets("grouped_mm", offsets, x_RD.shape[0])
    return triton_grouped.multiply(x_RD, weights_EDF, offsets)


def grouped_mm_backward(
    grad_RF: Tensor, x_RD: Tensor, weights_EDF: Tensor, offsets: Tensor
) -> tuple[Tensor, Tensor]:
    op = "grouped_mm_backward"
    check.check_grouped_mm(op, x_RD, weights_EDF, offsets)
    check.require_grad(op, grad_RF, x_RD, x_RD.shape[0], weights_EDF.shape[2])
    check_values.check_offsets(op, offsets, x_RD.shape[0])
    return (
        triton_grouped.multiply(grad_RF, weights_EDF.transpose(1, 2), offsets),
        triton_grouped.grad_weights(x_RD, grad_RF, weights_EDF, offsets),
    )


def gather_grouped_mm(
    x_TD: Tensor,
    weights_EDF: Tensor,
    offsets: Tensor,
    row_to_slot_R: Tensor,
    slot_to_row_TK: Tensor,
) -> Tensor:
    op = "gather_grouped_mm"
    check.check_gather_grouped_mm(op, x_TD, weights_EDF, offsets, row_to_slot_R, slot_to_row_TK)
    check_values.check_offsets(op, offsets, len(row_to_slot_R))
    check_values.check_inverse(op, row_to_slot_R, slot_to_row_TK)
    k = slot_to_row_TK.shape[1]
    return triton_grouped.multiply(x_TD, weights_EDF, offsets, row_to_slot_R, k)


def gather_grouped_mm_backward(
    grad_RF: Tensor,
    x_TD: Tensor,
    weights_EDF: Tensor,
    offsets: Tensor,
    row_to_slot_R: Tensor,
    slot_to_row_TK: Tensor,
) -> tuple[Tensor, Tensor]:
    op = "gather_grouped_mm_backward"
    check.check_gather_grouped_mm(op, x_TD, weights_EDF, offsets, row_to_slot_R, slot_to_row_TK)
    check.require_grad(op, grad_RF, x_TD, len(row_to_slot_R), weights_EDF.shape[2])
    check_values.check_offsets(op, offsets, len(row_to_slot_R))
    check_values.check_inverse(op, row_to_slot_R, slot_to_row_TK)
    k = slot_to_row_TK.shape[1]
    grad_rows_RD = triton_grouped.multiply(grad_RF, weights_EDF.transpose(1, 2), offsets)
    return (
        triton_rows.sum_rows(grad_rows_RD, None, slot_to_row_TK),
        triton_grouped.grad_weights(x_TD, grad_RF, weights_EDF, offsets, row_to_slot_R, k),
    )


IMPLEMENTS: Mapping[str, Callable[..., Any]] = MappingProxyType(
    {
        "moe_topk": moe_topk,
        "moe_topk_backward": moe_topk_backward,
        "moe_plan": moe_plan,
        "moe_permute": moe_permute,
        "moe_permute_backward": moe_permute_backward,
        "moe_unpermute": moe_unpermute,
        "moe_unpermute_backward": moe_unpermute_backward,
        "grouped_mm": grouped_mm,
        "grouped_mm_backward": grouped_mm_backward,
        "gather_grouped_mm": gather_grouped_mm,
        "gather_grouped_mm_backward": gather_grouped_mm_backward,
    }
)


def compile_cases() -> Iterator[CompileCase]:
    """Every kernel at the tiles that it is launched with: routing at its limits, wide rows."""
    yield from _topk_cases()
    yield from _plan_cases()
    yield from _row_cases()
    yield from _grouped_cases()


def _case(
    name: str, kernel: Any, types: str, constexprs: Mapping[str, Any], **options: Any
) -> CompileCase:
    """`types` stands for the arguments that are not constexprs, in order."""
    names = [name for name in kernel.arg_names if name not in constexprs]
    types_of = dict(zip(names, types.split(), strict=True))
    signature = {name: types_of.get(name, "constexpr") for name in kernel.arg_names}
    sizes = ("width", "out_width", "stride_e", "stride_d", "stride_f")
    divisible = tuple(name for name in sizes if name in types_of)
    return CompileCase(name, kernel, signature, constexprs, divisible=divisible, **options)


def _topk_cases() -> Iterator[CompileCase]:
    for num_experts, k, score, dtype in (
        (64, 8, "softmax", "bf16"),
        (256, 8, "sigmoid", "fp32"),
        (triton_topk.MAX_EXPERTS, triton_topk.MAX_K, "sigmoid", "fp32"),
    ):
        tokens, experts = triton_topk.blocks(num_experts)
        shared = {
            "K": k,
            "SIGMOID": score == "sigmoid",
            "RENORMALIZE": True,
            "BLOCK_T": tokens,
            "BLOCK_E": experts,
        }
        name = f"{score} {dtype} E={num_experts} k={k}"
        yield _case(
            f"topk {name}",
            triton_topk.topk_kernel,
            f"*{dtype} *fp32 *fp32 *i32 *i32 *fp32 *fp32 i32 i32 fp32",
            {**shared, "HAS_BIAS": score == "sigmoid", "BLOCK_K": k},
        )
        yield _case(
            f"topk_backward {name}",
            triton_topk.topk_backward_kernel,
            f"*fp32 *fp32 *fp32 *{dtype} *i32 *{dtype} i32 i32 fp32",
            shared,
        )


def _plan_cases() -> Iterator[CompileCase]:
    chunk = {"CHUNK": triton_plan.CHUNK}
    most = triton_topk.MAX_EXPERTS
    yield _case(
        "plan count", triton_plan.count_kernel, "*i32 *i32 i32 i32", {**chunk, "BLOCK_E": most}
    )
    yield _case(
        "plan place",
        triton_plan.place_kernel,
        "*i32 *i32 *i32 *i32 *i32 i32 i32 i32 i32",
        chunk,
        num_warps=triton_plan.PLACE_WARPS,
    )


def _row_cases() -> Iterator[CompileCase]:
    block = {"BLOCK_D": triton_rows.MAX_BLOCK}
    for dtype in ("bf16", "fp32"):
        yield _case(
            f"permute {dtype}",
            triton_rows.permute_kernel,
            f"*{dtype} *i32 *{dtype} i32 i32",
            {"K": 8, **block},
        )
        yield _case(
            f"zero_padding {dtype}",
            triton_rows.zero_padding_kernel,
            f"*i32 *{dtype} i32 i32",
            {"BLOCK_R": triton_rows.PADDING_ROWS, **block},
        )
        for weighted in (True, False):
            yield _case(
                f"{'unpermute' if weighted else 'permute_backward'} {dtype}",
                triton_rows.sum_kernel,
                f"*{dtype} *fp32 *i32 *{dtype} i32 i32",
                {"K": 8, "WEIGHTED": weighted, **block},
            )
        yield _case(
            f"unpermute_backward {dtype}",
            triton_rows.unpermute_backward_kernel,
            f"*{dtype} *{dtype} *fp32 *i32 *{dtype} *fp32 i32",
            {"WIDTH": 2 * triton_rows.MAX_BLOCK, "K": 8, **block},
        )


def _grouped_cases() -> Iterator[CompileCase]:
    for dtype in ("bf16", "fp32"):
        yield _case(
            f"zero_tail {dtype}",
            triton_grouped.zero_tail_kernel,
            f"*i32 *{dtype} i32 i32 i32",
            {"BLOCK_R": triton_grouped.TAIL_ROWS, "BLOCK_D": triton_grouped.TAIL_COLUMNS},
        )
    for tile, dtype in ((LARGE, "bf16"), (NARROW, "bf16"), (SMALL, "bf16"), (FLOAT32, "fp32")):
        sizes = {"BLOCK_M": tile.rows, "BLOCK_N": tile.columns, "BLOCK_K": tile.depth}
        runs = {"num_warps": tile.num_warps, "num_stages": tile.num_stages}
        for gather in (False, True):
            shared = {"GATHER": gather, "EVEN_D": True, "EVEN_F": True, **sizes}
            name = f"{'gather_' * gather}grouped_mm {tile.rows}x{tile.columns}x{tile.depth} {dtype}"
            yield _case(
                name,
                triton_grouped.grouped_kernel,
                f"*{dtype} *{dtype} *i32 *i32 *{dtype}" + " i32" * 8,
                {**shared, "BLOCK_E": 128, "GROUP": GROUP_TILES, "WIDTH": 4096, "stride_f": 1},
                **runs,
            )
            if tile in (NARROW, FLOAT32):
                yield _case(
                    f"{name} grad_weights",
                    triton_grouped.grad_weights_kernel,
                    f"*{dtype} *{dtype} *i32 *i32 *{dtype}" + " i32" * 5,
                    shared,
                    **runs,
                )
    # The gradient of x multiplies by the transposed matrix: its other stride is 1.
    sizes = {"BLOCK_M": LARGE.rows, "BLOCK_N": LARGE.columns, "BLOCK_K": LARGE.depth}
    yield _case(
        "grouped_mm 128x256x64 bf16 transposed",
        triton_grouped.grouped_kernel,
        "*bf16 *bf16 *i32 *i32 *bf16" + " i32" * 8,
        {
            **sizes,
            "GATHER": False,
            "EVEN_D": True,
            "EVEN_F": True,
            "BLOCK_E": 128,
            "GROUP": GROUP_TILES,
            "WIDTH": 4096,
            "stride_d": 1,
        },
        num_warps=LARGE.num_warps,
        num_stages=LARGE.num_stages,
    )
