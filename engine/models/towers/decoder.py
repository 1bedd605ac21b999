"""The decoder: a causal language model over packed rows, dense or with mixtures of experts.

Single-device code. A batch is rows of L tokens; a row holds documents one after another and no
size depends on what they are, so a batch can be cut along its rows. Blocks and the head run in
whatever precision autocast asks for, routers in fp32. Every parameter has at least one dim, so that
it can be sharded. Left out: KV caches and generation, tied embeddings, the loss.

Legend: B rows, L tokens of a row, D width, V vocabulary, S offsets of a row's documents.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

import torch
from torch import Generator, Tensor, nn
from torch.utils.checkpoint import checkpoint

from carillon.engine.config import UserError
from carillon.engine.models.towers.decoder_config import DecoderConfig
from carillon.engine.nn.decoder_block import DecoderBlock, DecoderBlockShape
from carillon.engine.nn.moe import Moe, MoeShape
from carillon.engine.nn.norm import RMSNorm
from carillon.engine.nn.rope import rotations
from carillon.engine.nn.router import Router, RouterShape

INIT_STD = 0.02


class Decoder(nn.Module):
    """Tokens of packed rows to logits of the next token: (B, L) -> (B, L, V).

    Source: Touvron et al. 2023 (LLaMA), section 2.2.
    """

    def __init__(self, config: DecoderConfig, vocab_size: int) -> None:
        super().__init__()
        self.config, self.vocab_size = config, vocab_size
        self.activation_recompute = False
        shape = _block_shape(config)
        self.token = nn.Embedding(vocab_size, config.width)
        self.blocks = nn.ModuleList(
            DecoderBlock(shape, dense=index < config.moe.dense_blocks)
            for index in range(config.depth)
        )
        self.norm = RMSNorm(config.width, eps=config.norm_eps)
        self.head = nn.Linear(config.width, vocab_size, bias=False)

    def init_weights(self, generator: Generator | None = None) -> None:
        """Normal weights of std 0.02, unit gains.

        The layers that write into the residual stream are scaled down by sqrt(2 depth).
        Source: Radford et al. 2019 (GPT-2), section 2.3, and its published code.
        """
        residual_std = INIT_STD * (2 * self.config.depth) ** -0.5
        nn.init.normal_(self.token.weight, std=INIT_STD, generator=generator)
        for block in self.blocks:
            assert isinstance(block, DecoderBlock)
            block.init_weights(std=INIT_STD, residual_std=residual_std, generator=generator)
        self.norm.init_weights()
        nn.init.normal_(self.head.weight, std=INIT_STD, generator=generator)

    def forward(self, tokens_BL: Tensor, positions_BL: Tensor, offsets_BS: Tensor) -> Tensor:
        """`positions_BL`: a token's place in its document. `offsets_BS` int32: where a row's
        documents start, and its end; from 0 to L, padded with L at the end.
        """
        x_BLD = through_blocks(self, self.token(tokens_BL), positions_BL, offsets_BS)
        logits_BLV: Tensor = self.head(self.norm(x_BLD))
        return logits_BLV

    def set_recompute(self, enabled: bool) -> None:
        """Trade compute for activation memory."""
        self.activation_recompute = enabled

    def set_batch_share(self, share: float) -> None:
        """What one forward pass sees of a process's batch, for the routers' auxiliary losses."""
        for router in self.routers():
            router.batch_share = share

    def routers(self) -> Iterator[Router]:
        """The routers of the mixtures, first block first."""
        return routers(self)

    def router_biases(self) -> Iterator[tuple[str, Tensor]]:
        """The buffers that balance experts, which no gradient moves, by name."""
        return router_biases(self)

    def no_decay_names(self) -> frozenset[str]:
        """Parameters without weight decay: the gains."""
        return frozenset(name for name, value in self.named_parameters() if value.ndim < 2)

    def flops_per_token(self, length: int) -> int:
        """Forward matmul FLOPs (a multiply-add is two) of a token in rows of `length`.

        A token's own experts alone; attention in full over a row, though causal and by document.
        """
        return sum(self.costs(length))

    def costs(self, length: int) -> list[int]:
        """The same by parts: of the embedding (a look-up), of each block, of the head."""
        config, shape = self.config, _block_shape(self.config)
        head_dim = config.width // config.num_heads
        attention = config.width * head_dim * 2 * (config.num_heads + config.kv_heads)
        attention += 2 * length * config.width
        mlp_widths, routing = [config.mlp_width] * config.depth, [0] * config.depth
        if shape.moe is not None:
            mixtures = slice(config.moe.dense_blocks, None)
            num = config.depth - config.moe.dense_blocks
            used = config.moe.k + config.moe.shared_experts
            mlp_widths[mixtures] = [used * config.moe.expert_width] * num
            routing[mixtures] = [config.width * shape.moe.router.num_experts] * num
        blocks = [
            2 * (attention + 3 * config.width * mlp_width + routed)
            for mlp_width, routed in zip(mlp_widths, routing, strict=True)
        ]
        return [0, *blocks, 2 * self.head.weight.numel()]


class Stack(Protocol):
    """What `through_blocks` knows of a decoder, or of a piece of one."""

    config: DecoderConfig
    blocks: nn.ModuleList
    activation_recompute: bool


def through_blocks(stack: Stack, x_BLD: Tensor, positions_BL: Tensor, offsets_BS: Tensor) -> Tensor:
    """Run the blocks that a stack has: (B, L, D) -> (B, L, D)."""
    config = stack.config
    head_dim = config.width // config.num_heads
    rotations_BLJ = rotations(positions_BL, head_dim, config.rope_base)
    for block in stack.blocks:
        if not isinstance(block, DecoderBlock):  # none: another piece has it
            continue
        given = (x_BLD, rotations_BLJ, offsets_BS)
        if stack.activation_recompute and torch.is_grad_enabled():
            x_BLD = checkpoint(block, *given, use_reentrant=False, preserve_rng_state=False)
        else:
            x_BLD = block(*given)
    return x_BLD


def routers(module: nn.Module) -> Iterator[Router]:
    """The routers of the mixtures in a decoder or a piece of one, first block first."""
    for part in module.modules():
        if isinstance(part, Moe):
            yield part.router


def router_biases(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """As Decoder's, of a decoder or a piece of one."""
    for name, part in module.named_modules():
        if isinstance(part, Moe) and part.router.bias is not None:
            yield f"{name}.router.bias", part.router.bias


