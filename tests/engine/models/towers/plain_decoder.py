"""The decoder written out in float64, token by token and document by document, from its weights.

Nothing of the model's own code is used. Returns logits and the auxiliary loss of the whole batch.
"""

import itertools
import math

import torch
from torch import Tensor

from carillon.engine.models.towers.decoder_config import DecoderConfig


def run(
    config: DecoderConfig, weights: dict[str, Tensor], tokens_BL: Tensor, offsets_BS: Tensor
) -> tuple[Tensor, Tensor]:
    x_BLD = weights["token.weight"][tokens_BL]
    auxiliary = x_BLD.new_zeros(())
    for index in range(config.depth):
        block = {
            name.removeprefix(f"blocks.{index}."): value
            for name, value in weights.items()
            if name.startswith(f"blocks.{index}.")
        }
        normed = norm(x_BLD, block["norm1.weight"], config.norm_eps)
        x_BLD = x_BLD + attention(config, block, normed, offsets_BS)
        normed = norm(x_BLD, block["norm2.weight"], config.norm_eps)
        if "mlp.gate_up.weight" in block:
            gate_up, down = block["mlp.gate_up.weight"].T, block["mlp.down.weight"].T
            x_BLD = x_BLD + glu(normed, gate_up, down)
        else:
            y_BLD, added = mixture(config, block, normed)
            x_BLD, auxiliary = x_BLD + y_BLD, auxiliary + added
    x_BLD = norm(x_BLD, weights["norm.weight"], config.norm_eps)
    return x_BLD @ weights["head.weight"].T, auxiliary


def norm(x: Tensor, gain: Tensor, eps: float) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * gain


def glu(x: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    hidden = x @ gate_up
    gate, up = hidden[..., 0::2], hidden[..., 1::2]
    return (gate * torch.sigmoid(gate) * up) @ down


def attention(
    config: DecoderConfig, block: dict[str, Tensor], x_BLD: Tensor, offsets_BS: Tensor
) -> Tensor:
    heads, groups = config.num_heads, config.kv_heads
    size, per_group = config.width // heads, heads // groups
    out = torch.zeros_like(x_BLD)
    for row, offsets in enumerate(offsets_BS.tolist()):
        for begin, end in itertools.pairwise(offsets):
            qkv = x_BLD[row, begin:end] @ block["attention.qkv.weight"].T
            qkv = qkv.view(end - begin, groups, per_group + 2, size)
            mixed = []
            for head in range(heads):
                group = qkv[:, head // per_group]
                q, k, v = group[:, head % per_group], group[:, -2], group[:, -1]
                if config.qk_norm:
                    q = norm(q, block["attention.q_norm.weight"], config.norm_eps)
                    k = norm(k, block["attention.k_norm.weight"], config.norm_eps)
                q, k = turned(q, config.rope_base), turned(k, config.rope_base)
                scores = q @ k.T / math.sqrt(size)
                hidden = torch.ones(scores.shape, dtype=torch.bool).triu(1)
                mixed.append(scores.masked_fill(hidden, -torch.inf).softmax(-1) @ v)
            attended = torch.cat(mixed, dim=-1) @ block["attention.out.weight"].T
            out = torch.cat(
                [out.flatten(0, 1)[: row * x_BLD.shape[1] + begin], attended,
                 out.flatten(0, 1)[row * x_BLD.shape[1] + end :]]
            ).view_as(x_BLD)  # fmt: skip
    return out


def turned(x_LK: Tensor, base: float) -> Tensor:
    """A pair of features as one complex number, times e^(i angle)."""
    size = x_LK.shape[1]
    pairs = torch.complex(x_LK[:, : size // 2], x_LK[:, size // 2 :])
    place = torch.arange(len(x_LK), dtype=torch.float64)[:, None]
    frequency = base ** (-2 * torch.arange(size // 2, dtype=torch.float64) / size)
    pairs = pairs * torch.polar(torch.ones_like(place * frequency), place * frequency)
    return torch.cat([pairs.real, pairs.imag], dim=1)


def mixture(
    config: DecoderConfig, block: dict[str, Tensor], x_BLD: Tensor
) -> tuple[Tensor, Tensor]:
    moe = config.moe
    assert moe.num_experts is not None
    num_rows, length, _ = x_BLD.shape
    logits = x_BLD @ block["mlp.router.weight"].T
    scores = logits.softmax(-1) if moe.score == "softmax" else logits.sigmoid()
    bias = block.get("mlp.router.bias", torch.zeros(moe.num_experts))
    out, balance = [], []
    capacity = length
    if moe.capacity_factor is not None:
        capacity = math.ceil(moe.capacity_factor * length * moe.k / moe.num_experts)
    for row in range(num_rows):
        taken = [0] * moe.num_experts
        for token in range(length):
            own = scores[row, token]
            chosen = sorted(
                range(moe.num_experts), key=lambda e: -float((own[e] + bias[e]).detach())
            )
            chosen = chosen[: moe.k]
            total = own[chosen].sum() if moe.renormalize else 1.0
            y = x_BLD.new_zeros(config.width)
            for expert in chosen:
                taken[expert] += 1
                if taken[expert] > capacity:
                    continue
                gate_up = block["mlp.experts.gate_up"][expert]
                down = block["mlp.experts.down"][expert]
                weight = own[expert] / total * moe.scale
                y = y + weight * glu(x_BLD[row, token], gate_up, down)
            if moe.shared_experts:
                shared = block["mlp.shared.gate_up.weight"], block["mlp.shared.down.weight"]
                y = y + glu(x_BLD[row, token], shared[0].T, shared[1].T)
            out.append(y)
        share = torch.tensor(taken).double() / (length * moe.k)
        mean = (scores[row] / scores[row].sum(-1, keepdim=True)).mean(0)
        balance.append(moe.num_experts * (share * mean).sum())
    z_loss = logits.logsumexp(-1).square().mean()
    auxiliary = moe.balance_loss * torch.stack(balance).mean() + moe.z_loss * z_loss
    return torch.stack(out).view_as(x_BLD), auxiliary
