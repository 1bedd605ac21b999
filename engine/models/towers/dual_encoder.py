"""The dual encoder: a vision and a text tower into one space of unit vectors (CLIP, SigLIP).

Single-device code. Blocks run in whatever precision autocast asks for; the two projections and the
normalisation are taken out of autocast, since their cost is nothing and the loss multiplies their
rounding by the logit scale (up to 100). Every parameter has at least one dim, so that it can be
sharded. Left out: the loss, which sees features only.

Legend: B batch, C channels, L tokens, D dims of the shared space.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import chain
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from carillon.engine.config import UserError, section, setting
from carillon.engine.models.catalog import text_config, vision_config
from carillon.engine.models.encoders.text import TextConfig, TextOverrides, TextTransformer
from carillon.engine.models.encoders.vision import VisionConfig, VisionOverrides, VisionTransformer
from carillon.engine.nn.mlp import Mlp

Projection = Literal["linear", "mlp"]
MAX_LOGIT_SCALE = math.log(100.0)
CLIP_LOGIT_SCALE = math.log(1 / 0.07)


@dataclass(frozen=True, kw_only=True)
class DualEncoderConfig:
    """The `model` section: two backbones by name, what to change in them, and the shared space."""

    type: Literal["dual_encoder"] = setting("dual_encoder", "The kind of tower.")
    dims: int = setting(512, "Dims of the shared embedding space.", min=1, max=65_536)
    vision_backbone: str = setting("vit-b-32", "One of vit-{ti,s,b,l,h}-{8,14,16,32}.")
    vision: VisionOverrides = section(VisionOverrides)
    text_backbone: str = setting(
        "clip-text-b", "One of clip-text-{ti,s,b,l,h} and bertlike-encoder-{ti,s,base,large}."
    )
    text: TextOverrides = section(TextOverrides)
    projection: Projection = setting("linear", "Head from a tower's width to dims.")

    def check(self) -> Iterable[str]:
        try:
            vision = vision_config(self.vision_backbone, self.vision)
            yield from (f"vision.{problem}" for problem in vision.check())
        except UserError as error:
            yield str(error)
        try:
            text = text_config(self.text_backbone, self.text)
            yield from (f"text.{problem}" for problem in text.check())
        except UserError as error:
            yield str(error)


class DualFeatures(NamedTuple):
    """What the loss sees: unit-norm fp32 features (B, D), scale (1,), bias (1,) or None."""

    image: Tensor
    text: Tensor
    scale: Tensor
    bias: Tensor | None


class DualEncoder(nn.Module):
    """Two encoders, two projections and a learned logit scale.

    Source: Radford et al. 2021 (CLIP), figure 3; bias: Zhai et al. 2023 (SigLIP), section 3.2.
    """

    def __init__(
        self,
        vision: VisionConfig,
        text: TextConfig,
        *,
        vocab_size: int,
        dims: int,
        projection: Projection = "linear",
        init_logit_scale: float = CLIP_LOGIT_SCALE,
        init_bias: float | None = None,
    ) -> None:
        super().__init__()
        self.dims = dims
        self.init_logit_scale = init_logit_scale
        self.init_bias = init_bias
        self.vision = VisionTransformer(vision)
        self.text = TextTransformer(text, vocab_size)
        self.vision_projection = _projection(projection, vision.width, dims)
        self.text_projection = _projection(projection, text.width, dims)
        self.logit_scale = nn.Parameter(torch.empty(1))
        self.logit_bias = nn.Parameter(torch.empty(1)) if init_bias is not None else None

    def init_weights(self, generator: Generator | None = None) -> None:
        """Fill every parameter as published, from `generator` or torch's global one."""
        self.vision.init_weights(generator)
        self.text.init_weights(generator)
        for head in (self.vision_projection, self.text_projection):
            if isinstance(head, Mlp):
                std = head.fc1.in_features**-0.5
                head.init_weights(fc1_std=std, fc2_std=std, generator=generator)
            else:
                nn.init.normal_(head.weight, std=head.in_features**-0.5, generator=generator)
        nn.init.constant_(self.logit_scale, self.init_logit_scale)
        if self.logit_bias is not None and self.init_bias is not None:
            nn.init.constant_(self.logit_bias, self.init_bias)

    def forward(self, images_BCHW: Tensor, tokens_BL: Tensor, lengths_B: Tensor) -> DualFeatures:
        return DualFeatures(
            self.encode_image(images_BCHW),
            self.encode_text(tokens_BL, lengths_B),
            *scale_and_bias(self.logit_scale, self.logit_bias),
        )

    def encode_image(self, images_BCHW: Tensor) -> Tensor:
        """(B, 3, S, S) normalised pixels -> (B, D) unit-norm fp32."""
        return unit(self.vision_projection, self.vision(images_BCHW))

    def encode_text(self, tokens_BL: Tensor, lengths_B: Tensor) -> Tensor:
        """(B, L) token ids and (B,) lengths, padding excluded -> (B, D) unit-norm fp32."""
        return unit(self.text_projection, self.text(tokens_BL, lengths_B))

    @torch.no_grad()
    def clamp_scale_(self) -> None:
        """Keep the scale in [1, 100]: call it after each optimizer step (CLIP, section 2.5)."""
        self.logit_scale.clamp_(0.0, MAX_LOGIT_SCALE)

    def blocks(self) -> Iterator[nn.Module]:
        """Every transformer block, vision first: the units of sharding, recompute and compile."""
        return chain(self.vision.transformer.blocks, self.text.transformer.blocks)

    def set_recompute(self, enabled: bool) -> None:
        """Trade compute for activation memory in both towers."""
        self.vision.transformer.activation_recompute = enabled
        self.text.transformer.activation_recompute = enabled

    def no_decay_names(self) -> frozenset[str]:
        """Parameters without weight decay: gains, biases, single tokens, logit scale and bias."""
        return frozenset(name for name, value in self.named_parameters() if value.ndim < 2)

    def flops_per_sample(self, image_size: int, text_length: int) -> int:
        """Forward matmul FLOPs (a multiply-add is two) of a picture and a caption.

        Attention is counted in full, also where it is causal.
        """
        vision, text = self.costs(image_size, text_length)
        return sum(vision) + sum(text)

    def costs(self, image_size: int, text_length: int) -> tuple[list[int], list[int]]:
        """The same by parts, for both towers: embedding, each block, head."""
        vision, text = self.vision.costs(image_size), self.text.costs(text_length)
        for costs, head in ((vision, self.vision_projection), (text, self.text_projection)):
            linears = [part for part in head.modules() if isinstance(part, nn.Linear)]
            costs[-1] += sum(2 * part.in_features * part.out_features for part in linears)
        return vision, text


