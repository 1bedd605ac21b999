"""The training loader alone: against `webdataset`, its start-up, its memory.

Throughput is per second of one core's time, so a busy machine moves it little, and the two sides
take turns: webdataset's turn is the set-up of each round of ours. Both do the same work in one
process: read, decode by PIL, random resized crop to 64 px uint8, choose and tokenise a caption,
batch. They differ by design in order (ours is a random permutation of the whole set, webdataset's
a shuffle buffer over sequential reads) and in that ours checks every sample's CRC.
"""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from record import EMOJI, flickr8k_shards
from torchvision import transforms
from webdataset_loader import padded_tokens, pipeline

from carillon.engine.data.config import AugmentConfig, DataConfig
from carillon.engine.data.loader import TrainingLoader
from carillon.engine.data.manifest import MANIFEST_NAME, SplitFiles, manifest_bytes
from carillon.engine.data.pairs import PositionedSamples
from carillon.engine.data.shard_index import index_header
from carillon.engine.data.shards import open_dataset
from carillon.engine.data.tokenizer import Tokenizer, captions_of
from carillon.engine.data.training_data import training_data
from carillon.engine.data.transforms import ImageAugmentConfig

SIZE, CONTEXT, BATCH = 64, 32, 128
SCALE = (0.6, 1.0)
_BATCHES_A_ROUND = 4
_PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")


def _config(path: str | None, shards: list[Path], workers: int) -> DataConfig:
    image = ImageAugmentConfig(min_scale=SCALE[0], max_scale=SCALE[1])
    return DataConfig(
        path=path,
        shards=tuple(map(str, shards)),
        batch_size=BATCH,
        num_workers=workers,
        augment=AugmentConfig(image=image),
    )


def _config_of(name: str, workers: int = 0) -> DataConfig:
    if name == "emoji":
        return _config(str(EMOJI), [], workers)
    return _config(None, flickr8k_shards(), workers)


def _open(config: DataConfig, tokenizer: Tokenizer) -> TrainingLoader:
    data = training_data(config, 1337)
    samples = PositionedSamples(data, tokenizer, size=SIZE, context=CONTEXT)
    return TrainingLoader(samples, rank=0, world_size=1, device=torch.device("cpu"))


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    (split,) = open_dataset(list(map(str, flickr8k_shards()))).splits.values()
    return Tokenizer.train(captions_of(split, 20_000), vocab_size=4000)


def _webdataset(name: str, tokenizer: Tokenizer) -> Iterator[Any]:
    crop = transforms.RandomResizedCrop(
        SIZE, scale=SCALE, interpolation=transforms.InterpolationMode.BICUBIC
    )
    to_tensor = transforms.PILToTensor()  # uint8, as ours: the cheapest that torchvision has

    def transform(picture: Image.Image) -> torch.Tensor:
        return to_tensor(crop(picture))

    shards = sorted(EMOJI.glob("train-*.tar")) if name == "emoji" else flickr8k_shards()
    tokenize = padded_tokens(tokenizer, CONTEXT)
    return iter(pipeline(shards, transform=transform, tokenize=tokenize, batch_size=BATCH))


def _turn(batches: Iterator[Any]) -> Callable[[], float]:
    """A function that takes some batches and returns the core seconds that they cost."""

    def take() -> float:
        began = time.process_time()
        for images, *_ in islice(batches, _BATCHES_A_ROUND):
            assert images.shape[0] == BATCH
        return time.process_time() - began

    return take


@pytest.mark.parametrize("data", ["flickr8k", "emoji"])
def test_images_per_core_second(benchmark: Any, data: str, tokenizer: Tokenizer) -> None:
    torch.set_num_threads(1)
    ours = _turn(iter(_open(_config_of(data), tokenizer)))
    theirs = _turn(_webdataset(data, tokenizer))
    seconds: dict[str, list[float]] = {"carillon": [], "webdataset": []}
    for _ in range(3):  # the first turn fills webdataset's shuffle buffer
        ours(), theirs()

    benchmark.pedantic(
        lambda: seconds["carillon"].append(ours()),
        setup=lambda: seconds["webdataset"].append(theirs()),
        rounds=15,
    )
    images = BATCH * _BATCHES_A_ROUND
    ratios = [b / a for a, b in zip(*seconds.values(), strict=True)]
    rates = {side: images / statistics.median(took) for side, took in seconds.items()}
    benchmark.extra_info.update(
        unit="pictures per second of one core's time, medians of alternating rounds",
        images_per_core_s={side: round(rate, 1) for side, rate in rates.items()},
        ratio_median=round(statistics.median(ratios), 3),
        ratio_range=[round(min(ratios), 3), round(max(ratios), 3)],
    )
    assert statistics.median(ratios) >= 1.0


