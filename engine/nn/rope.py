"""Rotary position embedding: pairs of a head's features turned by angles that grow with position.

Feature i is paired with feature i + K/2, as in the published Llama weights of Hugging Face. The
turns are made once for all layers, from positions, so a row may hold many documents and a process
any share of a row. Left out: scaled bases for contexts longer than trained on.

Legend: B batch, L tokens, H heads, K head_dim, J K/2 pairs.
"""

from __future__ import annotations

import torch
from torch import Tensor


def rotations(positions_BL: Tensor, head_dim: int, base: float) -> Tensor:
    """Cosines and sines of every position's angles, in float32: (B, L) -> (2, B, L, K/2).

    Source: Su et al. 2021 (RoFormer), eq. 15: pair i turns by position x base^(-2i/K).
    """
    even_J = torch.arange(0, head_dim, 2, device=positions_BL.device, dtype=torch.float32)
    # Powers in double: an angle is as good as its frequency, times a position of many thousands.
    frequency_J = (base ** (-even_J.double() / head_dim)).float()
    angle_BLJ = positions_BL.float().unsqueeze(-1) * frequency_J
    return torch.stack([angle_BLJ.cos(), angle_BLJ.sin()])


def rotate(x_BLHK: Tensor, rotations_BLJ: Tensor) -> Tensor:
    """Turn each head's pairs, in float32; the result has x's type."""
    cos_BL1J, sin_BL1J = rotations_BLJ.unsqueeze(-2).unbind(0)
    first, second = x_BLHK.float().chunk(2, dim=-1)
    turned = (first * cos_BL1J - second * sin_BL1J, second * cos_BL1J + first * sin_BL1J)
    return torch.cat(turned, dim=-1).to(x_BLHK.dtype)
