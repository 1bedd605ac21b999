"""Routing and permutation against torch's compositions: topk, plan, permute, unpermute and back.

Run by `pytest -c benchmarks/pytest.ini benchmarks/test_moe_routing.py --benchmark-json=FILE`. Both
sides give the weighted sum of permuted rows, the balancing and z losses, and the gradients of x
and logits. Two compositions: one gathers each token's rows and multiplies, one scatters with
index_add; the bar is against the faster. Turns of three calls alternate and the first of each is
not counted: on a virtual machine memory that was given back is slow to touch again. Beside ours
stands a plain copy into memory that was touched before: what the machine's memory gives at most.
"""

import statistics
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from carillon.kernels.moe_routing.balance import load_balancing_loss
from carillon.kernels.moe_routing.reference import cost
from carillon.kernels.roofline import floor_s
from carillon.kernels.table import resolve

BAR = 3.0
Side = Callable[[Tensor, Tensor, int], tuple[Tensor, Tensor]]


def ours(x_TD: Tensor, logits_TE: Tensor, k: int) -> tuple[Tensor, Tensor]:
    topk, plan, permute, unpermute = (
        resolve(name, "cpu") for name in ("moe_topk", "moe_plan", "moe_permute", "moe_unpermute")
    )
    weights_TK, indices_TK, counts_E, means_E, z = topk(logits_TE, k)
    _, *maps = plan(indices_TK, logits_TE.shape[1])
    out_TD = unpermute(permute(x_TD, *maps), weights_TK, *maps)
    return out_TD, load_balancing_loss(means_E, counts_E) + z


def routed(logits_TE: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """Weights, the order of the slots by expert, and the losses."""
    logits_TE = logits_TE.float()
    scores_TE = logits_TE.softmax(1)
    weights_TK, indices_TK = scores_TE.topk(k, dim=1)
    weights_TK = weights_TK / weights_TK.sum(1, keepdim=True)
    slots_S = indices_TK.reshape(-1)
    counts_E = torch.bincount(slots_S, minlength=logits_TE.shape[1])
    losses = load_balancing_loss(scores_TE.mean(0), counts_E)
    return weights_TK, slots_S.argsort(stable=True), losses + logits_TE.logsumexp(1).square().mean()


def gathering(x_TD: Tensor, logits_TE: Tensor, k: int) -> tuple[Tensor, Tensor]:
    weights_TK, order_S, losses = routed(logits_TE, k)
    rows_SD = x_TD.index_select(0, order_S // k)
    inverse_S = torch.empty_like(order_S)
    inverse_S[order_S] = torch.arange(len(order_S))
    rows_TKD = rows_SD.index_select(0, inverse_S).view(len(x_TD), k, -1)
    return torch.bmm(weights_TK[:, None].to(x_TD.dtype), rows_TKD)[:, 0], losses


def scattering(x_TD: Tensor, logits_TE: Tensor, k: int) -> tuple[Tensor, Tensor]:
    weights_TK, order_S, losses = routed(logits_TE, k)
    token_S = order_S // k
    rows_SD = x_TD.index_select(0, token_S)
    weighted_SD = rows_SD * weights_TK.reshape(-1)[order_S][:, None].to(x_TD.dtype)
    return torch.zeros_like(x_TD).index_add(0, token_S, weighted_SD), losses


def copy_bytes_per_s(size_bytes: int) -> float:
    """Of a copy into memory that is there already: bytes read and written."""
    source = torch.ones(size_bytes, dtype=torch.uint8)
    target = torch.zeros_like(source)
    took = []
    for _ in range(9):
        begin = time.perf_counter()
        target.copy_(source)
        took.append(time.perf_counter() - begin)
    return 2 * size_bytes / statistics.median(took)


SIDES: dict[str, Side] = {"ours": ours, "gathering": gathering, "scattering": scattering}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("num_tokens", "num_experts", "k", "width"),
    [(16384, 64, 8, 512), (16384, 8, 2, 512), (4096, 64, 8, 1024)],
    ids=str,
)
def test_moe_routing(
    benchmark: Any, num_tokens: int, num_experts: int, k: int, width: int, dtype: torch.dtype
) -> None:
    generator = torch.Generator().manual_seed(0)
    x_TD = torch.randn(num_tokens, width, generator=generator).to(dtype).requires_grad_()
    logits_TE = torch.randn(num_tokens, num_experts, generator=generator).to(dtype).requires_grad_()
    grad_TD = torch.randn(num_tokens, width, generator=generator).to(dtype)
    took: dict[str, list[float]] = {name: [] for name in SIDES}

    def turn(name: str) -> None:
        for call in range(3):
            x_TD.grad = logits_TE.grad = None
            begin = time.perf_counter()
            out_TD, losses = SIDES[name](x_TD, logits_TE, k)
            torch.autograd.backward([out_TD, losses], [grad_TD, torch.ones(())])
            if call:
                took[name].append(time.perf_counter() - begin)

    def others() -> None:
        turn("gathering")
        turn("scattering")

    benchmark.pedantic(lambda: turn("ours"), setup=others, rounds=5, warmup_rounds=1)
    median_s = {name: statistics.median(times) for name, times in took.items()}
    ratio = {
        name: round(statistics.median(a / b for a, b in zip(times, took["ours"], strict=True)), 2)
        for name, times in took.items()
    }
    least = cost(num_tokens, num_experts, k, width, dtype.itemsize)
    benchmark.extra_info.update(
        unit="s, forward and backward, medians of alternating calls; ratio: theirs over ours",
        torch=torch.__version__,
        num_threads=torch.get_num_threads(),
        median_call_s={name: round(value, 4) for name, value in median_s.items()},
        ratio=ratio,
        bar=BAR,
        gigabytes_per_s=round(least.size_bytes / median_s["ours"] / 1e9, 2),
        copy_gigabytes_per_s=round(copy_bytes_per_s(x_TD.nbytes * k) / 1e9, 2),
        h100_floor_s=floor_s(least),
        over_h100_floor=round(median_s["ours"] / floor_s(least)),
    )
    assert min(ratio["gathering"], ratio["scattering"]) >= BAR
