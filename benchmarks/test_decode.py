"""Decoding to tensors, per second of one core's time, against what others use for it.

Pictures: whole loaders, from shards to standardised batches with tokens, each in one process and
one thread; ours checks every sample's CRC besides. Sound and video: our functions against the
libraries used directly, whole files to float samples and to RGB frames. All sides of a case take
turns; a ratio is the median over turns of ours over theirs, above 1 where ours is faster. Core
seconds are of all threads, so a side gains nothing by taking a second core. Whether a bar is met
against every side stands in the row; the assertions hold the ways that most use: Pillow and PyAV.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

import media_peers
import picture_loaders as peers
import pytest
import torch
from record import flickr8k_shards

from carillon.engine.data.config import AugmentConfig, DataConfig
from carillon.engine.data.loader import TrainingLoader
from carillon.engine.data.pairs import PositionedSamples
from carillon.engine.data.shards import open_dataset
from carillon.engine.data.tokenizer import Tokenizer, captions_of
from carillon.engine.data.training_data import training_data
from carillon.engine.data.transforms import ImageAugmentConfig, normalize

CONTEXT, BATCH, SCALE = 32, 32, (0.6, 1.0)
_ROUNDS = 7
_BATCHES_A_ROUND = 2
PICTURE_BAR, MEDIA_BAR = 1.2, 0.95
Side = Callable[[], Any]


def _race(benchmark: Any, sides: Mapping[str, Side], amount: float, unit: str) -> dict[str, float]:
    """Lets the sides take turns, `carillon` first; returns and records the ratios."""
    torch.set_num_threads(1)
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(2):
        for side in sides.values():
            side()

    def turn() -> None:
        for name, side in sides.items():
            began = time.process_time()
            side()
            seconds[name].append(time.process_time() - began)

    benchmark.pedantic(turn, rounds=_ROUNDS)
    ours = seconds["carillon"]
    ratios = {
        name: statistics.median(b / a for a, b in zip(ours, took, strict=True))
        for name, took in seconds.items()
        if name != "carillon"
    }
    benchmark.extra_info.update(
        unit=f"{unit} per second of one core's time",
        rate={
            name: float(f"{amount / statistics.median(took):.5g}") for name, took in seconds.items()
        },
        ratio={name: round(ratio, 2) for name, ratio in ratios.items()},
    )
    return ratios


def _ours(shards: list[Path], tokenizer: Tokenizer, size: int) -> Any:
    image = ImageAugmentConfig(min_scale=SCALE[0], max_scale=SCALE[1])
    config = DataConfig(
        shards=tuple(map(str, shards)),
        batch_size=BATCH,
        num_workers=0,
        augment=AugmentConfig(image=image),
    )
    data = training_data(config, 1337)
    samples = PositionedSamples(data, tokenizer, size=size, context=CONTEXT)
    loader = TrainingLoader(samples, rank=0, world_size=1, device=torch.device("cpu"))
    return ((normalize(batch.images), batch.tokens) for batch in loader)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    (split,) = open_dataset(list(map(str, flickr8k_shards()))).splits.values()
    return Tokenizer.train(captions_of(split, 2000), vocab_size=2000)


def _batches(batches: Any, size: int) -> Side:
    def take() -> None:
        for pictures, tokens in islice(batches, _BATCHES_A_ROUND):
            assert pictures.shape == (BATCH, 3, size, size)
            assert pictures.dtype == torch.float32
            assert len(tokens) == BATCH

    return take


@pytest.mark.parametrize(("stored", "size"), [(224, 64), (224, 128), (768, 224)])
def test_pictures(
    benchmark: Any, tmp_path: Path, tokenizer: Tokenizer, stored: int, size: int
) -> None:
    """A shard of Flickr8k as it is (224 px), and its photos enlarged to 768 px."""
    shards = flickr8k_shards()[:1]
    if stored != 224:
        shards = [media_peers.enlarged(shards[0], tmp_path / "large.tar", stored, 200)]
    work = peers.Work(tokenizer, size=size, context=CONTEXT, scale=SCALE)
    sides = {"carillon": _batches(_ours(shards, tokenizer, size), size)}
    for way, map_pair in (("pillow", work.by_pillow), ("torchvision", work.by_torchvision)):
        for peer in (peers.webdataset, peers.torch_dataloader):
            batches = peer(shards, work, map_pair, BATCH)
            sides[f"{peer.__name__} by {way}"] = _batches(batches, size)
        for other in (peers.energon, peers.litdata):
            folder = tmp_path / f"{other.__name__}-{way}"
            batches = other(shards, work, map_pair, BATCH, folder=folder)
            sides[f"{other.__name__} by {way}"] = _batches(batches, size)
    ratios = _race(benchmark, sides, BATCH * _BATCHES_A_ROUND, "pictures")
    benchmark.extra_info["bar"] = {"least": PICTURE_BAR, "met": min(ratios.values()) >= PICTURE_BAR}
    assert min(ratio for name, ratio in ratios.items() if "pillow" in name) >= PICTURE_BAR


@pytest.mark.parametrize("codec", media_peers.SOUND_CODECS)
def test_sound(benchmark: Any, codec: str) -> None:
    """Five-second clips at 16 kHz to float32 samples."""
    files, seconds = media_peers.sounds(codec)
    sides = media_peers.sound_sides(codec, files)
    ratios = _race(benchmark, sides, seconds / 3600, "hours of sound")
    benchmark.extra_info["bar"] = {"least": MEDIA_BAR, "met": min(ratios.values()) >= MEDIA_BAR}
    assert ratios["pyav"] >= MEDIA_BAR


@pytest.mark.parametrize("case", media_peers.VIDEO_CASES)
def test_video(benchmark: Any, case: str) -> None:
    """Three-second clips to all of their frames in RGB."""
    files, num_frames = media_peers.videos(case)
    sides = media_peers.video_sides(case, files)
    ratios = _race(benchmark, sides, num_frames, "frames")
    benchmark.extra_info["bar"] = {"least": MEDIA_BAR, "met": min(ratios.values()) >= MEDIA_BAR}
    assert ratios["pyav"] >= MEDIA_BAR
