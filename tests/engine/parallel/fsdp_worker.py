"""Started by torchrun: how weights and gradients travel under FSDP's policies; rank 0 writes."""

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from carillon.engine.losses.contrastive import ContrastiveConfig, ContrastiveObjective
from carillon.engine.models.towers.dual_encoder import build_dual_encoder
from carillon.engine.parallel.apply import apply_layout
from carillon.engine.parallel.collectives import whole
from carillon.engine.parallel.config import DistributedConfig
from carillon.engine.parallel.mesh import World, degrees_of, lay_out
from carillon.engine.train.parity.dual_encoder import CLIP, pairs
from carillon.engine.train.step import forward_backward

AUTOCAST = partial(torch.autocast, "cpu", dtype=torch.bfloat16)
LAYOUTS = {
    "all fp32": DistributedConfig(zero_stage=3),
    "gather bf16": DistributedConfig(zero_stage=3, fsdp_gather="bf16"),
    "gather and reduce bf16": DistributedConfig(
        zero_stage=2, fsdp_gather="bf16", fsdp_reduce="bf16"
    ),
    "replicas that reduce in bf16": DistributedConfig(fsdp_reduce="bf16"),
}


class Traffic(TorchDispatchMode):
    """Bytes of what is reduced over the data processes inside, by dtype."""

    def __init__(self) -> None:
        super().__init__()
        self.reduced: dict[str, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(func)
        if "reduce_scatter" in name or "allreduce" in name:
            for tensor in torch.utils._pytree.tree_leaves(args):
                if isinstance(tensor, Tensor):
                    key = str(tensor.dtype)
                    self.reduced[key] = self.reduced.get(key, 0) + tensor.nbytes
                    break
        return func(*args, **(kwargs or {}))


@contextmanager
def seen(model: nn.Module) -> Iterator[dict[str, str]]:
    """What the parameters are while their modules run."""
    dtypes: dict[str, str] = {}

    def look(name: str, module: nn.Module, _: Any) -> None:
        for own, parameter in module.named_parameters(recurse=False):
            dtypes[f"{name}.{own}"] = str(parameter.dtype)

    handles = [
        module.register_forward_pre_hook(partial(look, name))
        for name, module in model.named_modules()
    ]
    yield dtypes
    for handle in handles:
        handle.remove()


def step(layout: DistributedConfig | None, world: World | None) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(1)
    model = build_dual_encoder(CLIP, vocab_size=50, generator=generator)
    batch, group = pairs(), None
    if layout is not None and world is not None:
        model = apply_layout(model, layout, world)
        group = world.data_group
        batch = batch.microbatches(len(batch.keys) // world.degrees.data)[world.data_rank]
    objective = ContrastiveObjective(ContrastiveConfig())
    with seen(model) as dtypes, Traffic() as traffic:
        size = len(batch.keys)
        forward_backward(model, objective, batch, size, group=group, autocast=AUTOCAST)
    gradients = [p.grad for p in model.parameters()]
    assert all(gradient is not None for gradient in gradients)
    flat = torch.cat([whole(g).flatten() for g in gradients if g is not None])
    kept = {str(p.dtype) for p in model.parameters()}
    return {"dtypes": dtypes, "reduced": traffic.reduced, "kept": sorted(kept), "gradient": flat}


def main() -> None:
    dist.init_process_group("gloo")
    reference = step(None, None)["gradient"]
    results = {}
    for name, layout in LAYOUTS.items():
        world = lay_out(degrees_of(layout, dist.get_world_size()), torch.device("cpu"))
        found = step(layout, world)
        difference = found.pop("gradient") - reference
        results[name] = found | {"error": float(difference.norm() / reference.norm())}
    if dist.get_rank() == 0:
        Path(sys.argv[1]).write_text(json.dumps(results))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
