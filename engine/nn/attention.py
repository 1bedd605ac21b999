"""Multi-head self-attention and the attention pool, over torch's scaled_dot_product_attention.

One linear gives q, k and v. Its rows are ordered head-major, (head, q|k|v, head_dim): a plain split
of dim 0 then hands whole heads, each with its q, k and v, to a tensor-parallel rank. The usual
(q|k|v, head, head_dim) order would hand one rank all of q. The number of heads is read from the
activation, never from the config, so the same code runs on a rank's share of the heads.
Left out: dropout, and any mesh (placements are declared elsewhere).

Legend: B batch, L tokens, D width, H heads, K head_dim.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from carillon.engine.nn.mlp import Activation, Mlp
from carillon.engine.nn.norm import LayerNorm

_MAX_WRITTEN_OUT = 512  # tokens; past it the L x L scores cost more than the fused backward pass


class SelfAttention(nn.Module):
    """Self-attention: (B, L, D) -> (B, L, D), with an optional causal or boolean mask.

    `qk_norm` normalises each head's queries and keys (LayerNorm without bias, one gain of head_dim
    shared by all heads). Source: Dehghani et al. 2023 (ViT-22B), section 2.
    """

    def __init__(
        self, width: int, num_heads: int, *, causal: bool = False, qk_norm: bool = False
    ) -> None:
        super().__init__()
        self.head_dim = width // num_heads
        self.causal = causal
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.q_norm = LayerNorm(self.head_dim, bias=False) if qk_norm else None
        self.k_norm = LayerNorm(self.head_dim, bias=False) if qk_norm else None

    def init_weights(
        self, *, qkv_std: float, out_std: float, generator: Generator | None = None
    ) -> None:
        for linear, std in ((self.qkv, qkv_std), (self.out, out_std)):
            nn.init.normal_(linear.weight, std=std, generator=generator)
            nn.init.zeros_(linear.bias)
        for norm in (self.q_norm, self.k_norm):
            if norm is not None:
                norm.init_weights()

    def forward(
        self, x_BLD: Tensor, mask: Tensor | None = None, only: Tensor | int | None = None
    ) -> Tensor:
        """`mask`: boolean, broadcastable to (B, H, L, L), true where a key may be seen.

        With `only`, the result of that one token of each sequence: (B, 1, D). The causal order is
        then not applied: the mask must hide what follows the token.
        """
        q, k, v = self.qkv(x_BLD).unflatten(-1, (-1, 3, self.head_dim)).unbind(-2)
        if only is not None:
            q = take_token(q, only)
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q).to(v.dtype), self.k_norm(k).to(v.dtype)
        y_BHLK = attend(q, k, v, mask, causal=self.causal and only is None)
        y_BLD: Tensor = self.out(y_BHLK.transpose(1, 2).flatten(2))
        return y_BLD


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, *, causal: bool) -> Tensor:
    """Scaled dot-product attention. Shapes: q (B, H, Lq, K), k and v (B, H, L, K) -> as q.

    On a CPU in bf16, torch's fused backward pass takes several times that of the products written
    out (17 tokens: 42 ms against 2 ms; 197 tokens: 338 against 119), so short sequences are written
    out, with the softmax in fp32, until packed_attention has a provider for them.
    """
    slow = q.device.type == "cpu" and q.dtype is torch.bfloat16 and torch.is_grad_enabled()
    if not slow or k.shape[-2] > _MAX_WRITTEN_OUT:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal)
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)
    if causal:
        mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).tril()
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf)
    return torch.softmax(scores, dim=-1, dtype=torch.float32).to(v.dtype) @ v


def take_token(x_BL: Tensor, index: Tensor | int) -> Tensor:
    """One token of each sequence: (B, L, ...) -> (B, 1, ...); index is (B,), or one for all."""
    if isinstance(index, int):
        return x_BL[:, index : index + 1]
    rows_B = torch.arange(x_BL.shape[0], device=x_BL.device)
    return x_BL[rows_B, index].unsqueeze(1)


class AttentionPool(nn.Module):
    """One learned query attends to all tokens, then a residual MLP: (B, L, D) -> (B, D).

    Source: Lee et al. 2019 (Set Transformer, PMA); Zhai et al. 2022 (Scaling ViT), section 3.2.
    """

    def __init__(self, width: int, num_heads: int, hidden: int, activation: Activation) -> None:
        super().__init__()
        self.head_dim = width // num_heads
        self.probe = nn.Parameter(torch.empty(width))
        self.q = nn.Linear(width, width)
        self.kv = nn.Linear(width, 2 * width)  # rows (head, k|v, head_dim), as above
        self.out = nn.Linear(width, width)
        self.norm = LayerNorm(width)
        self.mlp = Mlp(width, hidden, activation=activation)

    def init_weights(self, generator: Generator | None = None) -> None:
        width = self.probe.shape[0]
        for linear in (self.q, self.kv, self.out):
            nn.init.normal_(linear.weight, std=width**-0.5, generator=generator)
            nn.init.zeros_(linear.bias)
        nn.init.normal_(self.probe, std=width**-0.5, generator=generator)
        self.norm.init_weights()
        self.mlp.init_weights(fc1_std=(2 * width) ** -0.5, fc2_std=width**-0.5, generator=generator)

    def forward(self, x_BLD: Tensor) -> Tensor:
        q_HK = self.q(self.probe).unflatten(-1, (-1, self.head_dim))
        q_BHLK = q_HK[None, :, None].expand(x_BLD.shape[0], -1, -1, -1)
        kv_BLHsK = self.kv(x_BLD).unflatten(-1, (-1, 2, self.head_dim))
        k, v = (part.transpose(1, 2) for part in kv_BLHsK.unbind(-2))
        x_BD: Tensor = self.out(F.scaled_dot_product_attention(q_BHLK, k, v).flatten(1))
        x_BD = x_BD + self.mlp(self.norm(x_BD))
        return x_BD
