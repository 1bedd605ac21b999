"""Started by torchrun: a decoder's step in context-parallel layouts against one process."""

import json
import runpy
import sys
from dataclasses import replace
from itertools import product
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard

from carillon.engine.data.packed_rows import next_tokens
from carillon.engine.losses.language import counted, language_loss
from carillon.engine.models.towers.decoder import Decoder
from carillon.engine.parallel.collectives import sum_over, whole
from carillon.engine.parallel.context import share_context
from carillon.engine.parallel.mesh import DistributedConfig, World, degrees_of, lay_out
from carillon.engine.parallel.parity import gradient_errors
from carillon.engine.parallel.zigzag import PackedRows, Zigzag

TOWERS = Path(__file__).parents[1] / "models" / "towers"
decoder = runpy.run_path(str(TOWERS / "test_decoder.py"))
CONFIGS, SMALL, SIGMOID, batch, built, step = (
    decoder[name] for name in ("CONFIGS", "SMALL", "SIGMOID", "batch", "built", "step")
)
MODELS = {
    "dense": CONFIGS["dense"],
    "softmax experts": CONFIGS["softmax"],
    "sigmoid experts": replace(SMALL, moe=replace(SIGMOID, capacity_factor=None)),
}
METHODS = ("ulysses", "ring", "all_gather")


def layouts(size: int) -> dict[str, DistributedConfig]:
    if size == 2:
        return {"cp2": DistributedConfig(cp=2, zero_stage=3)}
    return {
        "cp4": DistributedConfig(cp=4, zero_stage=2),
        "cp2 dp2": DistributedConfig(cp=2),
        "cp2 fsdp2": DistributedConfig(cp=2, zero_stage=3),
    }


def laid_out(model: Decoder, method: str, world: World, reshard: bool) -> Decoder:
    context = world.axis("cp")
    assert context is not None
    share_context(model, method, context.get_group())
    for block in model.blocks:
        fully_shard(block, mesh=world.fsdp_mesh, reshard_after_forward=reshard)
    fully_shard(model, mesh=world.fsdp_mesh, reshard_after_forward=reshard)
    return model


def own_rows(world: World) -> tuple[PackedRows, int]:
    """This process's share of the batch, and the tokens counted in all of it."""
    tokens, positions, offsets = batch()
    rows = PackedRows(tokens, positions, offsets, next_tokens(tokens, offsets))
    num_own = len(tokens) // world.degrees.data
    first = world.data_rank * num_own
    samples = PackedRows(*(x[first : first + num_own] for x in rows))
    context = world.axis("cp")
    assert context is not None
    zigzag = Zigzag(world.degrees.cp, context.get_local_rank())
    return zigzag.share_of(samples), int(counted(rows.labels))


def main() -> None:
    dist.init_process_group("gloo")
    size = dist.get_world_size()
    results = []
    for layout, distributed in layouts(size).items():
        world = lay_out(degrees_of(distributed, size), torch.device("cpu"))
        share, num_tokens = own_rows(world)
        for (name, config), method, recompute in product(MODELS.items(), METHODS, (False, True)):
            reference_loss, reference = step(built(config))
            model = laid_out(built(config), method, world, distributed.zero_stage == 3)
            model.set_recompute(recompute)
            logits = model(share.tokens, share.positions, share.offsets)
            num = world.degrees.data * world.degrees.cp
            loss = language_loss(logits, share.labels, num_tokens=num_tokens, num_processes=num)
            torch.autograd.backward(loss)
            mean = float(sum_over(loss.detach(), world.loss_group)) / num
            gradients = {
                key: whole(p.grad) for key, p in model.named_parameters() if p.grad is not None
            }
            errors = gradient_errors(gradients, reference)
            worst = max(errors, key=lambda key: errors[key])
            results.append(
                {
                    "case": f"{layout} {name} {method} recompute={recompute}",
                    "loss_error": abs(mean - reference_loss) / abs(reference_loss),
                    "gradient_error": errors[worst],
                    "worst": worst,
                }
            )
    if dist.get_rank() == 0:
        Path(sys.argv[1]).write_text(json.dumps(results))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
