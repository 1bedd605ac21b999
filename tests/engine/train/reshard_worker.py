"""Saves in every layout and form, then goes on from each in every other: reshard_worker.py FOLDER

The parent has torch imported and forks as many processes as each size of layouts takes. They have
all layouts of their size, and go on once all processes have saved. FOLDER/KIND/LAYOUT/FORM gets the
checkpoints, FOLDER/KIND/LAYOUT.save.json and .resume.json the losses and what was compared.
"""

import json
import socket
import sys
from multiprocessing.synchronize import Barrier
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from reshard_replicas import KINDS, LAYOUTS, DecoderReplica, Replica
from torch import Tensor
from torch.distributed.tensor import DTensor

from carillon.engine.parallel.collectives import whole
from carillon.engine.parallel.pipeline import gather_named
from carillon.engine.train.checkpoint import Checkpoint, CheckpointStore
from carillon.engine.train.checkpoint_reader import read_tensors

FORMS = ("dcp", "safetensors", "zarr")
BEFORE, AFTER = 3, 2  # the second loss after reading comes of the moments that were read
TIMEOUT_S = 500


def save(replica: Replica, layout: str, folder: Path) -> Any:
    """The losses of an unbroken run, and a checkpoint in every form on the way."""
    before = [replica.step(step) for step in range(BEFORE)]
    for form in FORMS:
        write(replica, folder / layout / form, form)
    content = {name: whole(value).clone() for name, value in replica.tensors().items()}
    content = gather_named(content, replica.stages)
    if replica.world.is_main:
        torch.save(content, folder / f"{layout}.pt")
    after = [replica.step(step) for step in range(BEFORE, BEFORE + AFTER)]
    result = {"before": before, "after": after, "names": sorted(content)}
    if isinstance(replica, DecoderReplica):
        biases = [x for name, x in content.items() if name.endswith(".router.bias")]
        result |= {"margin": replica.margin, "moved": sum(bool(x.any()) for x in biases)}
    return result


def resume(replica: Replica, layout: str, folder: Path) -> Any:
    """From every layout's checkpoint, in forms that take turns: tensors, files and losses."""
    results: dict[str, Any] = {}
    layouts = list(LAYOUTS[folder.name])
    turn, rewritten = layouts.index(layout), False
    for i, other in enumerate(layouts):
        form = FORMS[(turn + i) % len(FORMS)]
        tensors = replica.tensors()
        for tensor in tensors.values():
            tensor.fill_(7.0)
        checkpoint = Checkpoint(path=folder / other / form / f"step-{BEFORE:08d}", step=BEFORE)
        saved = torch.load(folder / f"{other}.pt", weights_only=True)
        shapes = {name: value.shape for name, value in saved.items()}
        read_tensors(checkpoint, tensors, partial=False, shapes=shapes)
        different = [name for name, x in tensors.items() if not holds(x, saved[name])]
        same_bytes = None
        if form == "safetensors" and other != layout and not rewritten:
            rewritten = True
            again = write(replica, folder / f"{layout} again", form)
            if replica.world.is_main:
                same_bytes = again.content_hash == checkpoint.content_hash
        results[other] = {
            "form": form,
            "compared": from_all((sorted(tensors), different)),
            "same_bytes": same_bytes,
            "after": [replica.step(step) for step in range(BEFORE, BEFORE + AFTER)],
        }
    return results


def holds(tensor: Tensor, whole_one: Tensor) -> bool:
    """Whether this process's share has the bits of its place in the whole tensor.

    The place is where a save by this layout writes it: a wrong one shows when another reads that.
    """
    if not isinstance(tensor, DTensor):
        return torch.equal(tensor, whole_one)
    local = tensor.to_local()
    if local.numel() == 0:
        return True
    (chunk,) = tensor.__create_chunk_list__()
    place = zip(chunk.offsets, chunk.sizes, strict=True)
    return torch.equal(local, whole_one[tuple(slice(at, at + size) for at, size in place)])


def from_all(value: Any) -> list[Any]:
    """What every process has."""
    if not dist.is_initialized():
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def write(replica: Replica, folder: Path, form: str) -> Checkpoint:
    store = CheckpointStore(folder, keep_last=1, is_main=replica.world.is_main, form=form)
    store.save(BEFORE, replica.tensors(), {"step": BEFORE})
    store.wait()
    return store.at(BEFORE)


def one_process(rank: int, size: int, port: int, saved: Barrier, folder: Path) -> None:
    if size > 1:
        address = f"tcp://127.0.0.1:{port}"
        dist.init_process_group("gloo", init_method=address, rank=rank, world_size=size)
    replicas = {
        (kind, layout): KINDS[kind](distributed)
        for kind, layouts in LAYOUTS.items()
        for layout, (processes, distributed) in layouts.items()
        if processes == size
    }
    for work in (save, resume):
        if work is resume:
            saved.wait(TIMEOUT_S)
        for (kind, layout), replica in replicas.items():
            result = work(replica, layout, folder / kind)
            if rank == 0:
                name = f"{layout}.{work.__name__}.json"
                (folder / kind / name).write_text(json.dumps(result))
    if size > 1:
        dist.destroy_process_group()


def main(folder: Path) -> None:
    for kind in LAYOUTS:
        (folder / kind).mkdir()
    sizes = sorted({size for layouts in LAYOUTS.values() for size, _ in layouts.values()})
    saved = mp.get_context("fork").Barrier(sum(sizes))
    groups = []
    for size in sizes:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        given = (size, port, saved, folder)
        groups.append(
            mp.start_processes(
                one_process, given, nprocs=size, join=False, daemon=True, start_method="fork"
            )
        )
    while groups:  # one that fails ends all
        groups = [group for group in groups if not group.join(timeout=0.2)]


if __name__ == "__main__":
    main(Path(sys.argv[1]))
