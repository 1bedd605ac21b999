"""Each bad argument is a ValueError with one message, whichever provider is asked."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from carillon.kernels.table import OPS, load_native, load_torch, load_triton, resolve

LOGITS = torch.zeros(4, 3)
INDICES = torch.tensor([[0, 1], [1, 2], [2, 0]], dtype=torch.int32)
OFFSETS, ROWS, SLOTS = resolve("moe_plan", "cpu", "reference")(INDICES, 3, 4)
X, WEIGHTS = torch.zeros(3, 5), torch.zeros(3, 2)
MAPPED, MATRICES = torch.zeros(len(ROWS), 5), torch.zeros(3, 5, 6)


def changed(tensor: Tensor, at: tuple[int, ...], value: float) -> Tensor:
    copy = tensor.clone()
    copy[at] = value
    return copy


NAN = float("nan")
CASES: list[tuple[str, tuple[Any, ...], str]] = [
    ("moe_topk", (LOGITS.double(), 2), "logits must be float32 or bfloat16"),
    ("moe_topk", (LOGITS[0], 2), r"logits must have the shape \(T, E\)"),
    ("moe_topk", (LOGITS[:, :0], 1), "at least one expert, got 0"),
    ("moe_topk", (LOGITS, 4), "k must be from 1 to the number of experts 3, got 4"),
    ("moe_topk", (LOGITS, 0), "k must be from 1 to the number of experts 3, got 0"),
    ("moe_topk", (LOGITS, 2, "relu"), "score must be softmax or sigmoid, got relu"),
    ("moe_topk", (LOGITS, 2, "softmax", True, 0.0), "scale must be finite and positive, got 0"),
    ("moe_topk", (LOGITS, 2, "softmax", True, NAN), "scale must be finite and positive, got nan"),
    ("moe_topk", (LOGITS, 2, "softmax", True, 1.0, LOGITS[0]), "bias needs sigmoid scores"),
    ("moe_topk", (LOGITS, 2, "sigmoid", True, 1.0, LOGITS[0].double()), "bias must be float32"),
    ("moe_topk", (LOGITS, 2, "sigmoid", True, 1.0, LOGITS), r"bias must have the shape \(3,\)"),
    ("moe_topk", (LOGITS, 2, "sigmoid", True, 1.0, LOGITS[0] + NAN), "bias must be finite"),
    ("moe_topk", (changed(LOGITS, (3, 2), NAN), 2), "logits must be finite"),
    ("moe_topk", (changed(LOGITS, (0, 0), -float("inf")), 2), "logits must be finite"),
    ("moe_plan", (INDICES.long(), 3), "indices must be int32"),
    ("moe_plan", (INDICES[0], 3), r"indices must have the shape \(T, k\)"),
    ("moe_plan", (INDICES[:, :0], 3), "k of at least 1"),
    ("moe_plan", (INDICES, 0), "at least one expert, got 0"),
    ("moe_plan", (INDICES, 3, 0), "alignment must be at least 1, got 0"),
    ("moe_plan", (INDICES, 3, 16, 0), "capacity must be at least 1, got 0"),
    ("moe_plan", (INDICES, 3, 2**31), "at most 2147483647 rows"),
    ("moe_plan", (INDICES[:0], 2**31, 1), "at most 2147483647 rows"),
    ("moe_plan", (INDICES, 2), "indices must be from 0 to 1, got 2"),
    ("moe_plan", (changed(INDICES, (2, 1), -1), 3), "indices must be from 0 to 2, got -1"),
    ("moe_permute", (X.int(), ROWS, SLOTS), "x must be float32 or bfloat16"),
    ("moe_permute", (X[0], ROWS, SLOTS), r"x must have the shape \(T, D\)"),
    ("moe_permute", (X[:2], ROWS, SLOTS), "x must have 3 rows"),
    ("moe_permute", (X, ROWS.long(), SLOTS), "row_to_slot must be int32"),
    ("moe_permute", (X, ROWS, SLOTS.flatten()), r"slot_to_row must have the shape \(T, k\)"),
    ("moe_permute", (X, ROWS, changed(SLOTS, (1, 1), 99)), "must be -1 or from 0 to 11, got 99"),
    ("moe_permute", (X, ROWS, changed(SLOTS, (1, 1), -2)), "must be -1 or from 0 to 11, got -2"),
    ("moe_permute", (X, ROWS, changed(SLOTS, (1, 1), -1)), "each other's inverse"),
    ("moe_permute", (X, changed(ROWS, (0,), 10**6), SLOTS), "each other's inverse"),
    ("moe_permute", (X, changed(ROWS, (3,), -7), SLOTS), "each other's inverse"),
    ("moe_unpermute", (MAPPED.half(), WEIGHTS, ROWS, SLOTS), "rows must be float32 or bfloat16"),
    ("moe_unpermute", (MAPPED, WEIGHTS.double(), ROWS, SLOTS), "weights must be float32"),
    ("moe_unpermute", (MAPPED, WEIGHTS[:, :1], ROWS, SLOTS), "must have the shape of slot_to_row"),
    ("moe_unpermute", (MAPPED[1:], WEIGHTS, ROWS, SLOTS), "rows must be 12, as row_to_slot has"),
    ("moe_unpermute", (MAPPED, WEIGHTS, ROWS.flip(0), SLOTS), "each other's inverse"),
    ("grouped_mm", (MAPPED.double(), MATRICES, OFFSETS), "x must be float32 or bfloat16"),
    ("grouped_mm", (MAPPED, MATRICES[0], OFFSETS), r"weights must have the shape \(E, D, F\)"),
    ("grouped_mm", (MAPPED, MATRICES.bfloat16(), OFFSETS), "weights must be .* as x is"),
    ("grouped_mm", (MAPPED, MATRICES[:0], OFFSETS[:1]), "at least one expert, got 0"),
    ("grouped_mm", (MAPPED, MATRICES[:, 1:], OFFSETS), "weights must have D = 5 as x has, got 4"),
    ("grouped_mm", (MAPPED, MATRICES, OFFSETS.long()), "offsets must be int32"),
    ("grouped_mm", (MAPPED, MATRICES, OFFSETS[1:]), r"E \+ 1 = 4 values, got 3"),
    ("grouped_mm", (MAPPED, MATRICES, OFFSETS + 1), "offsets must start at 0"),
    ("grouped_mm", (MAPPED, MATRICES, changed(OFFSETS, (1,), 9)), "offsets must start at 0, never"),
    ("grouped_mm", (MAPPED, MATRICES, changed(OFFSETS, (3,), 99)), "no more than the 12 rows"),
    ("gather_grouped_mm", (X[:2], MATRICES, OFFSETS, ROWS, SLOTS), "x must have 3 rows"),
    ("gather_grouped_mm", (X, MATRICES, OFFSETS + 1, ROWS, SLOTS), "offsets must start at 0"),
    ("gather_grouped_mm", (X, MATRICES, OFFSETS, ROWS.flip(0), SLOTS), "each other's inverse"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("provider", "op", "arguments", "message"),
    [(provider, *case) for case in CASES for provider in OPS[case[0]].providers["cpu"]],
)
def test_bad_argument_is_named(
    provider: str, op: str, arguments: tuple[Any, ...], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        resolve(op, "cpu", provider)(*arguments)


def test_providers_say_their_limits() -> None:
    with pytest.raises(ValueError, match="at most 512 experts and k = 16, got 513 and 1"):
        resolve("moe_topk", "cpu", "triton")(torch.zeros(1, 513), 1)
    many, offsets = torch.zeros(1024, 1, 1), torch.zeros(1025, dtype=torch.int32)
    with pytest.raises(ValueError, match="torch provider takes at most 1023 experts, got 1024"):
        resolve("grouped_mm", "cpu", "torch")(torch.zeros(1, 1), many, offsets)


GRAD = torch.zeros(4, 2)
CHOSEN = torch.zeros(4, 2, dtype=torch.int32)


ROUTED = (LOGITS, CHOSEN, "softmax", True, 1.0)
GRAD_ROWS = torch.zeros(len(ROWS), 6)
STRAY = changed(SLOTS, (1, 1), 10**6)
GRADIENT_CASES: list[tuple[str, tuple[Any, ...], str]] = [
    (
        "moe_topk_backward",
        (GRAD, LOGITS[0], LOGITS[0, 0], LOGITS, CHOSEN + 3, "softmax", True, 1.0),
        "indices must be from 0 to 2, got 3",
    ),
    (
        "moe_topk_backward",
        (GRAD, LOGITS[0], LOGITS[0, 0], LOGITS, CHOSEN - 1, "softmax", True, 1.0),
        "indices must be from 0 to 2, got -1",
    ),
    (
        "moe_topk_backward",
        (GRAD, LOGITS[0], LOGITS[0, 0], LOGITS, CHOSEN[1:], "softmax", True, 1.0),
        "indices must have 4 rows as logits has, got 3",
    ),
    (
        "moe_topk_backward",
        (GRAD, LOGITS[0], LOGITS[0, 0], LOGITS, CHOSEN, "relu", True, 1.0),
        "score must be softmax or sigmoid, got relu",
    ),
    ("moe_topk_backward", (GRAD[1:], LOGITS[0], LOGITS[0, 0], *ROUTED), "gradients must have"),
    ("moe_topk_backward", (GRAD, LOGITS[0, :2], LOGITS[0, 0], *ROUTED), "gradients must have"),
    ("moe_topk_backward", (GRAD, LOGITS[0], LOGITS[0], *ROUTED), "gradients must have"),
    ("moe_permute_backward", (MAPPED[1:], ROWS, SLOTS), "rows must be 12"),
    ("moe_permute_backward", (MAPPED.half(), ROWS, SLOTS), "grad must be float32 or bfloat16"),
    ("moe_permute_backward", (MAPPED, ROWS, STRAY), "must be -1 or from 0 to 11, got 1000000"),
    ("moe_permute_backward", (MAPPED, ROWS.flip(0), SLOTS), "each other's inverse"),
    (
        "moe_unpermute_backward",
        (X[:, 1:], MAPPED, WEIGHTS, ROWS, SLOTS),
        r"grad must be .* of the shape \(3, 5\)",
    ),
    ("moe_unpermute_backward", (X.bfloat16(), MAPPED, WEIGHTS, ROWS, SLOTS), "grad must be"),
    ("moe_unpermute_backward", (X, MAPPED[1:], WEIGHTS, ROWS, SLOTS), "rows must be 12"),
    ("moe_unpermute_backward", (X, MAPPED, WEIGHTS, ROWS, STRAY), "from 0 to 11, got 1000000"),
    (
        "grouped_mm_backward",
        (MAPPED, MAPPED, MATRICES, OFFSETS),
        r"grad must be .* of the shape \(12, 6\)",
    ),
    ("grouped_mm_backward", (GRAD_ROWS, MAPPED, MATRICES[:, 1:], OFFSETS), "weights must have D"),
    ("grouped_mm_backward", (GRAD_ROWS, MAPPED, MATRICES, OFFSETS + 1), "offsets must start at 0"),
    (
        "gather_grouped_mm_backward",
        (X, X, MATRICES, OFFSETS, ROWS, SLOTS),
        r"grad must be .* of the shape \(12, 6\)",
    ),
    (
        "gather_grouped_mm_backward",
        (GRAD_ROWS, X, MATRICES, OFFSETS + 1, ROWS, SLOTS),
        "offsets must start at 0",
    ),
    (
        "gather_grouped_mm_backward",
        (GRAD_ROWS, X, MATRICES, OFFSETS, ROWS, STRAY),
        "must be -1 or from 0 to 11, got 1000000",
    ),
]
NAMESPACES: dict[str, Callable[[], object]] = {
    "carillon": load_native,
    "carillon_triton": load_triton,
    "carillon_torch": load_torch,
}


@pytest.mark.parametrize(
    ("namespace", "op", "arguments", "message"),
    [
        (namespace, *case)
        for case in GRADIENT_CASES
        for namespace in NAMESPACES
        if namespace != "carillon_torch" or "grouped_mm" in case[0]
    ],
)
def test_gradients_check_what_they_are_given(
    namespace: str, op: str, arguments: tuple[Any, ...], message: str
) -> None:
    """They are ops too and may be called directly: no row or expert outside is ever touched."""
    NAMESPACES[namespace]()
    with pytest.raises(ValueError, match=message):
        getattr(getattr(torch.ops, namespace), op)(*arguments)
