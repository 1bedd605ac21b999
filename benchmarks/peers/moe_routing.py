"""Peers of MoE routing: (x, logits, k) -> the weighted sum of permuted rows, and the losses.

x (T, D), logits (T, E), float32 or bfloat16. The losses are the balancing and the z loss, added. No
expert is computed; where one would be, the permuted rows exist, as in a model.
- `gathering`: takes each token's rows back and multiplies them by its weights.
- `scattering`: adds each weighted row to its token.
- `... compiled`: the same by torch.compile, up to the permuted rows and from them: compiled as one
  it would never write them, which no model with experts can do.
Legend: T tokens, D width, E experts, K choices a token, S = T * K slots in the order of experts.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from carillon.kernels.moe_routing.balance import load_balancing_loss
from peers.compiling import compiled

Routing = Callable[[Tensor, Tensor, int], tuple[Tensor, Tensor]]
Permute = Callable[[Tensor, Tensor, int], tuple[Tensor, Tensor, Tensor, Tensor]]
Combine = Callable[[Tensor, Tensor, Tensor], Tensor]


def available(device: str) -> dict[str, Routing]:
    """The peers that run on `device`, by name."""
    combines: dict[str, Combine] = {"gathering": _gathered, "scattering": _scattered}
    peers = {name: _routing(_permuted, combine) for name, combine in combines.items()}
    for name, combine in combines.items():
        peers[f"{name} compiled"] = _routing(compiled(_permuted), compiled(combine))
    left_out = missing(device)
    return {name: peer for name, peer in peers.items() if name not in left_out}


def missing(device: str) -> dict[str, str]:
    """Why a peer is not run here, by name."""
    if device.startswith("cuda"):
        return {}
    slower = "on the CPU `scattering compiled` has been at least as fast, and compiling is slow"
    return {"gathering compiled": slower}


def _routing(permute: Permute, combine: Combine) -> Routing:
    def route(x_TD: Tensor, logits_TE: Tensor, k: int) -> tuple[Tensor, Tensor]:
        rows_SD, weights_TK, order_S, losses = permute(x_TD, logits_TE, k)
        return combine(rows_SD, weights_TK, order_S), losses

    return route


def _permuted(x_TD: Tensor, logits_TE: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Rows by expert, the weights, which slot each row is, and the losses."""
    logits_TE = logits_TE.float()
    scores_TE = logits_TE.softmax(1)
    weights_TK, indices_TK = scores_TE.topk(k, dim=1)
    weights_TK = weights_TK / weights_TK.sum(1, keepdim=True)
    slots_S = indices_TK.reshape(-1)
    # Not bincount: its result has a size that torch.compile does not know.
    counts_E = slots_S.new_zeros(logits_TE.shape[1])
    counts_E = counts_E.scatter_add(0, slots_S, torch.ones_like(slots_S))
    losses = (
        load_balancing_loss(scores_TE.mean(0), counts_E) + logits_TE.logsumexp(1).square().mean()
    )
    order_S = slots_S.argsort(stable=True)
    return x_TD.index_select(0, order_S // k), weights_TK, order_S, losses


def _gathered(rows_SD: Tensor, weights_TK: Tensor, order_S: Tensor) -> Tensor:
    inverse_S = torch.empty_like(order_S)
    inverse_S[order_S] = torch.arange(len(order_S), device=order_S.device)
    rows_TKD = rows_SD.index_select(0, inverse_S).view(*weights_TK.shape, -1)
    return torch.bmm(weights_TK[:, None].to(rows_SD.dtype), rows_TKD)[:, 0]


def _scattered(rows_SD: Tensor, weights_TK: Tensor, order_S: Tensor) -> Tensor:
    num_tokens, k = weights_TK.shape
    weighted_SD = rows_SD * weights_TK.reshape(-1)[order_S][:, None].to(rows_SD.dtype)
    out_TD = rows_SD.new_zeros((num_tokens, rows_SD.shape[1]))
    return out_TD.index_add(0, order_S // k, weighted_SD)
