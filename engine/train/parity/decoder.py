"""The decoder in the parity table: mixtures of experts by both kinds of router.

Equal results need equal choices: where two experts are nearly tied at the edge of a token's choice,
rounding decides. So weights are drawn large, and the reference step raises where a margin is small.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from carillon.engine.data.packed_rows import PackedRows
from carillon.engine.models.towers.decoder import Decoder, build_decoder
from carillon.engine.models.towers.decoder_config import DecoderConfig, MoeConfig
from carillon.engine.nn.router import Router
from carillon.engine.parallel.apply import LaidOutDecoder, apply_layout
from carillon.engine.parallel.config import DistributedConfig
from carillon.engine.parallel.mesh import World
from carillon.engine.parallel.pipeline_split import microbatch_size
from carillon.engine.parallel.zigzag import Zigzag
from carillon.engine.train.language_step import language_forward_backward
from carillon.engine.train.parity.step import Kept, Run, Step, Variant, mean_over, measured

VOCABULARY, LENGTH = 50, 16
OFFSETS = torch.tensor(
    [[0, 5, 16, 16], [0, 16, 16, 16], [0, 8, 9, 16], [0, 1, 2, 16]] * 2, dtype=torch.int32
)
SOFTMAX = MoeConfig(num_experts=8, k=2, expert_width=16, balance_loss=0.05, z_loss=0.02)
SIGMOID = MoeConfig(
    num_experts=8,
    k=3,
    expert_width=16,
    shared_experts=1,
    dense_blocks=1,
    score="sigmoid",
    balance_loss=0.02,
    bias_speed=0.05,
)
# Rounding moves a score by some 1e-6 here.
LEAST_MARGIN = 1e-4


def decoder(moe: MoeConfig) -> Run:
    """A decoder with the language-model loss and the routers' own."""
    config = DecoderConfig(
        width=64,
        num_heads=8,
        num_kv_heads=4,
        mlp_width=32,
        context=LENGTH,
        qk_norm=True,
        moe=moe,
    )

    def run(
        layout: DistributedConfig | None, world: World | None, variant: Variant, depth: int
    ) -> Step:
        rows, group = fixed_rows(), None
        model: LaidOutDecoder = drawn(replace(config, depth=depth))
        assert isinstance(model, Decoder)
        if world is None or layout is None:
            least = min(margins(model, rows))
            if least < LEAST_MARGIN:
                raise AssertionError(f"a router's choice rests on {least:.1e}; draw other tokens")
        else:
            model = apply_layout(model, layout, world)
            group = world.loss_group
            own = rows.split(len(rows.tokens) // world.degrees.data)[world.data_rank]
            context = world.axis("cp")
            if context is not None:
                own = Zigzag(context.size(), context.get_local_rank()).share_of(own)
            rows = PackedRows(*(x.to(world.device) for x in own))
        share = len(rows.tokens)
        micro = share if layout is None else microbatch_size(layout, None, share)
        num_micro = 2 if variant.cached else share // micro
        kept = Kept()
        with kept if variant == Variant() else nullcontext():
            loss = language_forward_backward(
                model, rows, num_micro, world=world, autocast=nullcontext
            )
        return measured(mean_over(loss, group), model, world, kept.num_bytes)

    return run


def drawn(config: DecoderConfig) -> Decoder:
    """Weights so large that routers prefer experts."""
    generator = torch.Generator().manual_seed(11)
    made = build_decoder(config, vocab_size=VOCABULARY, generator=generator)
    with torch.no_grad():
        for name, value in made.named_parameters():
            value.mul_(1.0 if "norm" in name else 10.0 if "router" in name else 6.0)
    return made


def fixed_rows() -> PackedRows:
    """The global batch."""
    generator = torch.Generator().manual_seed(4)
    tokens = torch.randint(0, VOCABULARY, (len(OFFSETS), LENGTH), generator=generator)
    return PackedRows.of(tokens, OFFSETS)


def margins(model: Decoder, rows: PackedRows) -> list[float]:
    """The least distance, at each router, of the last chosen candidate to the first one left."""
    found: list[float] = []

    def look(router: Router, given: tuple[Tensor, ...], _: Any) -> None:
        by = given[0].flatten(0, 1) @ router.weight.T
        if router.shape.score == "sigmoid":
            by = by.sigmoid() + (0 if router.bias is None else router.bias)
        top = by.topk(router.shape.k + 1).values
        found.append(float((top[:, -2] - top[:, -1]).min()))

    hooks = [router.register_forward_hook(look) for router in model.routers()]
    with torch.no_grad():
        model(*rows[:3])
    for hook in hooks:
        hook.remove()
    return found
