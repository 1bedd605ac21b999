"""Data parallelism by FSDP2 on the (dp_replicate, fsdp) mesh.

Plain replication is its corner with one shard, so there is one mechanism and one gradient
reduction. `distributed.zero_stage` in these terms: 0 replicates (ZeRO's none); 1 and 2 shard
parameters, gradients and moments and keep gathered weights from forward to backward; 3 frees them
in between. What is sharded lives in float32; `fsdp_gather` and `fsdp_reduce` say in what blocks'
weights and gradients travel. Weights outside the blocks (embeddings, norms, projections, the logit
scale) and routers are gathered as they are: their rounding would cost more than their traffic.
Source: Rajbhandari et al. 2020 (ZeRO), section 5; Zhao et al. 2023 (PyTorch FSDP).
Status: runs on CPU with gloo; not run on a GPU yet, and fsdp_offload nowhere.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence

import torch
from torch import nn
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
)

from carillon.engine.nn.router import Router
from carillon.engine.parallel.config import DistributedConfig
from carillon.engine.parallel.expert import expert_units, placing
from carillon.engine.parallel.mesh import World

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def shard_over_data(
    model: nn.Module,
    roots: Sequence[nn.Module],
    blocks: Iterable[nn.Module],
    config: DistributedConfig,
    world: World,
    *,
    reshard: bool,
) -> None:
    """Shard experts, then blocks, then what is left of each root, in place."""
    mesh = world.fsdp_mesh
    if mesh is None:
        return
    # A decoder's logits are a view; nothing writes into them, which is what the warning is about.
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view tensor")
    policy = MixedPrecisionPolicy(
        param_dtype=_DTYPES[config.fsdp_gather],
        reduce_dtype=_DTYPES[config.fsdp_reduce],
        cast_forward_inputs=False,
    )
    offload = CPUOffloadPolicy() if config.fsdp_offload else OffloadPolicy()
    for experts in expert_units(model, world):
        fully_shard(
            experts,
            mesh=world.expert_mesh,
            reshard_after_forward=reshard,
            shard_placement_fn=placing(world),
            mp_policy=policy,
            offload_policy=offload,
        )
    if config.fsdp_gather != "fp32":
        for module in model.modules():
            if isinstance(module, Router):
                fully_shard(
                    module, mesh=mesh, reshard_after_forward=reshard, offload_policy=offload
                )
    # Replicas on CPUs have nothing to overlap with and nothing to free: one exchange of all
    # gradients at the end is quicker there, if all travel alike.
    alike = config.fsdp_gather == config.fsdp_reduce == "fp32"
    if not (alike and world.device.type == "cpu" and mesh.size(1) == 1):
        for block in blocks:
            fully_shard(
                block,
                mesh=mesh,
                reshard_after_forward=reshard,
                mp_policy=policy,
                offload_policy=offload,
            )
    for root in roots:
        fully_shard(root, mesh=mesh, reshard_after_forward=reshard, offload_policy=offload)
