"""The `model` section of a decoder: its sizes, and the mixtures of experts in it.

All fields are checked here, with the sizes that the kernels take, before a model is built.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Literal

from carillon.engine.choices import divisors, listed
from carillon.engine.config import changed, section, setting
from carillon.engine.nn.router import Score

MAX_HEAD_DIM, HEAD_DIM_STEP = 256, 8  # of packed_attention


@dataclass(frozen=True, kw_only=True)
class MoeConfig:
    """`model.moe`: the mixture of experts in a decoder's blocks."""

    num_experts: int | None = setting(
        None, "Routed experts of a block; none: dense MLPs.", min=1, max=65_536
    )
    k: int = setting(2, "Experts that a token goes to.", min=1, max=1024)
    expert_width: int = setting(512, "Hidden features of an expert.", min=1, max=524_288)
    shared_experts: int = setting(0, "Experts that every token goes to.", min=0, max=1024)
    dense_blocks: int = setting(0, "First blocks that keep a dense MLP.", min=0, max=1024)
    score: Score = setting("softmax", "What the router makes of its logits.")
    renormalize: bool = setting(True, "A token's weights are divided by their sum.")
    scale: float = setting(1.0, "Factor of a token's weights.", min=1e-6, max=1e6)
    balance_loss: float = setting(
        0.01, "Coefficient of the balancing loss of each row; 0: none.", min=0, max=1e3
    )
    z_loss: float = setting(0.0, "Coefficient of the router's z-loss; 0: none.", min=0, max=1e3)
    bias_speed: float = setting(
        0.0, "Step of the balancing bias of sigmoid scores; 0: no bias.", min=0, max=1
    )
    capacity_factor: float | None = setting(
        None, "An expert's slots of a row, over an even share; none: nothing is dropped.", min=1e-3
    )

    def check(self) -> Iterator[str]:
        if self.num_experts is None:
            names = [item.name for item in fields(self) if item.name != "num_experts"]
            for name in changed(self, *names):
                yield (
                    f"{name}: {getattr(self, name)} given, but num_experts is none; set "
                    "num_experts, or drop it"
                )
            return
        if self.k > self.num_experts:
            yield (
                f"k: {self.k} given, but there are {self.num_experts} experts; use at most "
                f"{self.num_experts}, or raise num_experts"
            )
        if self.k == 1 and self.renormalize:
            yield (
                "renormalize: true with k=1 makes every weight 1, so no gradient reaches the "
                "router; set renormalize=false, or k to 2 or more"
            )
        if self.bias_speed > 0 and self.score != "sigmoid":
            yield (
                f"bias_speed: {self.bias_speed} given, but score is {self.score}; a bias needs "
                "score=sigmoid"
            )


@dataclass(frozen=True, kw_only=True)
class DecoderConfig:
    """A decoder, every field resolved; the defaults are a small dense one."""

    type: Literal["decoder"] = setting("decoder", "The kind of tower.")
    width: int = setting(512, "Features of a token.", min=1, max=65_536)
    depth: int = setting(8, "Number of blocks.", min=1, max=1024)
    num_heads: int = setting(8, "Query heads; must divide the width.", min=1, max=1024)
    num_kv_heads: int | None = setting(
        None, "Key and value heads; must divide num_heads; none: as many.", min=1, max=1024
    )
    mlp_width: int = setting(1408, "Hidden features of a dense MLP.", min=1, max=524_288)
    context: int = setting(2048, "Tokens of a packed row.", min=2, max=1_048_576)
    rope_base: float = setting(
        10_000.0, "Base of the rotary positions' frequencies.", min=1.0, max=1e12
    )
    qk_norm: bool = setting(False, "Normalise each head's queries and keys.")
    norm_eps: float = setting(1e-5, "Added to mean squares.", min=1e-12, max=1e-2)
    moe: MoeConfig = section(MoeConfig)

    @property
    def kv_heads(self) -> int:
        return self.num_heads if self.num_kv_heads is None else self.num_kv_heads

    def check(self) -> Iterator[str]:
        if self.width % self.num_heads:
            yield (
                f"num_heads: {self.num_heads} does not divide width {self.width}; use one of "
                f"{listed(divisors(self.width))}"
            )
        else:
            yield from self._check_head_dim()
        if self.num_heads % self.kv_heads:
            yield (
                f"num_kv_heads: {self.kv_heads} does not divide num_heads {self.num_heads}; use "
                f"one of {listed(divisors(self.num_heads))}"
            )
        if self.moe.num_experts is not None and self.moe.dense_blocks >= self.depth:
            yield (
                f"moe.dense_blocks: {self.moe.dense_blocks} leaves no block for the experts of "
                f"depth {self.depth}; use at most {self.depth - 1}"
            )

    def _check_head_dim(self) -> Iterator[str]:
        """Rotary positions turn pairs of features; packed_attention takes whole eights."""
        head_dim = self.width // self.num_heads
        if head_dim % HEAD_DIM_STEP or head_dim > MAX_HEAD_DIM:
            steps = max(1, min(MAX_HEAD_DIM, round(head_dim / HEAD_DIM_STEP) * HEAD_DIM_STEP) // 8)
            yield (
                f"width: {self.width} over num_heads {self.num_heads} makes heads of {head_dim} "
                f"features; rotary positions and packed_attention need a multiple of "
                f"{HEAD_DIM_STEP} up to {MAX_HEAD_DIM}: with these heads, width "
                f"{steps * HEAD_DIM_STEP * self.num_heads} is the nearest"
            )