def _repeated(folder: Path, times: int, *, by: str) -> Path:
    """A set of Flickr8k's tars with `times` as many samples: each tar listed so many times, or
    listed once with an index whose rows are repeated."""
    plain = open_dataset(list(map(str, flickr8k_shards())))
    listed, in_index = (times, 1) if by == "shards" else (1, times)
    shards = []
    for number, shard in enumerate(plain.manifest.splits["all"].shards):
        rows = np.load(Path(plain.splits["all"]._folder, shard.index))
        index = folder / f"{number}.index.npy"
        header = index_header(rows.dtype["key"].itemsize, len(rows) * in_index)
        index.write_bytes(header + rows.tobytes() * in_index)
        sha256 = hashlib.sha256(index.read_bytes()).hexdigest()
        (folder / f"{number}.tar").symlink_to(shard.file)
        entry = replace(
            shard,
            file=f"{number}.tar",
            index=index.name,
            index_sha256=sha256,
            num_samples=len(rows) * in_index,
        )
        shards += [entry] * listed
    manifest = replace(plain.manifest, splits={"train": SplitFiles(shards=tuple(shards))})
    (folder / MANIFEST_NAME).write_bytes(manifest_bytes(manifest))
    return folder


@pytest.mark.parametrize("by", ["shards", "rows"])
def test_start_up(benchmark: Any, tmp_path: Path, tokenizer: Tokenizer, by: str) -> None:
    """From nothing open to the first batch, for 1, 10 and 100 times the samples."""
    torch.set_num_threads(1)
    configs: dict[int, DataConfig] = {}
    for times in (1, 10, 100):
        folder = tmp_path / str(times)
        folder.mkdir()
        configs[times] = _config(str(_repeated(folder, times, by=by)), [], 0)
    opened: dict[int, list[float]] = {times: [] for times in configs}
    first: dict[int, list[float]] = {times: [] for times in configs}
    num_samples = {}

    def start(times: int) -> None:
        began = time.process_time()
        loader = _open(configs[times], tokenizer)
        opened[times].append(time.process_time() - began)
        next(iter(loader))
        first[times].append(time.process_time() - began)
        num_samples[times] = loader.samples.data.num_training

    benchmark.pedantic(lambda: [start(t) for t in configs], rounds=15, warmup_rounds=2)
    to_first = {times: statistics.median(took) for times, took in first.items()}
    benchmark.extra_info.update(
        unit="core seconds from nothing open; 100x by shards: 128 samples of 118 shards",
        num_samples=num_samples,
        to_open_s={times: round(statistics.median(took), 4) for times, took in opened.items()},
        to_first_batch_s={times: round(took, 4) for times, took in to_first.items()},
    )
    if by == "rows":  # nothing grows; a tenth is for other pictures and for noise
        assert to_first[100] < 1.1 * to_first[1]
    else:  # a listed shard costs its entry in dataset.json and a stat, a touched one two opens
        assert to_first[100] - to_first[1] < 0.05


def _resident_mb(process: int) -> float:
    pages = int(Path(f"/proc/{process}/statm").read_text().split()[1])
    return pages * _PAGE_BYTES / 2**20


def test_memory_over_two_epochs(benchmark: Any, tokenizer: Tokenizer) -> None:
    """Resident memory of the training process and its worker at five points of two epochs."""
    torch.set_num_threads(1)
    loader = _open(_config_of("flickr8k", workers=1), tokenizer)
    num_batches = 2 * loader.samples.data.num_training // BATCH
    points = [round(num_batches * share) for share in (0.1, 0.325, 0.55, 0.775, 1.0)]
    resident: list[list[float]] = []

    def two_epochs() -> None:
        for number, _ in enumerate(islice(loader, points[-1]), start=1):
            if number in points:
                (worker,) = multiprocessing.active_children()
                resident.append([_resident_mb(os.getpid()), _resident_mb(worker.pid or 0)])

    benchmark.pedantic(two_epochs, rounds=1)
    growth = [
        100 * (last / first - 1) for first, last in zip(resident[0], resident[-1], strict=True)
    ]
    benchmark.extra_info.update(
        unit="resident MB, [training process, worker], at 10, 32.5, 55, 77.5 and 100% of 2 epochs",
        resident_mb=[[round(value, 1) for value in pair] for pair in resident],
        growth_percent=[round(value, 2) for value in growth],
    )
    assert max(growth) < 3
