"""Peers of MoE routing: (x, logits, k) -> the weighted sum of permuted rows, and the losses.

x (T, D), logits (T, E), float32 or bfloat16. No expert is computed: permute, then un-permute. The
losses are the balancing and the z loss, added.
- `gathering`: takes each token's rows back and multiplies them by its weights.
- `scattering`: adds each weighted row to its token.
- `... compiled`: the same by torch.compile.
Legend: T tokens, D width, E experts, K choices a token, S = T * K slots.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from carillon.kernels.moe_routing.balance import load_balancing_loss
from peers.compiling import compiled

Routing = Callable[[Tensor, Tensor, int], tuple[Tensor, Tensor]]
PLAIN = ("gathering", "scattering")


def available(device: str) -> dict[str, Routing]:
    """The peers by name; all run on any device."""
    plain: dict[str, Routing] = {"gathering": gathering, "scattering": scattering}
    return plain | {f"{name} compiled": compiled(peer) for name, peer in plain.items()}


def missing(device: str) -> dict[str, str]:
    """Why a peer cannot run here, by name."""
    return {}


def gathering(x_TD: Tensor, logits_TE: Tensor, k: int) -> tuple[Tensor, Tensor]:
    weights_TK, order_S, losses = _routed(logits_TE, k)
    rows_SD = x_TD.index_select(0, order_S // k)
    inverse_S = torch.empty_like(order_S)
    inverse_S[order_S] = torch.arange(len(order_S), device=x_TD.device)
    rows_TKD = rows_SD.index_select(0, inverse_S).view(len(x_TD), k, -1)
    return torch.bmm(weights_TK[:, None].to(x_TD.dtype), rows_TKD)[:, 0], losses


def scattering(x_TD: Tensor, logits_TE: Tensor, k: int) -> tuple[Tensor, Tensor]:
    weights_TK, order_S, losses = _routed(logits_TE, k)
    token_S = order_S // k
    rows_SD = x_TD.index_select(0, token_S)
    weighted_SD = rows_SD * weights_TK.reshape(-1)[order_S][:, None].to(x_TD.dtype)
    return torch.zeros_like(x_TD).index_add(0, token_S, weighted_SD), losses


def _routed(logits_TE: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """Weights, the order of the slots by expert, and the losses."""
    logits_TE = logits_TE.float()
    scores_TE = logits_TE.softmax(1)
    weights_TK, indices_TK = scores_TE.topk(k, dim=1)
    weights_TK = weights_TK / weights_TK.sum(1, keepdim=True)
    slots_S = indices_TK.reshape(-1)
    # Not bincount: its result has a size that torch.compile does not know.
    counts_E = slots_S.new_zeros(logits_TE.shape[1])
    counts_E = counts_E.scatter_add(0, slots_S, torch.ones_like(slots_S))
    losses = load_balancing_loss(scores_TE.mean(0), counts_E)
    return weights_TK, slots_S.argsort(stable=True), losses + logits_TE.logsumexp(1).square().mean()
