"""8-bit products in pipeline stages against the same microbatches in one process: the same codes,
so the same bits; run by fp8_worker.py with 2 processes."""

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from carillon.engine.losses.contrastive import ContrastiveConfig, ContrastiveObjective
from carillon.engine.models.towers.decoder import Decoder
from carillon.engine.models.towers.decoder_config import DecoderConfig
from carillon.engine.models.towers.dual_encoder import DualEncoder, build_dual_encoder
from carillon.engine.nn import fp8
from carillon.engine.nn.fp8_layers import delayed_scaling, to_fp8
from carillon.engine.parallel.apply import apply_layout
from carillon.engine.parallel.collectives import largest_over, sum_over, whole
from carillon.engine.parallel.config import DistributedConfig
from carillon.engine.parallel.mesh import World, degrees_of, lay_out
from carillon.engine.parallel.pipeline import gather_named
from carillon.engine.parallel.pipeline_split import microbatch_size
from carillon.engine.train.language_step import language_forward_backward
from carillon.engine.train.parity.columns import CLIP
from carillon.engine.train.parity.decoder import LENGTH, SIGMOID, drawn, fixed_rows
from carillon.engine.train.parity.dual_encoder import pairs
from carillon.engine.train.step import forward_backward

DEPTH, BATCH = 4, 16
# With one block kept at either end, zbv's first process has no 8-bit layer at all.
CASES = (
    *((recipe, "1f1b", 0) for recipe in ("tensorwise", "rowwise", "blockwise", "delayed")),
    ("tensorwise", "interleaved_zero_bubble", 0),
    ("delayed", "interleaved1f1b", 0),
    ("delayed", "zbv", 1),
)


def dual_encoder() -> DualEncoder:
    towers = (replace(tower, depth=DEPTH) for tower in (CLIP.vision, CLIP.text))
    config = replace(CLIP, **dict(zip(("vision", "text"), towers, strict=True)))
    return build_dual_encoder(config, vocab_size=50, generator=torch.Generator().manual_seed(1))


def decoder() -> Decoder:
    return drawn(
        DecoderConfig(width=64, num_heads=8, mlp_width=32, context=LENGTH, depth=DEPTH, moe=SIGMOID)
    )


def dual_encoder_step(model: Any, world: World | None, config: DistributedConfig) -> Tensor:
    objective = ContrastiveObjective(ContrastiveConfig())
    group = world.data_group if world is not None else None
    micro = microbatch_size(config, None, BATCH)
    return forward_backward(model, objective, pairs(), micro, group=group, autocast=nullcontext)


def decoder_step(model: Any, world: World | None, config: DistributedConfig) -> Tensor:
    rows = fixed_rows()
    num = len(rows.tokens) // microbatch_size(config, None, len(rows.tokens))
    return language_forward_backward(model, rows, num, world=world, autocast=nullcontext)


MODELS: dict[str, tuple[Callable[[], Any], Callable[..., Tensor]]] = {
    "dual encoder": (dual_encoder, dual_encoder_step),
    "decoder": (decoder, decoder_step),
}


def two_steps(
    name: str, model: nn.Module, world: World | None, config: DistributedConfig
) -> tuple[dict[str, Tensor], int]:
    """The second step's loss and gradients, and delayed scaling's state; its 8-bit products."""
    scaling, group = delayed_scaling(model), None if world is None else world.group
    num_products, multiply = 0, fp8._multiply

    def counted(*given: Any) -> Tensor:
        nonlocal num_products
        num_products += 1
        return multiply(*given)

    fp8._multiply = counted
    for _ in range(2):
        num_products = 0
        model.zero_grad()
        loss = MODELS[name][1](model, world, config)
        if scaling is not None:
            scaling.end_step(partial(largest_over, group=group), counts=True)
    fp8._multiply = multiply
    found = {key: whole(p.grad) for key, p in model.named_parameters() if p.grad is not None}
    pp = world.axis("pp") if world is not None else None
    found = gather_named(found, pp.get_group() if pp is not None else None)
    if scaling is not None:
        found |= scaling.state_tensors()
    return found | {"loss": loss}, int(sum_over(torch.tensor(num_products), group))


def run_cases() -> list[dict[str, Any]]:
    """Every case, in a group of 2 processes that has started."""
    results = []
    references: dict[Any, Any] = {}
    for name, (made, _) in MODELS.items():
        for recipe, schedule, kept in CASES:
            config = DistributedConfig(
                precision="fp8",
                fp8_recipe=recipe,  # type: ignore[arg-type]
                fp8_keep_blocks=kept,
                pp=2,
                pp_schedule=schedule,  # type: ignore[arg-type]
            )
            assert not list(config.check())
            world = lay_out(degrees_of(config, 2), torch.device("cpu"))
            laid_out = apply_layout(made(), config, world)
            found, num_products = two_steps(name, laid_out, world, config)
            if (name, recipe, kept) not in references:  # of the same microbatches by any schedule
                one = made()
                to_fp8(one, recipe, keep_blocks=kept)
                references[name, recipe, kept] = two_steps(name, one, None, config)
            reference, num_reference = references[name, recipe, kept]
            odd = [key for key, value in reference.items() if not torch.equal(found[key], value)]
            results.append(
                {
                    "case": f"{name} {recipe} {schedule} {kept}",
                    "missing": sorted(reference.keys() ^ found.keys()),
                    "odd": odd,
                    "products": [num_products, num_reference],
                    "layers_here": sum(hasattr(m, "takes_fp8") for m in laid_out.modules()),
                }
            )
    return results
