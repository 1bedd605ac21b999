"""Mesh axes and degrees: pp, dp_replicate, dp_shard, cp, tp, checked before any device is touched.

Experts have no axis of their own: their ep processes are neighbours in dp_shard x cp, which for
other weights shard one replica. So there are up to three views of the same processes, in the same
order (`Meshes`). `zero_stage` in the PRD's terms maps onto FSDP2: 0 replicates, 1 and 2 shard
parameters but keep them gathered between forward and backward, 3 frees them again. The meshes are
passed in, never global.
Status: runs on CPU with gloo; CUDA with NCCL has not run on a GPU yet.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from carillon.engine.choices import divisors, either, listed, multiples, nearest
from carillon.engine.config import UserError
from carillon.engine.parallel.config import DistributedConfig

SAMPLE_AXES = ("pp", "dp_replicate", "dp_shard", "cp", "tp")
DENSE_AXES = ("pp", "dp_replicate", "fsdp", "tp")
EXPERT_AXES = ("pp", "dp_replicate", "expert_fsdp", "ep", "tp")
Axis = Literal["pp", "cp", "ep", "tp"]


@dataclass(frozen=True, kw_only=True)
class Degrees:
    """Processes along each axis; their product is the world size (ep is a part of it already)."""

    pp: int
    dp_replicate: int
    dp_shard: int
    cp: int
    tp: int
    ep: int = 1

    @property
    def data(self) -> int:
        """Processes that hold different samples."""
        return self.dp_replicate * self.dp_shard


def degrees_of(config: DistributedConfig, world_size: int) -> Degrees:
    """Fill in what the config leaves open. Raises UserError when the product is not the world."""
    others = config.pp * config.cp * config.tp
    if world_size % others:
        raise UserError(_undivided(config, world_size, others))
    replicate, shard = _data_degrees(config, world_size // others)
    split = shard * config.cp
    if split % config.ep:
        fits = listed(divisors(split))
        raise UserError(
            f"distributed.ep: {config.ep} does not divide dp_shard x cp = {split}; use one of "
            f"{fits}, or shard over more processes (zero_stage 1, 2 or 3)"
        )
    return Degrees(
        pp=config.pp,
        dp_replicate=replicate,
        dp_shard=shard,
        cp=config.cp,
        tp=config.tp,
        ep=config.ep,
    )


def _undivided(config: DistributedConfig, world_size: int, others: int) -> str:
    given = [f"{name}={getattr(config, name)}" for name in ("pp", "cp", "tp")]
    named = " x ".join(f"distributed.{one}" for one in given if not one.endswith("=1"))
    return (
        f"{named}: {world_size} processes do not divide by pp x cp x tp = {others}; start "
        f"{either(multiples(others, world_size))} processes, or use degrees whose "
        f"product is {either(nearest(divisors(world_size), others))}"
    )


def _data_degrees(config: DistributedConfig, data: int) -> tuple[int, int]:
    """Replicas, and the shards of each, of `data` processes."""
    replicate, shard = config.dp_replicate, config.dp_shard
    fits = divisors(data)
    if config.zero_stage == 0:
        if replicate not in (None, data):
            raise UserError(
                f"distributed.dp_replicate: {replicate} given, but zero_stage=0 shards nothing: "
                f"all {data} data-parallel processes are replicas. Drop dp_replicate, or set "
                "distributed.zero_stage=1, 2 or 3 to shard each replica over more processes"
                + ("" if replicate in fits else f", with dp_replicate {_near(fits, replicate)}")
            )
        return data, 1
    if replicate is None and shard is None:
        return 1, data
    if replicate is not None and shard is not None:
        if replicate * shard != data:
            near = min(fits, key=lambda n: abs(n - replicate) + abs(data // n - shard))
            raise UserError(
                f"distributed.dp_replicate={replicate} x distributed.dp_shard={shard}: they make "
                f"{replicate * shard} processes, not the {data} that are data-parallel; use "
                f"{near} x {data // near}, or leave one out"
            )
        return replicate, shard
    name, given = ("dp_shard", shard) if replicate is None else ("dp_replicate", replicate)
    if given not in fits:
        raise UserError(
            f"distributed.{name}: {given} does not divide {data} data-parallel processes; use "
            f"{_near(fits, given)}"
        )
    return (data // given, given) if replicate is None else (given, data // given)


def _near(allowed: list[int], given: int | None) -> str:
    return either(nearest(allowed, given or 1))


class Meshes(NamedTuple):
    """The same processes in the same order, by what is split over them."""

    dense: DeviceMesh  # by DENSE_AXES; fsdp is dp_shard x cp
    experts: DeviceMesh | None  # by EXPERT_AXES, where ep > 1; expert_fsdp x ep is dp_shard x cp
    samples: DeviceMesh | None  # by SAMPLE_AXES, where cp > 1
    data: DeviceMesh  # dp_replicate x dp_shard, in one dim
    loss: DeviceMesh  # dp_replicate x dp_shard x cp, in one dim


@dataclass(frozen=True, kw_only=True)
class World:
    """This process's place: its device and the meshes (none in one process)."""

    rank: int
    size: int
    device: torch.device
    degrees: Degrees
    meshes: Meshes | None

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    @property
    def group(self) -> dist.ProcessGroup | None:
        """All processes; none in one process."""
        return dist.group.WORLD if self.meshes is not None else None

    @property
    def data_group(self) -> dist.ProcessGroup | None:
        """Processes whose samples make one global batch; none in one process."""
        return self.meshes.data.get_group() if self.meshes is not None else None

    @property
    def data_rank(self) -> int:
        return int(self.meshes.data.get_local_rank()) if self.meshes is not None else 0

    @property
    def loss_group(self) -> dist.ProcessGroup | None:
        """Processes whose losses have the global batch's as their mean; none in one process."""
        return self.meshes.loss.get_group() if self.meshes is not None else None

    @property
    def fsdp_mesh(self) -> DeviceMesh | None:
        """Replicas by shards of all weights but the experts'."""
        return self.meshes.dense["dp_replicate", "fsdp"] if self.meshes is not None else None

    @property
    def expert_mesh(self) -> DeviceMesh | None:
        """Replicas by shards of the experts' weights, beside ep."""
        if self.meshes is None or self.meshes.experts is None:
            return self.fsdp_mesh
        return self.meshes.experts["dp_replicate", "expert_fsdp"]

    def axis(self, name: Axis) -> DeviceMesh | None:
        """The processes along one axis; none when this one stands alone on it.

        tp is that of the dense mesh; for experts' weights take `meshes.experts["tp"]`.
        """
        if self.meshes is None or getattr(self.degrees, name) == 1:
            return None
        meshes = {"cp": self.meshes.samples, "ep": self.meshes.experts}
        mesh = meshes.get(name, self.meshes.dense)
        assert mesh is not None  # it is there where the degree is above 1
        return mesh[name]


def lay_out(degrees: Degrees, device: torch.device) -> World:
    """The world of a process group that has started, whose size is the product of `degrees`."""

    def mesh(names: tuple[str, ...], **sizes: int) -> DeviceMesh:
        shape = tuple(sizes.get(name) or getattr(degrees, name) for name in names)
        return init_device_mesh(device.type, shape, mesh_dim_names=names)

    split = degrees.dp_shard * degrees.cp
    dense = mesh(DENSE_AXES, fsdp=split)
    loss = dense["dp_replicate", "fsdp"]._flatten("loss")
    samples = mesh(SAMPLE_AXES) if degrees.cp > 1 else None
    meshes = Meshes(
        dense=dense,
        experts=mesh(EXPERT_AXES, expert_fsdp=split // degrees.ep) if degrees.ep > 1 else None,
        samples=samples,
        data=loss if samples is None else samples["dp_replicate", "dp_shard"]._flatten("data"),
        loss=loss,
    )
    return World(
        rank=dist.get_rank(),
        size=dist.get_world_size(),
        device=device,
        degrees=degrees,
        meshes=meshes,
    )