def build_dual_encoder(
    config: DualEncoderConfig,
    *,
    vocab_size: int,
    init_logit_scale: float = CLIP_LOGIT_SCALE,
    init_bias: float | None = None,
    device: torch.device | str = "cpu",
    generator: Generator | None = None,
) -> DualEncoder:
    """A freshly initialised model; on device "meta", its shapes only.

    Weights follow from `generator` (a CPU one for the CPU), or else from torch.manual_seed alone.
    Raises UserError for an unknown backbone or fields that contradict each other.
    """
    problems = list(config.check())
    if problems:
        raise UserError("model: " + "; ".join(problems))
    with torch.device("meta"):  # every weight is drawn once, not first by torch's own defaults
        model = DualEncoder(
            vision_config(config.vision_backbone, config.vision),
            text_config(config.text_backbone, config.text),
            vocab_size=vocab_size,
            dims=config.dims,
            projection=config.projection,
            init_logit_scale=init_logit_scale,
            init_bias=init_bias,
        )
    if torch.device(device).type == "meta":
        return model
    model.to_empty(device=device)
    model.init_weights(generator)
    return model


def count_parameters(model: nn.Module) -> int:
    return sum(value.numel() for value in model.parameters())


def _projection(kind: Projection, width: int, dims: int) -> nn.Linear | Mlp:
    if kind == "mlp":
        return Mlp(width, width, out_width=dims, bias=False)
    return nn.Linear(width, dims, bias=False)


def scale_and_bias(
    logit_scale: nn.Parameter, logit_bias: nn.Parameter | None
) -> tuple[Tensor, Tensor | None]:
    """Both as the loss takes them."""
    # A copy of the bias: where parameters are sharded, the whole one is freed after forward.
    return logit_scale.float().exp(), None if logit_bias is None else logit_bias.float().clone()


def unit(projection: nn.Linear | Mlp, x_BD: Tensor) -> Tensor:
    """Projected and normalised, in the precision of the weights: (B, D) fp32."""
    with torch.autocast(x_BD.device.type, enabled=False):
        weight = next(projection.parameters())  # a sharded model may hold it in bf16
        return F.normalize(projection(x_BD.to(weight.dtype)).float(), dim=-1)
