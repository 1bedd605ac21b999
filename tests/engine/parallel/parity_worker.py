"""Started by torchrun: one step in many layouts against one process; rank 0 writes the errors."""

import json
import sys
from contextlib import nullcontext
from itertools import product
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from carillon.engine.data.loader import Batch
from carillon.engine.losses.contrastive import ContrastiveConfig, ContrastiveObjective
from carillon.engine.models.encoders.text import TextOverrides
from carillon.engine.models.encoders.vision import VisionOverrides
from carillon.engine.models.towers.dual_encoder import (
    DualEncoder,
    DualEncoderConfig,
    build_dual_encoder,
)
from carillon.engine.parallel.apply import apply_layout
from carillon.engine.parallel.mesh import DistributedConfig, degrees_of, lay_out
from carillon.engine.parallel.parity import gradient_errors
from carillon.engine.train.step import forward_backward

BATCH = 16
CONFIG = DualEncoderConfig(
    dims=24,
    vision_backbone="vit-ti-8",
    vision=VisionOverrides(image_size=16, width=32, depth=2, num_heads=2),
    text_backbone="clip-text-ti",
    text=TextOverrides(context=12, width=32, depth=2, num_heads=2),
)


def batch() -> Batch:
    generator = torch.Generator().manual_seed(3)
    lengths = torch.randint(3, 13, (BATCH,), generator=generator)
    return Batch(
        images=torch.randint(0, 256, (BATCH, 16, 16, 3), generator=generator, dtype=torch.uint8),
        tokens=torch.randint(0, 50, (BATCH, 12), generator=generator),
        lengths=lengths,
        keys=[str(i) for i in range(BATCH)],
        languages=["en"] * BATCH,
        bad=[],
    )


def model(kind: str) -> DualEncoder:
    return build_dual_encoder(
        CONFIG,
        vocab_size=50,
        init_bias=-3.0 if kind == "sigmoid" else None,
        generator=torch.Generator().manual_seed(1),
    )


def step(
    laid_out: DualEncoder,
    kind: str,
    local: Batch,
    size: int,
    group: dist.ProcessGroup | None,
    exchange: str = "gather",
) -> tuple[float, dict[str, torch.Tensor]]:
    """Global loss and whole gradients of one step."""
    config = ContrastiveConfig(kind=kind, exchange=exchange)  # type: ignore[arg-type]
    objective = ContrastiveObjective(config)
    loss = forward_backward(
        laid_out, objective, local.microbatches(size), group=group, autocast=nullcontext
    ).clone()
    if group is not None:
        dist.all_reduce(loss, group=group)
        loss /= dist.get_world_size(group)
    gradients = {}
    for name, parameter in laid_out.named_parameters():
        assert parameter.grad is not None, name
        gradient = parameter.grad
        gradients[name] = gradient.full_tensor() if isinstance(gradient, DTensor) else gradient
    return float(loss), gradients


def main() -> None:
    dist.init_process_group("gloo")
    size, rank = dist.get_world_size(), dist.get_rank()
    layouts = {
        f"dp{size}": DistributedConfig(),
        f"fsdp{size}_zero2": DistributedConfig(zero_stage=2),
        f"fsdp{size}": DistributedConfig(zero_stage=3),
    }
    if size == 4:
        layouts["hsdp2x2"] = DistributedConfig(zero_stage=3, dp_replicate=2, dp_shard=2)
    results = []
    for kind in ("softmax", "sigmoid"):
        reference_loss, reference = step(model(kind), kind, batch(), BATCH, None)
        if size == 2:  # one process with cached gradients needs no layout
            for micro in (5, 1):
                loss, gradients = step(model(kind), kind, batch(), micro, None)
                results.append(
                    report("one", kind, micro, False, loss, reference_loss, gradients, reference)
                )
        for (name, config), cached, recompute, exchange in product(
            layouts.items(), (False, True), (False, True), ("gather", "ring")
        ):
            if recompute and not cached and name.startswith("dp"):
                continue  # the plain recompute case runs on the sharded layouts
            if recompute and exchange == "ring":
                continue  # the two meet nowhere
            degrees = degrees_of(config, size)
            world = lay_out(degrees, torch.device("cpu"))
            config = DistributedConfig(**{**vars(config), "grad_checkpointing": recompute})
            laid_out = apply_layout(model(kind), config, world)
            share = BATCH // size
            micro = 3 if size == 2 and cached else 1 if cached else share
            local = batch().microbatches(share)[world.data_rank]
            loss, gradients = step(laid_out, kind, local, micro, world.data_group, exchange)
            name = f"{name} {exchange}"
            results.append(
                report(name, kind, micro, recompute, loss, reference_loss, gradients, reference)
            )
    if rank == 0:
        Path(sys.argv[1]).write_text(json.dumps(results))
    dist.destroy_process_group()


def report(
    name: str,
    kind: str,
    micro: int,
    recompute: bool,
    loss: float,
    reference_loss: float,
    gradients: dict[str, torch.Tensor],
    reference: dict[str, torch.Tensor],
) -> dict[str, object]:
    errors = gradient_errors(gradients, reference)
    worst = max(errors, key=errors.__getitem__)
    return {
        "case": f"{name} {kind} micro={micro} recompute={recompute}",
        "loss_error": abs(loss - reference_loss) / abs(reference_loss),
        "worst": worst,
        "gradient_error": errors[worst],
    }


if __name__ == "__main__":
    main()