def build_decoder(
    config: DecoderConfig,
    *,
    vocab_size: int,
    device: torch.device | str = "cpu",
    generator: Generator | None = None,
) -> Decoder:
    """A freshly initialised model; on device "meta", its shapes only.

    Weights follow from `generator` (a CPU one for the CPU), or else from torch.manual_seed alone.
    Raises UserError for fields that contradict each other.
    """
    problems = [*(f"moe.{problem}" for problem in config.moe.check()), *config.check()]
    if problems:
        raise UserError("model: " + "; ".join(problems))
    with torch.device("meta"):  # every weight is drawn once, not first by torch's own defaults
        model = Decoder(config, vocab_size)
    if torch.device(device).type == "meta":
        return model
    model.to_empty(device=device)
    model.init_weights(generator)
    return model


def _block_shape(config: DecoderConfig) -> DecoderBlockShape:
    return DecoderBlockShape(
        width=config.width,
        num_heads=config.num_heads,
        num_kv_heads=config.kv_heads,
        mlp_width=config.mlp_width,
        qk_norm=config.qk_norm,
        norm_eps=config.norm_eps,
        moe=_moe_shape(config),
    )


def _moe_shape(config: DecoderConfig) -> MoeShape | None:
    moe = config.moe
    if moe.num_experts is None:
        return None
    router = RouterShape(
        width=config.width,
        num_experts=moe.num_experts,
        k=moe.k,
        score=moe.score,
        renormalize=moe.renormalize,
        scale=moe.scale,
        balance_loss=moe.balance_loss,
        z_loss=moe.z_loss,
        bias_speed=moe.bias_speed,
        capacity_factor=moe.capacity_factor,
    )
    return MoeShape(router=router, expert_width=moe.expert_width, shared_experts=moe.shared_experts)
