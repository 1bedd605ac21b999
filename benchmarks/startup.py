"""Start-up and memory on a data set of 10,000 shards and 10^9 samples, written in the real format.

Each shard has an index of 100,000 rows of its own on disk (27 GB in all, so it needs the room).
The tar of 100,000 small pictures is one file under 10,000 names: what is measured is the way to a
row and what is kept of it, not the pictures. Measured in a process of its own: from nothing open to
the first batch, with two workers; then what a worker's memory grows to over random rows, and a
resume at the middle.
Run by `python benchmarks/startup.py FOLDER`; writes results/startup.json and keeps the set.
"""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from record import keep

NUM_SHARDS, ROWS = 10_000, 100_000
BATCH, SIZE, CONTEXT, WORKERS, BATCHES = 128, 64, 32, 2, 60


def write_set(folder: Path) -> None:
    """One shard by the writer, its tar under all names, its index written for each of them."""
    from PIL import Image

    from carillon.engine.data.manifest import MANIFEST_NAME, Manifest, SplitFiles, manifest_bytes
    from carillon.engine.data.shards import ShardWriter, open_dataset

    with ShardWriter(folder, name="large", source={}, max_shard_bytes=1 << 40) as writer:
        for row in range(ROWS):
            buffer = io.BytesIO()
            colour = tuple(np.random.default_rng(row % 512).integers(0, 256, 3).tolist())
            Image.new("RGB", (72, 64), colour).save(buffer, "JPEG")
            writer.write(f"k{row:06d}", {"jpg": buffer.getvalue()}, {"captions": {"en": ["a dog"]}})
    dataset = open_dataset(folder)
    (shard,) = dataset.manifest.splits["train"].shards
    index = (folder / shard.index).read_bytes()
    shards = []
    for number in range(NUM_SHARDS):
        tar, own = f"s{number:05d}.tar", f"s{number:05d}.index.npy"
        os.link(folder / shard.file, folder / tar)
        (folder / own).write_bytes(index)
        shards.append(replace(shard, file=tar, index=own, items=None, items_sha256=None))
    files = replace(dataset.manifest.splits["train"], shards=tuple(shards))
    manifest = Manifest(name="large", splits={"train": SplitFiles(**vars(files))}, source={})
    (folder / MANIFEST_NAME).write_bytes(manifest_bytes(manifest))
    os.sync()


def measure(folder: Path, position: int) -> dict[str, Any]:
    """In this process, which has opened nothing yet."""
    import torch

    from carillon.engine.config import build
    from carillon.engine.data.config import DataConfig
    from carillon.engine.data.loader import TrainingLoader
    from carillon.engine.data.pairs import PositionedSamples
    from carillon.engine.data.tokenizer import Tokenizer
    from carillon.engine.data.training_data import training_data

    torch.set_num_threads(1)
    tokenizer = Tokenizer.train(["a dog"], vocab_size=300)
    values = {"path": str(folder), "batch_size": BATCH, "num_workers": WORKERS}
    config = build(DataConfig, values)
    before_mb = resident_mb(os.getpid())
    began = time.perf_counter()
    data = training_data(config, 1337)
    opened = time.perf_counter() - began
    samples = PositionedSamples(data, tokenizer, size=SIZE, context=CONTEXT)
    loader = TrainingLoader(samples, rank=0, world_size=1, device=torch.device("cpu"))
    loader.position = position
    batches = iter(loader)
    next(batches)
    first = time.perf_counter() - began
    opened_mb = resident_mb(os.getpid())
    workers = children()
    early_mb = max(map(own_mb, workers))
    for _ in range(BATCHES):
        next(batches)
    return {
        "num_samples": data.num_training,
        "from_position": position,
        "to_open_s": round(opened, 3),
        "to_first_batch_s": round(first, 3),
        "training_process_mb_of_the_open_set": round(opened_mb - before_mb, 1),
        "worker_own_mb_at_first": round(early_mb, 1),
        f"worker_own_mb_after_{BATCHES}_batches": round(max(map(own_mb, workers)), 1),
    }


def children() -> list[int]:
    path = Path(f"/proc/{os.getpid()}/task/{os.getpid()}/children")
    return [int(pid) for pid in path.read_text().split()]


def resident_mb(process: int) -> float:
    return _sum_kb(process, ("Rss",)) / 1024


def own_mb(process: int) -> float:
    """What a process has for itself: pages that it shares with its parent do not count."""
    return _sum_kb(process, ("Private_Clean", "Private_Dirty")) / 1024


def _sum_kb(process: int, fields: tuple[str, ...]) -> int:
    lines = Path(f"/proc/{process}/smaps_rollup").read_text().splitlines()
    return sum(int(line.split()[1]) for line in lines if line.split(":")[0] in fields)


def main() -> None:
    folder = Path(sys.argv[1])
    if len(sys.argv) > 2:
        print(json.dumps(measure(folder, int(sys.argv[2]))))
        return
    if not (folder / "dataset.json").is_file():
        write_set(folder)
    results = []
    for position in (0, 0, 500_000_000 // BATCH * BATCH):  # the first meets a cold page cache
        command = [sys.executable, __file__, str(folder), str(position)]
        ran = subprocess.run(command, check=True, capture_output=True, text=True)
        results.append(json.loads(ran.stdout.splitlines()[-1]))
        print(json.dumps(results[-1]), flush=True)
    keep("startup", {"num_shards": NUM_SHARDS, "workers": WORKERS, "results": results})


if __name__ == "__main__":
    main()
