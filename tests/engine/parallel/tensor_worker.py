"""Started by torchrun: one step in tensor-parallel layouts against one process; rank 0 writes."""

import json
import runpy
import sys
from itertools import product
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from carillon.engine.models.encoders.text import TextOverrides
from carillon.engine.models.encoders.vision import VisionOverrides
from carillon.engine.models.towers.dual_encoder import DualEncoderConfig
from carillon.engine.parallel.apply import apply_layout
from carillon.engine.parallel.collectives import gradient_norm
from carillon.engine.parallel.mesh import DistributedConfig, degrees_of, lay_out

parity = runpy.run_path(str(Path(__file__).with_name("parity_worker.py")))
BATCH, batch, model, step, report = (
    parity[name] for name in ("BATCH", "batch", "model", "step", "report")
)
SMALL_TEXT = {"context": 12, "width": 32, "depth": 2, "num_heads": 4}
SMALL_VISION = {"image_size": 16, "width": 32, "depth": 2, "num_heads": 4}
MODELS = {  # every module that a plan names, both ways to pool, every kind of attention
    "clip": DualEncoderConfig(
        dims=24,
        vision_backbone="vit-ti-8",
        vision=VisionOverrides(**SMALL_VISION),
        text_backbone="clip-text-ti",
        text=TextOverrides(**SMALL_TEXT),
    ),
    "pooled": DualEncoderConfig(
        dims=24,
        vision_backbone="vit-ti-8",
        vision=VisionOverrides(**SMALL_VISION, pool="attention", qk_norm=True),
        text_backbone="bertlike-encoder-ti",
        text=TextOverrides(**SMALL_TEXT, qk_norm=True),
        projection="mlp",
    ),
}


def layouts(size: int) -> dict[str, DistributedConfig]:
    if size == 2:
        return {"tp2": DistributedConfig(tp=2)}
    return {
        "tp4": DistributedConfig(tp=4),
        "tp2 dp2": DistributedConfig(tp=2),
        "tp2 fsdp2": DistributedConfig(tp=2, zero_stage=3),
    }


def main() -> None:
    dist.init_process_group("gloo")
    size, rank = dist.get_world_size(), dist.get_rank()
    results = []
    for (name, config), kind, cached in product(MODELS.items(), ("softmax", "sigmoid"), (0, 1)):
        model.__globals__["CONFIG"] = config
        reference_loss, reference = step(model(kind), kind, batch(), BATCH, None)
        norm = torch.stack([g.norm() for g in reference.values()]).norm()
        for layout, distributed in layouts(size).items():
            distributed = DistributedConfig(**{**vars(distributed), "grad_checkpointing": cached})
            degrees = degrees_of(distributed, size)
            world = lay_out(degrees, torch.device("cpu"))
            laid_out = apply_layout(model(kind), distributed, world)
            share = BATCH // degrees.data
            micro = 3 if cached else share
            local = batch().microbatches(share)[world.data_rank]
            loss, gradients = step(laid_out, kind, local, micro, world.data_group)
            case = f"{layout} {name}"
            given = (case, kind, micro, bool(cached), loss, reference_loss, gradients, reference)
            found = float(gradient_norm(laid_out.parameters()))
            held = [
                parameter.to_local() if isinstance(parameter, DTensor) else parameter
                for parameter in laid_out.parameters()
            ]
            results.append(
                report(*given)
                | {"norm_error": abs(found - float(norm)) / float(norm)}
                | {
                    "share": sum(p.numel() for p in held)
                    / sum(g.numel() for g in gradients.values())
                }
            )
    if rank == 0:
        Path(sys.argv[1]).write_text(json.dumps(results))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
