"""Started by torchrun: one step through pipelines against one process; rank 0 writes the errors."""

import json
import runpy
import sys
from contextlib import nullcontext
from dataclasses import replace
from itertools import product
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from carillon.engine.losses.contrastive import ContrastiveConfig, ContrastiveObjective
from carillon.engine.models.encoders.text import TextOverrides
from carillon.engine.models.encoders.vision import VisionOverrides
from carillon.engine.models.towers.dual_encoder import DualEncoderConfig
from carillon.engine.parallel.apply import apply_layout
from carillon.engine.parallel.collectives import gradient_norm, whole
from carillon.engine.parallel.mesh import DistributedConfig, degrees_of, lay_out
from carillon.engine.parallel.pipeline import gather_named
from carillon.engine.parallel.pipelined_dual_encoder import PipelinedDualEncoder
from carillon.engine.train.step import forward_backward

parity = runpy.run_path(str(Path(__file__).with_name("parity_worker.py")))
BATCH, batch, model, one_process, report = (
    parity[name] for name in ("BATCH", "batch", "model", "step", "report")
)
SIZES = {"width": 32, "num_heads": 4}


def models(depth: int) -> dict[str, DualEncoderConfig]:
    """Uneven towers, every kind of pool, and both kinds of projection."""
    return {
        "softmax": DualEncoderConfig(
            dims=24,
            vision_backbone="vit-ti-8",
            vision=VisionOverrides(image_size=16, depth=depth + 1, **SIZES),
            text_backbone="clip-text-ti",
            text=TextOverrides(context=12, depth=depth, **SIZES),
        ),
        "sigmoid": DualEncoderConfig(
            dims=24,
            vision_backbone="vit-ti-8",
            vision=VisionOverrides(
                image_size=16, depth=depth, pool="attention", qk_norm=True, **SIZES
            ),
            text_backbone="bertlike-encoder-ti",
            text=TextOverrides(context=12, depth=depth + 1, qk_norm=True, **SIZES),
            projection="mlp",
        ),
    }


def layouts(size: int) -> dict[str, DistributedConfig]:
    cases = {}
    for schedule in ("1f1b", "interleaved1f1b", "interleaved_zero_bubble", "zbv"):
        pipeline = DistributedConfig(pp=2, pp_schedule=schedule)  # type: ignore[arg-type]
        if size == 2:
            cases[f"pp2 {schedule}"] = pipeline
        elif size == 4:
            cases[f"pp4 {schedule}"] = replace(pipeline, pp=4)
            cases[f"pp2 tp2 {schedule}"] = replace(pipeline, tp=2)
            cases[f"pp2 fsdp2 {schedule}"] = replace(pipeline, zero_stage=3)
        elif schedule != "interleaved_zero_bubble":
            cases[f"pp2 tp2 fsdp2 {schedule}"] = replace(pipeline, tp=2, zero_stage=3)
    if size == 2:
        cases["pp2 gpipe"] = DistributedConfig(pp=2, pp_schedule="gpipe")
        cases["pp2 split by hand"] = DistributedConfig(pp=2, pp_split={"vision": (1, 4)})
        cases["pp2 compiled"] = DistributedConfig(pp=2, compile=True)
    if size == 4:
        cases["pp2 dp2 zbv"] = DistributedConfig(pp=2, pp_schedule="zbv")
    return cases


def wanted(name: str, kind: str) -> bool:
    """Both losses through every schedule and mechanism, but not each through every pair of them."""
    if "hand" in name or "gpipe" in name:
        return kind == "softmax"
    if name in ("pp2 compiled", "pp2 tp2 1f1b", "pp2 fsdp2 interleaved_zero_bubble"):
        return kind == "sigmoid"
    return "tp2" not in name or ("interleaved" in name) == (kind == "softmax")


def main() -> None:
    dist.init_process_group("gloo")
    size, rank = dist.get_world_size(), dist.get_rank()
    results = []
    for kind, name in product(("softmax", "sigmoid"), layouts(size)):
        if wanted(name, kind):
            distributed = layouts(size)[name]
            deep = distributed.pp == 4 and distributed.pp_schedule != "1f1b"
            model.__globals__["CONFIG"] = models(8 if deep else 4)[kind]
            reference_loss, reference = one_process(model(kind), kind, batch(), BATCH, None)
            norm = torch.stack([g.norm() for g in reference.values()]).norm()
            recompute = (kind == "sigmoid") == (distributed.pp_schedule != "interleaved1f1b")
            distributed = replace(distributed, grad_checkpointing=recompute)
            degrees = degrees_of(distributed, size)
            world = lay_out(degrees, torch.device("cpu"))
            laid_out = apply_layout(model(kind), distributed, world)
            assert isinstance(laid_out, PipelinedDualEncoder)
            local = batch().microbatches(BATCH // degrees.data)[world.data_rank]
            objective = ContrastiveObjective(ContrastiveConfig(kind=kind))  # type: ignore[arg-type]
            for _ in range(2):  # the schedule is used again
                laid_out.zero_grad()
                loss = forward_backward(
                    laid_out,
                    objective,
                    local.microbatches(4 if degrees.data == 1 else 2),
                    group=world.data_group,
                    autocast=nullcontext,
                )
            dist.all_reduce(loss)
            gradients = {}
            for parameter_name, parameter in laid_out.named_parameters():
                assert parameter.grad is not None, parameter_name
                gradients[parameter_name] = whole(parameter.grad)
            stages = world.axis("pp").get_group()
            held = sum(
                (p.to_local() if isinstance(p, DTensor) else p).numel()
                for p in laid_out.parameters()
            )
            gradients = gather_named(gradients, stages)
            found = float(gradient_norm(laid_out.counted_parameters(), stages))
            given = (name, kind, 0, recompute, float(loss) / size, reference_loss)
            results.append(
                report(*given, gradients, reference)
                | {"norm_error": abs(found - float(norm)) / float(norm)}
                | {"share": held / sum(g.numel() for g in gradients.values())}
            )
    if rank == 0:
        Path(sys.argv[1]).write_text(json.dumps(results))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
