"""Contrastive losses over a global batch: softmax (CLIP) and sigmoid (SigLIP).

Each rank holds n rows of each modality and computes the loss of its rows against all columns, which
are gathered with gradients. The mean over ranks is the loss of the whole batch, and the mean over
ranks of the parameters' gradients is its gradient, so any data layout gives the step of one
process. Reduction: mean over pairs. Accumulation in float32. Deterministic. The n x N logits are
held; the fused op that never holds them takes these definitions as its reference.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from carillon.engine.config import changed, section, setting
from carillon.engine.models.towers.dual_encoder import DualFeatures
from carillon.engine.parallel.collectives import gather_rows


@dataclass(frozen=True, kw_only=True)
class ContrastiveConfig:
    """`loss.itc`: image-text contrast."""

    kind: Literal["softmax", "sigmoid"] = setting("softmax", "CLIP's loss, or SigLIP's.")
    temperature: float = setting(
        0.07, "Where the learned temperature starts (0.1 is SigLIP's).", min=0.001, max=10
    )
    bias: float = setting(-10.0, "Where the learned bias of the sigmoid loss starts.")
    weight: float = setting(1.0, "Weight of this loss.", min=0)

    def check(self) -> Iterator[str]:
        if self.kind == "softmax" and changed(self, "bias"):
            yield f"bias: {self.bias:g} given, but only kind=sigmoid has a bias; drop either"


@dataclass(frozen=True, kw_only=True)
class MatchingConfig:
    """`loss.itm`: image-text matching."""

    weight: float = setting(0.0, "Weight of this loss.", min=0)

    def check(self) -> Iterator[str]:
        if self.weight > 0:
            yield (
                f"weight: {self.weight:g} given; image-text matching comes with the fusion towers "
                "(encoder-decoder). Set loss.itm.weight=0 until then"
            )


@dataclass(frozen=True, kw_only=True)
class LossConfig:
    """`loss`: the objectives and their weights."""

    itc: ContrastiveConfig = section(ContrastiveConfig)
    itm: MatchingConfig = section(MatchingConfig)

    def check(self) -> Iterator[str]:
        if self.itc.weight <= 0:
            yield "itc.weight: 0 leaves nothing to train; give a weight above 0"


def softmax_contrastive(features: DualFeatures, group: dist.ProcessGroup | None) -> Tensor:
    """Symmetric cross-entropy of matched pairs; the mean over this rank's rows.

    Shapes: image and text (n, d) unit rows, scale (1,). Returns a scalar.
    Source: Radford et al. 2021, figure 3.
    """
    image, text = features.image.float(), features.text.float()
    labels = _own_columns(image, group)
    image_logits = (features.scale * image) @ gather_rows(text, group).T
    text_logits = (features.scale * text) @ gather_rows(image, group).T
    return (F.cross_entropy(image_logits, labels) + F.cross_entropy(text_logits, labels)) / 2


def sigmoid_contrastive(features: DualFeatures, group: dist.ProcessGroup | None) -> Tensor:
    """Pairwise logistic loss of this rank's pictures against all texts, per picture.

    Shapes: as above, and bias (1,). Source: Zhai et al. 2023, algorithm 1.
    """
    if features.bias is None:
        raise ValueError("the sigmoid loss needs a model built with a bias")
    image, text = features.image.float(), features.text.float()
    logits = (features.scale * image) @ gather_rows(text, group).T + features.bias
    signs = torch.full_like(logits, -1.0)
    signs[torch.arange(len(image), device=image.device), _own_columns(image, group)] = 1.0
    return -F.logsigmoid(signs * logits).sum() / len(image)


def _own_columns(rows: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """Where this rank's matching columns stand among all columns."""
    first = dist.get_rank(group) * len(rows) if group is not None else 0
    return torch.arange(first, first + len(rows), device=rows.device)


class ContrastiveObjective:
    """`loss.itc` as a callable: features of one rank and the data group in, weighted loss out."""

    def __init__(self, config: ContrastiveConfig) -> None:
        self._loss = softmax_contrastive if config.kind == "softmax" else sigmoid_contrastive
        self._weight = config.weight

    def __call__(self, features: DualFeatures, group: dist.ProcessGroup | None) -> Tensor:
        return self._weight * self._loss(features, group)
