"""Keeping experts equally busy: the balancing loss, and the bias rule that needs no loss.

Both take the counts and mean scores of moe_topk. Under data parallelism sum the counts over the
ranks first; the mean scores may stay a rank's own, since gradients are averaged.
"""

import torch
from torch import Tensor


def load_balancing_loss(mean_scores_E: Tensor, tokens_per_expert_E: Tensor) -> Tensor:
    """E * sum over e of f_e * P_e, with f_e expert e's share of all slots; 1 where all are even.

    Switch, arXiv:2101.03961 eq. 4-6, where k = 1; with more, f_e divides by the T * k slots, so
    that the least value stays 1. The coefficient is the caller's. float32, deterministic; the
    gradient flows through the mean scores alone. No slots: 0.

    Raises:
        ValueError: shapes that differ.
    """
    _require_same_shape(mean_scores_E, tokens_per_expert_E)
    share_E = tokens_per_expert_E.float() / tokens_per_expert_E.sum().clamp(min=1)
    return len(mean_scores_E) * (share_E * mean_scores_E).sum()


def updated_selection_bias(
    selection_bias_E: Tensor, tokens_per_expert_E: Tensor, speed: float
) -> Tensor:
    """Lowers the bias of experts above the mean load by `speed` and raises that of those below.

    DeepSeek-V3, arXiv:2412.19437 section 2.1.2. Called once a step, outside autograd.

    Raises:
        ValueError: shapes that differ.
    """
    _require_same_shape(selection_bias_E, tokens_per_expert_E)
    load_E = tokens_per_expert_E.double()
    return selection_bias_E.detach() + speed * torch.sign(load_E.mean() - load_E).to(
        selection_bias_E.dtype
    )


def _require_same_shape(first_E: Tensor, counts_E: Tensor) -> None:
    if first_E.dim() != 1 or first_E.shape != counts_E.shape:
        raise ValueError(
            "tokens_per_expert and what it is compared with must both have the shape (E,), "
            f"got {tuple(counts_E.shape)} and {tuple(first_E.shape)}"
        )
