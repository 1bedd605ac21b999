"""moe_topk in Triton: a program routes a block of tokens in registers and writes partial sums.

Scores, choice, counts and losses' inputs come from one read of the logits. The choice is k maxima
of unique 64-bit keys (ordered bits of the value, then the lower expert). Partial sums are added
by torch in a fixed order, so results do not depend on scheduling.
Status: compiled for sm_90 and run in the interpreter; not run on a GPU yet.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

MAX_EXPERTS = 512
MAX_K = 16
BLOCK_SIZE = 1024  # scores of a program: 8 a thread of 4 warps
EPSILON = tl.constexpr(1e-20)
INDEX_MASK = tl.constexpr(0x7FFFFFFF)
NO_KEY = tl.constexpr(-(2**63))


@triton.jit
def softmax_of(logits):
    largest = tl.max(logits, axis=1)
    exps = tl.exp(logits - largest[:, None])
    total = tl.sum(exps, axis=1)
    return exps / total[:, None], largest + tl.log(total)


@triton.jit
def sigmoid_of(logits, is_expert):
    small = tl.exp(-tl.abs(logits))
    return tl.where(is_expert, tl.where(logits < 0, small, 1.0) / (1.0 + small), 0.0)


@triton.jit
def keys_of(values, experts, is_expert):
    """Larger for a larger value, then for a lower expert; a NaN is below all numbers."""
    bits = tl.where(values == 0.0, 0.0, values).to(tl.int32, bitcast=True)
    ordered = bits ^ ((bits >> 31) & INDEX_MASK)
    ordered = tl.where(values == values, ordered, -INDEX_MASK)
    keys = (ordered.to(tl.int64) << 32) | (experts ^ INDEX_MASK).to(tl.int64)
    return tl.where(is_expert, keys, NO_KEY)


@triton.jit
def topk_kernel(
    logits_ptr, bias_ptr, weights_ptr, indices_ptr, counts_ptr, means_ptr, z_ptr,
    num_tokens, num_experts, scale,
    K: tl.constexpr, SIGMOID: tl.constexpr, RENORMALIZE: tl.constexpr, HAS_BIAS: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    tokens = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    experts = tl.arange(0, BLOCK_E)
    slots = tl.arange(0, BLOCK_K)
    is_token = tokens < num_tokens
    is_expert = (experts < num_experts)[None, :]
    wanted = is_token[:, None] & is_expert
    at = tokens.to(tl.int64)[:, None] * num_experts + experts[None, :]
    # Rows past the last token are zero rather than -inf: their softmax must not be NaN.
    logits = tl.load(logits_ptr + at, mask=wanted, other=0.0).to(tl.float32)
    logits = tl.where(is_expert, logits, float("-inf"))
    softmax, log_sum_exp = softmax_of(logits)
    scores = sigmoid_of(logits, is_expert) if SIGMOID else softmax
    by = logits
    if HAS_BIAS:
        by = scores + tl.load(bias_ptr + experts, mask=experts < num_experts, other=0.0)[None, :]
    keys = keys_of(by, experts[None, :], is_expert)

    weights = tl.zeros((BLOCK_T, BLOCK_K), tl.float32)
    indices = tl.zeros((BLOCK_T, BLOCK_K), tl.int32)
    for j in range(K):
        best = tl.max(keys, axis=1)
        expert = ((best & INDEX_MASK) ^ INDEX_MASK).to(tl.int32)
        weight = tl.sum(tl.where(experts[None, :] == expert[:, None], scores, 0.0), axis=1)
        weights = tl.where(slots[None, :] == j, weight[:, None], weights)
        indices = tl.where(slots[None, :] == j, expert[:, None], indices)
        keys = tl.where(keys == best[:, None], NO_KEY, keys)
    if RENORMALIZE:
        weights = weights / (tl.sum(weights, axis=1)[:, None] + EPSILON)
    to = tokens.to(tl.int64)[:, None] * K + slots[None, :]
    in_slots = is_token[:, None] & (slots < K)[None, :]
    tl.store(weights_ptr + to, weights * scale, mask=in_slots)
    tl.store(indices_ptr + to, indices, mask=in_slots)

    # Chosen are the experts whose key is gone.
    chosen = wanted & (keys == NO_KEY)
    part = tl.program_id(0).to(tl.int64) * num_experts + experts
    tl.store(counts_ptr + part, tl.sum(chosen.to(tl.int32), axis=0), mask=experts < num_experts)
    shares = scores / (tl.sum(scores, axis=1)[:, None] + EPSILON) if SIGMOID else scores
    shares = tl.where(wanted, shares, 0.0)
    tl.store(means_ptr + part, tl.sum(shares, axis=0), mask=experts < num_experts)
    squares = tl.where(is_token, log_sum_exp * log_sum_exp, 0.0)
    tl.store(z_ptr + tl.program_id(0), tl.sum(squares, axis=0))


@triton.jit
def topk_backward_kernel(
    grad_weights_ptr, grad_means_ptr, grad_z_ptr, logits_ptr, indices_ptr, grad_logits_ptr,
    num_tokens, num_experts, scale,
    K: tl.constexpr, SIGMOID: tl.constexpr, RENORMALIZE: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    tokens = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    experts = tl.arange(0, BLOCK_E)
    is_token = tokens < num_tokens
    is_expert = (experts < num_experts)[None, :]
    wanted = is_token[:, None] & is_expert
    at = tokens.to(tl.int64)[:, None] * num_experts + experts[None, :]
    logits = tl.load(logits_ptr + at, mask=wanted, other=0.0).to(tl.float32)
    logits = tl.where(is_expert, logits, float("-inf"))
    softmax, log_sum_exp = softmax_of(logits)
    scores = sigmoid_of(logits, is_expert) if SIGMOID else softmax
    means = tl.load(grad_means_ptr + experts, mask=experts < num_experts, other=0.0)
    grads = tl.zeros((BLOCK_T, BLOCK_E), tl.float32) + (means / num_tokens)[None, :]
    if SIGMOID:
        inverse = 1.0 / (tl.sum(scores, axis=1) + EPSILON)
        mean = tl.sum(grads * scores, axis=1) * inverse
        grads = (grads - mean[:, None]) * inverse[:, None]

    total = tl.zeros((BLOCK_T,), tl.float32) + EPSILON
    weighted = tl.zeros((BLOCK_T,), tl.float32)
    slots = tokens.to(tl.int64) * K
    if RENORMALIZE:
        for j in range(K):
            expert = tl.load(indices_ptr + slots + j, mask=is_token, other=-1)
            grad = tl.load(grad_weights_ptr + slots + j, mask=is_token, other=0.0)
            score = tl.sum(tl.where(experts[None, :] == expert[:, None], scores, 0.0), axis=1)
            total += score
            weighted += score * grad
    for j in range(K):
        expert = tl.load(indices_ptr + slots + j, mask=is_token, other=-1)
        grad = tl.load(grad_weights_ptr + slots + j, mask=is_token, other=0.0)
        if RENORMALIZE:
            grad = (grad - weighted / total) / total
        grads += tl.where(experts[None, :] == expert[:, None], (grad * scale)[:, None], 0.0)

    of_z = 2.0 * tl.load(grad_z_ptr) / num_tokens * log_sum_exp[:, None]
    if SIGMOID:
        grad_logits = grads * scores * (1.0 - scores) + of_z * softmax
    else:
        dot = tl.sum(grads * scores, axis=1)
        grad_logits = softmax * (grads - dot[:, None] + of_z)
    tl.store(grad_logits_ptr + at, grad_logits.to(grad_logits_ptr.dtype.element_ty), mask=wanted)


def blocks(num_experts: int) -> tuple[int, int]:
    """Tokens and experts of a program."""
    block_experts = max(triton.next_power_of_2(num_experts), 2)
    return max(BLOCK_SIZE // block_experts, 1), block_experts


def require_size(op: str, num_experts: int, k: int) -> None:
    if num_experts > MAX_EXPERTS or k > MAX_K:
        raise ValueError(
            f"{op}: the triton provider takes at most {MAX_EXPERTS} experts and k = {MAX_K}, "
            f"got {num_experts} and {k}"
        )


def route(
    logits_TE: Tensor, k: int, score: str, renormalize: bool, scale: float, bias_E: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    num_tokens, num_experts = logits_TE.shape
    require_size("moe_topk", num_experts, k)
    block_tokens, block_experts = blocks(num_experts)
    programs = triton.cdiv(num_tokens, block_tokens)
    weights_TK = torch.empty(num_tokens, k, dtype=torch.float32, device=logits_TE.device)
    indices_TK = torch.empty_like(weights_TK, dtype=torch.int32)
    means = torch.empty(programs, num_experts, dtype=torch.float32, device=logits_TE.device)
    counts = torch.empty_like(means, dtype=torch.int32)
    z = torch.empty(programs, dtype=torch.float32, device=logits_TE.device)
    logits_TE = logits_TE.contiguous()
    bias_E = None if bias_E is None else bias_E.contiguous()
    if programs:
        topk_kernel[(programs,)](
            logits_TE, weights_TK if bias_E is None else bias_E, weights_TK, indices_TK,
            counts, means, z, num_tokens, num_experts, scale,
            K=k, SIGMOID=score == "sigmoid", RENORMALIZE=renormalize, HAS_BIAS=bias_E is not None,
            BLOCK_T=block_tokens, BLOCK_E=block_experts, BLOCK_K=triton.next_power_of_2(k),
        )  # fmt: skip
    divisor = max(num_tokens, 1)
    return (
        weights_TK,
        indices_TK,
        counts.sum(0, dtype=torch.int32),
        means.sum(0) / divisor,
        z.sum() / divisor,
    )


def route_backward(
    grad_weights_TK: Tensor,
    grad_means_E: Tensor,
    grad_z: Tensor,
    logits_TE: Tensor,
    indices_TK: Tensor,
    score: str,
    renormalize: bool,
    scale: float,
) -> Tensor:
    num_tokens, num_experts = logits_TE.shape
    k = indices_TK.shape[1]
    require_size("moe_topk_backward", num_experts, k)
    block_tokens, block_experts = blocks(num_experts)
    logits_TE = logits_TE.contiguous()
    grad_logits_TE = torch.empty_like(logits_TE)
    if num_tokens:
        topk_backward_kernel[(triton.cdiv(num_tokens, block_tokens),)](
            grad_weights_TK.contiguous(), grad_means_E.contiguous(), grad_z.contiguous(),
            logits_TE, indices_TK.contiguous(), grad_logits_TE, num_tokens, num_experts, scale,
            K=k, SIGMOID=score == "sigmoid", RENORMALIZE=renormalize,
            BLOCK_T=block_tokens, BLOCK_E=block_experts,
        )  # fmt: skip
    return grad_logits_TE
