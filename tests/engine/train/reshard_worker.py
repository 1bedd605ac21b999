"""Saves in every layout and form, then goes on from each in every other: reshard_worker.py FOLDER

The parent has torch imported and forks the processes of each layout. FOLDER/LAYOUT/FORM gets the
checkpoints, FOLDER/LAYOUT.save.json and .resume.json the losses and what was compared.
"""

import json
import os
import socket
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor

from carillon.engine.data.pairs import Batch
from carillon.engine.losses.contrastive import ContrastiveConfig, ContrastiveObjective
from carillon.engine.models.encoders.text import TextOverrides
from carillon.engine.models.encoders.vision import VisionOverrides
from carillon.engine.models.towers.dual_encoder import DualEncoderConfig, build_dual_encoder
from carillon.engine.parallel.apply import apply_layout
from carillon.engine.parallel.collectives import by_mesh, gradient_norm, whole
from carillon.engine.parallel.config import DistributedConfig
from carillon.engine.parallel.start import start_world
from carillon.engine.train.checkpoint import Checkpoint, CheckpointStore
from carillon.engine.train.checkpoint_reader import read_tensors
from carillon.engine.train.optim import NamedAdamW, OptimizationConfig, WeightAverage
from carillon.engine.train.step import forward_backward

LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {  # processes, and what `distributed` sets
    "one": (1, {}),
    "dp2": (2, {}),
    "fsdp2": (2, {"zero_stage": 3}),
    "tp2": (2, {"tp": 2}),
    "fsdp4": (4, {"zero_stage": 3}),
    "hsdp2x2": (4, {"zero_stage": 3, "dp_replicate": 2, "dp_shard": 2}),
    "tp4": (4, {"tp": 4}),
    "tp2 fsdp2": (4, {"zero_stage": 3, "tp": 2}),
}
FORMS = ("dcp", "safetensors", "zarr")
BATCH, BEFORE, AFTER = 8, 3, 3
# Odd widths, where the model allows them: shards of unequal size.
MODEL = DualEncoderConfig(
    dims=18,
    vision_backbone="vit-ti-8",
    vision=VisionOverrides(image_size=16, width=32, depth=1, num_heads=4),
    text_backbone="clip-text-ti",
    text=TextOverrides(context=9, width=32, depth=1, num_heads=4),
)


def batch(step: int) -> Batch:
    generator = torch.Generator().manual_seed(step)
    return Batch(
        images=torch.randint(0, 256, (BATCH, 16, 16, 3), generator=generator, dtype=torch.uint8),
        tokens=torch.randint(0, 51, (BATCH, 9), generator=generator),
        lengths=torch.randint(3, 10, (BATCH,), generator=generator),
        keys=[str(i) for i in range(BATCH)],
        languages=["en"] * BATCH,
        bad=[],
    )


class Replica:
    """A model in a layout, with AdamW and an average, as the trainer has them."""

    def __init__(self, distributed: dict[str, Any]) -> None:
        config = DistributedConfig(device="cpu", precision="fp32", **distributed)
        self.world = start_world(config, distributed)
        model = build_dual_encoder(MODEL, vocab_size=51, generator=torch.Generator().manual_seed(1))
        self.model = apply_layout(model, config, self.world)
        optimization = OptimizationConfig(steps=1)
        self.optimizer = NamedAdamW(self.model, optimization, self.model.no_decay_names())
        self.average = WeightAverage(self.model, 0.9)
        self.objective = ContrastiveObjective(ContrastiveConfig())

    def tensors(self) -> dict[str, Tensor]:
        tensors = {f"model.{n}": p.detach() for n, p in self.model.named_parameters()}
        moments = self.optimizer.state_tensors()
        tensors |= {f"optimizer.{name}": value for name, value in moments.items()}
        return tensors | {f"average.{n}": value for n, value in self.average.tensors.items()}

    def step(self, step: int) -> float:
        share = BATCH // self.world.degrees.data
        local = batch(step).microbatches(share)[self.world.data_rank]
        group = self.world.data_group
        loss = forward_backward(
            self.model, self.objective, local, share, group=group, autocast=nullcontext
        ).clone()
        norm = gradient_norm(self.model.parameters())
        for parameters in by_mesh(self.model.parameters()):
            torch.nn.utils.clip_grads_with_norm_(parameters, 1.0, norm)
        self.optimizer.step(1e-3)
        self.model.clamp_scale_()
        self.average.update(self.model)
        self.optimizer.zero_grad()
        if group is not None:
            dist.all_reduce(loss, group=group)
            loss /= dist.get_world_size(group)
        return float(loss)


def save(replica: Replica, layout: str, folder: Path) -> Any:
    """The losses of an unbroken run, and a checkpoint in every form on the way."""
    before = [replica.step(step) for step in range(BEFORE)]
    for form in FORMS:
        write(replica, folder / layout / form, form)
    content = {name: whole(value).clone() for name, value in replica.tensors().items()}
    if replica.world.is_main:
        torch.save(content, folder / f"{layout}.pt")
    after = [replica.step(step) for step in range(BEFORE, BEFORE + AFTER)]
    return {"before": before, "after": after, "tensors": len(content)}


def resume(replica: Replica, layout: str, folder: Path) -> Any:
    """From every layout's checkpoint, in forms that take turns: tensors, files and losses."""
    results = {}
    turn = list(LAYOUTS).index(layout)
    for i, other in enumerate(LAYOUTS):
        form = FORMS[(turn + i) % len(FORMS)]
        for tensor in replica.tensors().values():
            tensor.fill_(7.0)
        checkpoint = Checkpoint(path=folder / other / form / f"step-{BEFORE:08d}", step=BEFORE)
        read_tensors(checkpoint, replica.tensors(), partial=False)
        saved = torch.load(folder / f"{other}.pt", weights_only=True)
        found = {name: whole(value) for name, value in replica.tensors().items()}
        different = [name for name in saved if not torch.equal(found[name], saved[name])]
        same_bytes = None
        if form == "safetensors":
            again = write(replica, folder / f"{layout} again", form)
            if replica.world.is_main:
                same_bytes = again.content_hash == checkpoint.content_hash
        after = [replica.step(step) for step in range(BEFORE, BEFORE + AFTER)]
        results[other] = {
            "form": form,
            "names": found.keys() == saved.keys(),
            "different": different,
            "same_bytes": same_bytes,
            "after": after,
        }
    return results


def write(replica: Replica, folder: Path, form: str) -> Checkpoint:
    store = CheckpointStore(folder, keep_last=1, is_main=replica.world.is_main, form=form)
    store.save(BEFORE, replica.tensors(), {"step": BEFORE})
    store.wait()
    return store.at(BEFORE)


def one_process(rank: int, work: str, layout: str, folder: Path, port: int) -> None:
    size, distributed = LAYOUTS[layout]
    if size > 1:
        place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size}
        address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        os.environ.update({name: str(value) for name, value in (place | address).items()})
    replica = Replica(distributed)
    result = {"save": save, "resume": resume}[work](replica, layout, folder)
    if replica.world.is_main:
        (folder / f"{layout}.{work}.json").write_text(json.dumps(result))
    if dist.is_initialized():
        dist.destroy_process_group()


def main(folder: Path) -> None:
    for work in ("save", "resume"):
        for layout, (size, _) in LAYOUTS.items():
            with socket.socket() as probe:
                probe.bind(("127.0.0.1", 0))
                port = probe.getsockname()[1]
            given = (work, layout, folder, port)
            mp.start_processes(one_process, given, nprocs=size, start_method="fork")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
