"""Definition of the mixture-of-experts ops: choose experts, plan, permute, multiply, unpermute.

Shape suffixes: T tokens, E experts, K experts a token (k), S slots (S = T * k; slot t * k + j is
the j-th choice of token t), R rows of the permuted layout, D input and F output width.
The row layout: expert e owns rows offsets[e] to offsets[e + 1]; its slots stand there in token
order, then padding up to a multiple of the alignment. R depends on shapes only (`num_rows`), so
nothing waits for the device; rows from offsets[E] on are padding too.
All is deterministic. Left out: expert parallelism, and noise in the choice.
"""

import torch
from torch import Tensor

from carillon.kernels.moe_routing import check, check_values
from carillon.kernels.roofline import Cost

# Added to sums of scores that are divided by, as in DeepSeek-V3's published code.
SMALLEST_SUM = 1e-20


def moe_topk(
    logits_TE: Tensor,
    k: int,
    score: str = "softmax",
    renormalize: bool = True,
    scale: float = 1.0,
    selection_bias_E: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Chooses k experts a token and weighs them; gives what the balancing losses need.

    The scores are softmax(logits) over the experts (Switch, arXiv:2101.03961 eq. 1; Mixtral,
    arXiv:2401.04088 section 2.1) or sigmoid(logits), with which the choice may be by
    score + selection_bias while the weights are the scores alone (DeepSeek-V3, arXiv:2412.19437
    eq. 12-16). `renormalize` divides a token's k weights by their sum; then they are multiplied
    by `scale`. Without a bias the choice is by the logits themselves, so that no rounding enters.
    Equal candidates: the lower expert first. Weights stand in falling order of the choice.

    Shapes: logits (T, E) float32 or bfloat16 -> weights (T, k) float32, indices (T, k) int32,
    tokens_per_expert (E,) int32, mean_scores (E,) float32: the mean over tokens of the scores,
    for sigmoid of the scores over their sum, and z_loss () float32: the mean over tokens of
    logsumexp(logits)^2 (ST-MoE, arXiv:2202.08906 eq. 5). No tokens: mean_scores and z_loss are 0.
    Computed in float32. Gradients flow to the logits from weights, mean_scores and z_loss, none
    to the bias. Deterministic.

    Raises:
        ValueError: another type or shape, no expert, k outside 1..E, another score, a scale that
            is not finite and positive, a bias without sigmoid; on the CPU also logits or a bias
            that are not finite (elsewhere they give weights that are not, and valid indices).
    """
    check.check_topk(logits_TE, k, score, scale, selection_bias_E)
    check_values.check_finite("moe_topk", "logits", logits_TE)
    if selection_bias_E is not None:
        check_values.check_finite("moe_topk", "selection_bias", selection_bias_E)
    logits_TE = logits_TE.float()
    num_tokens, num_experts = logits_TE.shape
    scores_TE = logits_TE.softmax(1) if score == "softmax" else logits_TE.sigmoid()
    by_TE = logits_TE if selection_bias_E is None else scores_TE + selection_bias_E
    indices_TK = by_TE.detach().sort(dim=1, descending=True, stable=True).indices[:, :k]
    weights_TK = scores_TE.gather(1, indices_TK)
    if renormalize:
        weights_TK = weights_TK / (weights_TK.sum(1, keepdim=True) + SMALLEST_SUM)
    shares_TE = scores_TE
    if score == "sigmoid":
        shares_TE = scores_TE / (scores_TE.sum(1, keepdim=True) + SMALLEST_SUM)
    return (
        weights_TK * scale,
        indices_TK.int(),
        torch.bincount(indices_TK.reshape(-1), minlength=num_experts).int(),
        shares_TE.sum(0) / max(num_tokens, 1),
        logits_TE.logsumexp(1).square().sum() / max(num_tokens, 1),
    )


def num_rows(num_slots: int, num_experts: int, alignment: int, capacity: int | None) -> int:
    """Rows that any choice of experts fits into; they follow from shapes, not from the choice."""
    most = num_slots + min(num_experts, num_slots) * (alignment - 1)
    most = most // alignment * alignment
    if capacity is None:
        return most
    return min(most, num_experts * (-(-capacity // alignment) * alignment))


def moe_plan(
    indices_TK: Tensor, num_experts: int, alignment: int = 16, capacity: int | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Lays the slots out by expert: a stable counting sort with padded segments.

    With a `capacity` an expert takes its first `capacity` slots in token order and the others are
    dropped (Switch, arXiv:2101.03961 eq. 3; GShard, arXiv:2006.16668 section 2.2); without, none
    is. Each expert's segment is padded to a multiple of `alignment`; offsets[1:] is what
    torch._grouped_mm takes.

    Shapes: indices (T, k) int32 -> offsets (E + 1,), row_to_slot (R,) with -1 for padding,
    slot_to_row (T, k) with -1 for dropped; all int32, R by `num_rows`. Deterministic.

    Raises:
        ValueError: indices of another type or shape, no expert, alignment or capacity below 1,
            over 2^31 - 1 rows; on the CPU also an index outside 0..E-1 (elsewhere it is dropped).
    """
    check.check_plan(indices_TK, num_experts, alignment, capacity)
    check_values.check_indices("moe_plan", indices_TK, num_experts)
    device, num_slots = indices_TK.device, indices_TK.numel()
    expert_S = indices_TK.reshape(-1).long()
    # What is outside counts as one expert more, which keeps nothing.
    expert_S = expert_S.where((expert_S >= 0) & (expert_S < num_experts), num_experts)
    order_S = expert_S.argsort(stable=True)
    count_E = torch.bincount(expert_S, minlength=num_experts + 1)
    kept_E = count_E if capacity is None else count_E.clamp(max=capacity)
    kept_E = torch.cat([kept_E[:num_experts], kept_E.new_zeros(1)])
    padded_E = (kept_E[:num_experts] + alignment - 1) // alignment * alignment
    offsets = torch.cat([padded_E.new_zeros(1), padded_E.cumsum(0)])
    rank_S = torch.empty_like(order_S)
    rank_S[order_S] = (
        torch.arange(num_slots, device=device) - (count_E.cumsum(0) - count_E)[expert_S[order_S]]
    )
    row_S = torch.where(rank_S < kept_E[expert_S], offsets[expert_S] + rank_S, -1)
    size = num_rows(num_slots, num_experts, alignment, capacity)
    row_to_slot_R = torch.full((size,), -1, device=device)
    kept_S = torch.nonzero(row_S >= 0)[:, 0]
    row_to_slot_R[row_S[kept_S]] = kept_S
    return offsets.int(), row_to_slot_R.int(), row_S.view_as(indices_TK).int()


def moe_permute(x_TD: Tensor, row_to_slot_R: Tensor, slot_to_row_TK: Tensor) -> Tensor:
    """Copies each token to the rows of its slots; padding rows are zero.

    Shapes: x (T, D) float32 or bfloat16, maps of moe_plan -> (R, D) of x's type. The gradient of
    a token is the sum of its rows', in float32, in the order of its slots. Deterministic.

    Raises:
        ValueError: another type, shape or device; on the CPU also maps that are not each other's
            inverse.
    """
    check.check_permute(x_TD, row_to_slot_R, slot_to_row_TK)
    check_values.check_inverse("moe_permute", row_to_slot_R, slot_to_row_TK)
    num_tokens, k = slot_to_row_TK.shape
    token_R = torch.where(row_to_slot_R >= 0, row_to_slot_R // k, num_tokens).long()
    return _with_zero_row(x_TD)[token_R].to(x_TD.dtype)


def moe_unpermute(
    rows_RD: Tensor, weights_TK: Tensor, row_to_slot_R: Tensor, slot_to_row_TK: Tensor
) -> Tensor:
    """Sums each token's rows by their weights; a dropped slot adds nothing.

    Shapes: rows (R, D) float32 or bfloat16, weights (T, k) float32, maps of moe_plan -> (T, D) of
    the rows' type. Products and sums in float32, rounded once. Gradients to rows (padding: zero)
    and weights (dropped: zero). Deterministic.

    Raises:
        ValueError: another type, shape or device; on the CPU also maps that are not each other's
            inverse.
    """
    check.check_unpermute("moe_unpermute", rows_RD, weights_TK, row_to_slot_R, slot_to_row_TK)
    check_values.check_inverse("moe_unpermute", row_to_slot_R, slot_to_row_TK)
    kept_TK = slot_to_row_TK >= 0
    row_TK = torch.where(kept_TK, slot_to_row_TK, len(rows_RD)).long()
    taken_TKD = _with_zero_row(rows_RD)[row_TK]
    weighted_TKD = torch.where(kept_TK[..., None], taken_TKD * weights_TK[..., None], 0.0)
    return weighted_TKD.sum(1).to(rows_RD.dtype)


def grouped_mm(x_RD: Tensor, weights_EDF: Tensor, offsets: Tensor) -> Tensor:
    """Multiplies each expert's rows by its matrix; rows from offsets[E] on become zero.

    Shapes: x (R, D), weights (E, D, F) of one type, float32 or bfloat16, any strides, offsets
    (E + 1,) int32 -> (R, F) of that type. Sums in float32, rounded once. Gradients to x and
    weights. Deterministic.

    Raises:
        ValueError: another type, shape or device, no expert; on the CPU also offsets that do not
            start at 0, that fall, or that end past R (elsewhere they are held within 0..R).
    """
    check.check_grouped_mm("grouped_mm", x_RD, weights_EDF, offsets)
    check_values.check_offsets("grouped_mm", offsets, x_RD.shape[0])
    return _grouped(x_RD, weights_EDF, offsets)


def gather_grouped_mm(
    x_TD: Tensor,
    weights_EDF: Tensor,
    offsets: Tensor,
    row_to_slot_R: Tensor,
    slot_to_row_TK: Tensor,
) -> Tensor:
    """grouped_mm(moe_permute(x)), without the permuted copy in the faster providers.

    Shapes: x (T, D), weights (E, D, F), plan of moe_plan -> (R, F). Sums, gradients, determinism
    as grouped_mm and moe_permute.

    Raises:
        ValueError: as grouped_mm and moe_permute.
    """
    op = "gather_grouped_mm"
    check.check_gather_grouped_mm(op, x_TD, weights_EDF, offsets, row_to_slot_R, slot_to_row_TK)
    check_values.check_offsets(op, offsets, len(row_to_slot_R))
    check_values.check_inverse(op, row_to_slot_R, slot_to_row_TK)
    return _grouped(moe_permute(x_TD, row_to_slot_R, slot_to_row_TK), weights_EDF, offsets)


def _with_zero_row(rows_RD: Tensor) -> Tensor:
    """In float32, with a last row of zeros for slots and rows that name none."""
    return torch.cat([rows_RD.float(), rows_RD.new_zeros((1, rows_RD.shape[1])).float()])


def _grouped(x_RD: Tensor, weights_EDF: Tensor, offsets: Tensor) -> Tensor:
    ends = offsets.tolist()
    segments = [
        x_RD[begin:end] @ weight_DF
        for begin, end, weight_DF in zip(ends[:-1], ends[1:], weights_EDF, strict=True)
    ]
    rest = x_RD.new_zeros((x_RD.shape[0] - ends[-1], weights_EDF.shape[2]))
    return torch.cat([*segments, rest])


def cost(
    num_tokens: int,
    num_experts: int,
    k: int,
    width: int,
    size_bytes: int,
    *,
    backward: bool = True,
) -> Cost:
    """Least work of topk, plan, permute and unpermute, forward and backward, without padding.

    Logits are read twice and their gradient written once; x, the result and both gradients of
    them pass once; rows are written twice (permuted, gradient) and read three times (unpermute,
    its gradient of the weights, permute's backward). Without `backward` only what the forward
    pass does: logits once, x and the result, rows written and read once.
    """
    logits = (3 if backward else 1) * num_tokens * num_experts * size_bytes
    tokens = (4 if backward else 2) * num_tokens * width * size_bytes
    rows = (5 if backward else 2) * num_tokens * k * width * size_bytes
    maps = (12 if backward else 6) * num_tokens * k * 4
    flops = (8.0 if backward else 2.0) * num_tokens * k * width
    return Cost(flops=flops, size_bytes=float(logits + tokens + rows + maps))
