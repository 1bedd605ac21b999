"""Contrastive losses over a global batch: softmax (CLIP) and sigmoid (SigLIP).

Each rank holds n rows of each modality and takes its pictures against all texts: one product, whose
reductions (kernels/contrastive) serve both directions. The texts of other ranks are gathered or
come around a ring (gathered.py, ring.py), with the same result. The mean over ranks is the loss of
the whole batch, and the mean over ranks of the parameters' gradients is its gradient, so any data
layout gives the step of one process. Pairs with equal ids are no negatives of each other.
Reduction: mean over pairs. Accumulation in float32. Deterministic. No n x N logits are held, unless
the provider is the reference.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor

from carillon.engine.config import changed, section, setting
from carillon.engine.losses import gathered, ring
from carillon.engine.models.towers.dual_encoder import DualFeatures
from carillon.engine.parallel.collectives import gather_rows

Exchange = Literal["gather", "ring"]
Precision = Literal["fp32", "bf16"]
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True, kw_only=True)
class ContrastiveConfig:
    """`loss.itc`: image-text contrast."""

    kind: Literal["softmax", "sigmoid"] = setting("softmax", "CLIP's loss, or SigLIP's.")
    temperature: float = setting(
        0.07, "Where the learned temperature starts (0.1 is SigLIP's).", min=0.001, max=10
    )
    bias: float = setting(-10.0, "Where the learned bias of the sigmoid loss starts.")
    weight: float = setting(1.0, "Weight of this loss.", min=0)
    label_smoothing: float = setting(
        0.0, "Share of the softmax loss's target that all pairs of a row get alike.", min=0, max=0.9
    )
    same_field: str | None = setting(
        None,
        "Field of the samples, such as concept: pairs that have it equal are no negatives of each "
        "other; none: all pairs are.",
    )
    precision: Precision = setting(
        "fp32",
        "Of the features that are multiplied; bf16 is several times as fast, its sums are float32.",
    )
    exchange: Exchange = setting(
        "gather",
        "How a process meets the others' texts: gathered at once, or by chunks around a ring, "
        "in the memory of a few chunks.",
        hashed=False,
    )
    provider: Literal["auto", "native", "triton", "reference"] = setting(
        "auto", "What computes the pairs; auto: the device's own choice.", hashed=False
    )

    def check(self) -> Iterator[str]:
        if self.kind == "softmax" and changed(self, "bias"):
            yield f"bias: {self.bias:g} given, but only kind=sigmoid has a bias; drop either"
        if self.kind == "sigmoid" and changed(self, "label_smoothing"):
            given = f"label_smoothing: {self.label_smoothing:g} given"
            yield f"{given}, but only kind=softmax has a target to smooth; drop either"
        if self.same_field == "":
            yield "same_field: empty; name a field of the samples, or leave it out"


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
    features: DualFeatures,
    group: dist.ProcessGroup | None,
    ids: Tensor | None = None,
    *,
    label_smoothing: float = 0.0,
    precision: Precision = "fp32",
    exchange: Exchange = "gather",
    provider: str | None = None,
) -> Tensor:
    """Symmetric cross-entropy of matched pairs; the mean over this rank's rows.

    Shapes: image and text (n, d) unit rows, scale (1,), ids (n,) int64, below 0 where a pair has
    none. Returns a scalar.
    Source: Radford et al. 2021, figure 3; smoothing as in Szegedy et al. 2016, section 7, over the
    pairs that count.
    """
    pairs = ring.contrastive if exchange == "ring" else gathered.contrastive
    found = pairs(
        *_multiplied(features, precision),
        features.scale,
        group,
        row_ids=ids,
        column_ids=ids,
        with_sums=label_smoothing > 0,
        provider=provider,
    )
    losses = (found.row_lse + found.column_lse) / 2 - (1 - label_smoothing) * found.positive
    if label_smoothing > 0:
        counted = _num_counted(len(features.image), ids, group)
        losses = losses - label_smoothing * (found.row_sum + found.column_sum) / 2 / counted
    return losses.mean()


def sigmoid_contrastive(
    features: DualFeatures,
    group: dist.ProcessGroup | None,
    ids: Tensor | None = None,
    *,
    precision: Precision = "fp32",
    exchange: Exchange = "gather",
    provider: str | None = None,
) -> Tensor:
    """Pairwise logistic loss of this rank's pictures against all texts, per picture.

    Shapes: as above, and bias (1,). Source: Zhai et al. 2023, algorithm 1.
    """
    if features.bias is None:
        raise ValueError("the sigmoid loss needs a model built with a bias")
    pairs = ring.contrastive_sigmoid if exchange == "ring" else gathered.contrastive_sigmoid
    row_losses = pairs(
        *_multiplied(features, precision),
        features.scale,
        features.bias,
        group,
        row_ids=ids,
        column_ids=ids,
        provider=provider,
    )
    return row_losses.mean()


def _multiplied(features: DualFeatures, precision: Precision) -> tuple[Tensor, Tensor]:
    dtype = _DTYPES[precision]
    return features.image.to(dtype), features.text.to(dtype)


def _num_counted(n: int, ids: Tensor | None, group: dist.ProcessGroup | None) -> Tensor | int:
    """Columns that count for each row, which is rows that count for each column: its own, and all
    without its id."""
    num_all = n * (dist.get_world_size(group) if group is not None else 1)
    if ids is None:
        return num_all
    sorted_ids = gather_rows(ids, group).sort().values
    equal = torch.searchsorted(sorted_ids, ids, right=True) - torch.searchsorted(sorted_ids, ids)
    return torch.where(ids < 0, num_all, num_all + 1 - equal)


class ContrastiveObjective:
    """`loss.itc` as a callable: features and ids of one rank and the data group in, weighted loss
    out."""

    def __init__(self, config: ContrastiveConfig) -> None:
        self._config = config
        self._provider = None if config.provider == "auto" else config.provider

    def __call__(
        self,
        features: DualFeatures,
        group: dist.ProcessGroup | None,
        ids: Tensor | None = None,
    ) -> Tensor:
        config = self._config
        if config.kind == "sigmoid":
            loss = sigmoid_contrastive(
                features,
                group,
                ids,
                precision=config.precision,
                exchange=config.exchange,
                provider=self._provider,
            )
        else:
            loss = softmax_contrastive(
                features,
                group,
                ids,
                label_smoothing=config.label_smoothing,
                precision=config.precision,
                exchange=config.exchange,
                provider=self._provider,
            )
        return config.weight * loss
