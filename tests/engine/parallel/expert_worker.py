"""Started by torchrun: what the parity table leaves out of expert parallelism, against one process:
capacity, processes without a token, the other dispatcher, logs and biases. Rank 0 writes them.

Every fixture's margins are measured in one process, for the reason in engine/train/parity/decoder.
"""

import importlib
import json
import sys
from contextlib import nullcontext
from dataclasses import replace
from itertools import product
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from carillon.engine.models.towers.decoder import Decoder
from carillon.engine.models.towers.decoder_config import DecoderConfig
from carillon.engine.parallel.apply import apply_layout
from carillon.engine.parallel.collectives import gradient_norm, sum_over, whole
from carillon.engine.parallel.config import DistributedConfig
from carillon.engine.parallel.mesh import World, degrees_of, lay_out
from carillon.engine.parallel.parity import gradient_errors
from carillon.engine.parallel.routers import finish_step
from carillon.engine.train.language_step import language_forward_backward
from carillon.engine.train.parity.decoder import (
    LENGTH,
    OFFSETS,
    SIGMOID,
    SOFTMAX,
    drawn,
    fixed_rows,
    margins,
)

BIASED = replace(SIGMOID, balance_loss=0.0, dense_blocks=0)
MODELS = {
    name: DecoderConfig(
        width=32,
        depth=2,
        num_heads=4,
        num_kv_heads=2,
        mlp_width=32,
        context=LENGTH,
        qk_norm=True,
        moe=moe,
    )
    for name, moe in {
        "softmax capacity": replace(SOFTMAX, capacity_factor=1.0),
        "sigmoid": BIASED,
        "sigmoid capacity": replace(BIASED, capacity_factor=1.0, dense_blocks=1),
        "crowded sigmoid": BIASED,
    }.items()
}


def layouts(size: int) -> dict[str, DistributedConfig]:
    if size == 2:
        return {
            "ep2": DistributedConfig(ep=2, zero_stage=3),
            "tp2": DistributedConfig(tp=2),
            "ep2 deepep": DistributedConfig(ep=2, zero_stage=3, dispatcher="deepep"),
        }
    return {
        "ep4": DistributedConfig(ep=4, zero_stage=3),
        "ep2 fsdp2": DistributedConfig(ep=2, zero_stage=2),
        "ep2 dp2": DistributedConfig(ep=2, zero_stage=3, dp_replicate=2, dp_shard=2),
        "ep2 tp2": DistributedConfig(ep=2, tp=2, zero_stage=3),
        "ep2 dp2 deepep": DistributedConfig(
            ep=2, zero_stage=3, dp_replicate=2, dp_shard=2, dispatcher="deepep"
        ),
    }


def model(name: str) -> Decoder:
    """Crowded: all tokens prefer the first few experts, so that all but one process get none."""
    made = drawn(MODELS[name])
    with torch.no_grad():
        for router in made.routers() if name.startswith("crowded") else ():
            assert router.bias is not None
            router.bias[: router.shape.k] = 2.0
    return made


def step(
    laid_out: Decoder, num_micro: int, world: World | None
) -> tuple[float, dict[str, Tensor], dict[str, float], list[Tensor]]:
    """Global loss, whole gradients, what routers log and their biases after one step."""
    rows = fixed_rows()
    group = None if world is None else world.loss_group
    num_processes = 1 if group is None else dist.get_world_size(group)
    if world is not None:
        rows = rows.split(len(OFFSETS) // world.degrees.data)[world.data_rank]
    total = language_forward_backward(laid_out, rows, num_micro, world=world, autocast=nullcontext)
    total = sum_over(total, group) / num_processes
    gradients = {}
    for name, parameter in laid_out.named_parameters():
        assert parameter.grad is not None, name
        gradients[name] = whole(parameter.grad)
    facts = finish_step(laid_out.routers(), group)
    biases = [router.bias for router in laid_out.routers() if router.bias is not None]
    return float(total), gradients, facts, biases


def main() -> None:
    dist.init_process_group("gloo")
    sys.path.insert(0, str(Path(__file__).parent))
    sys.modules["deep_ep"] = importlib.import_module("deep_ep_stand_in")
    size, rank = dist.get_world_size(), dist.get_rank()
    results = []
    for name in MODELS:
        margin = min(margins(model(name), fixed_rows()))
        reference_loss, reference, logged, biases = step(model(name), 1, None)
        norm = torch.stack([g.norm() for g in reference.values()]).norm()
        for (layout, distributed), recompute in product(layouts(size).items(), (False, True)):
            distributed = replace(distributed, grad_checkpointing=recompute)
            world = lay_out(degrees_of(distributed, size), torch.device("cpu"))
            laid_out = apply_layout(model(name), distributed, world)
            num_micro = 2 if recompute else 1
            loss, gradients, facts, moved = step(laid_out, num_micro, world)
            errors = gradient_errors(gradients, reference)
            worst = max(errors, key=errors.__getitem__)
            found = float(gradient_norm(laid_out.parameters()))
            held = sum(
                whole_or_local(p).numel()
                for n, p in laid_out.named_parameters()
                if ".experts." in n
            )
            results.append(
                {
                    "case": f"{layout}, {name}, recompute and microbatches {recompute}",
                    "loss_error": abs(loss - reference_loss) / abs(reference_loss),
                    "worst": worst,
                    "gradient_error": errors[worst],
                    "norm_error": abs(found - float(norm)) / float(norm),
                    "log_error": max(
                        abs(facts[key] - value) / max(abs(value), 1e-3)
                        for key, value in logged.items()
                    ),
                    "biases_equal": all(map(torch.equal, moved, biases)) and len(biases),
                    "experts_share": held
                    / sum(g.numel() for n, g in reference.items() if ".experts." in n),
                    "margin": margin,
                    "dropped": facts["moe/dropped_share"],
                }
            )
    if rank == 0:
        Path(sys.argv[1]).write_text(json.dumps(results))
    dist.destroy_process_group()


def whole_or_local(parameter: Tensor) -> Tensor:
    return parameter.to_local() if hasattr(parameter, "to_local") else parameter


if __name__ == "__main__":
    main()
