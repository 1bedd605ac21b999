"""Contrastive losses over a global batch: softmax (CLIP) and sigmoid (SigLIP).

Each rank holds n rows of each modality. It takes its pictures against all texts, which are gathered
with gradients: one product, whose reductions (kernels/contrastive) serve both directions. A text's
log-sum-exp needs every rank's pictures, so the ranks exchange their shares of it, a number a text.
The mean over ranks is the loss of the whole batch, and the mean over ranks of the parameters'
gradients is its gradient, so any data layout gives the step of one process. Reduction: mean over
pairs. Accumulation in float32. Deterministic. No n x N logits are held, unless the provider is the
reference.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch.distributed as dist
from torch import Tensor

from carillon.engine.config import changed, section, setting
from carillon.engine.models.towers.dual_encoder import DualFeatures
from carillon.engine.parallel.collectives import exchange_shares, gather_rows
from carillon.kernels.table import resolve


@dataclass(frozen=True, kw_only=True)
class ContrastiveConfig:
    """`loss.itc`: image-text contrast."""

    kind: Literal["softmax", "sigmoid"] = setting("softmax", "CLIP's loss, or SigLIP's.")
    temperature: float = setting(
        0.07, "Where the learned temperature starts (0.1 is SigLIP's).", min=0.001, max=10
    )
    bias: float = setting(-10.0, "Where the learned bias of the sigmoid loss starts.")
    weight: float = setting(1.0, "Weight of this loss.", min=0)
    provider: Literal["auto", "native", "triton", "reference"] = setting(
        "auto", "What computes the pairs; auto: the device's own choice.", hashed=False
    )

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


def softmax_contrastive(
    features: DualFeatures, group: dist.ProcessGroup | None, provider: str | None = None
) -> Tensor:
    """Symmetric cross-entropy of matched pairs; the mean over this rank's rows.

    Shapes: image and text (n, d) unit rows, scale (1,). Returns a scalar.
    Source: Radford et al. 2021, figure 3.
    """
    pairs = resolve("contrastive", features.image.device, provider)
    text = gather_rows(features.text.float(), group)
    row_lse, column_lse, positive, _, _ = pairs(
        features.image.float(), text, features.scale, _first_column(features, group)
    )
    shares = exchange_shares(column_lse, group)  # (ranks, n), of this rank's texts
    loss: Tensor = ((row_lse + shares.logsumexp(0)) / 2 - positive).mean()
    return loss


def sigmoid_contrastive(
    features: DualFeatures, group: dist.ProcessGroup | None, provider: str | None = None
) -> Tensor:
    """Pairwise logistic loss of this rank's pictures against all texts, per picture.

    Shapes: as above, and bias (1,). Source: Zhai et al. 2023, algorithm 1.
    """
    if features.bias is None:
        raise ValueError("the sigmoid loss needs a model built with a bias")
    losses = resolve("contrastive_sigmoid", features.image.device, provider)
    text = gather_rows(features.text.float(), group)
    row_losses: Tensor = losses(
        *(features.image.float(), text, features.scale, features.bias),
        _first_column(features, group),
    )
    return row_losses.mean()


def _first_column(features: DualFeatures, group: dist.ProcessGroup | None) -> int:
    """Where this rank's matching columns stand among all columns."""
    return dist.get_rank(group) * len(features.image) if group is not None else 0


class ContrastiveObjective:
    """`loss.itc` as a callable: features of one rank and the data group in, weighted loss out."""

    def __init__(self, config: ContrastiveConfig) -> None:
        self._loss = softmax_contrastive if config.kind == "softmax" else sigmoid_contrastive
        self._weight = config.weight
        self._provider = None if config.provider == "auto" else config.provider

    def __call__(self, features: DualFeatures, group: dist.ProcessGroup | None) -> Tensor:
        return self._weight * self._loss(features, group, self._provider)
