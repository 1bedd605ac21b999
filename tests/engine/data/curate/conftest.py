"""Small data sets of drawn scenes, every one unlike the others, and what is done to copies."""

import io
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFilter

from carillon.engine.config import build
from carillon.engine.data.curate.pipeline import Pipeline
from carillon.engine.data.shards import ShardWriter

Sample = tuple[str, Mapping[str, bytes], Mapping[str, Any]]


def scene(seed: int, size: int = 160) -> Image.Image:
    """A picture of many random shapes over a gradient."""
    rng = random.Random(seed)
    ramp = np.linspace(rng.randrange(60, 200), rng.randrange(60, 200), size)
    base = np.repeat(ramp[:, None], size, axis=1)[:, :, None] * np.ones(3)
    picture = Image.fromarray(base.astype(np.uint8))
    draw = ImageDraw.Draw(picture)
    for _ in range(14):
        x, y = rng.randrange(size), rng.randrange(size)
        w, h = rng.randrange(12, size // 2), rng.randrange(12, size // 2)
        colour = tuple(rng.randrange(256) for _ in range(3))
        shape = rng.choice([draw.ellipse, draw.rectangle])
        shape((x - w // 2, y - h // 2, x + w // 2, y + h // 2), fill=colour)
    return picture.filter(ImageFilter.GaussianBlur(0.6))


def jpeg(picture: Image.Image, quality: int = 90) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=quality)
    return buffer.getvalue()


def sample(key: str, seed: int, caption: str = "", **meta: Any) -> Sample:
    words = caption or f"a drawing of number {seed} with several shapes on a plain ground"
    return key, {"jpg": jpeg(scene(seed))}, {"captions": {"en": [words]}, **meta}


def write_set(out: Path, samples: Sequence[Sample], *, shard_bytes: int = 256 << 20) -> Path:
    writer = ShardWriter(out, name=out.name, source={}, max_shard_bytes=shard_bytes)
    with writer:
        for key, members, meta in samples:
            writer.write(key, members, meta)
    return out


def pipeline(*stages: Mapping[str, Any], **settings: Any) -> Pipeline:
    return build(Pipeline, {"stages": list(stages), **settings})


@pytest.fixture(scope="session")
def tools() -> SimpleNamespace:
    """The functions above, for tests, which cannot import this file."""
    return SimpleNamespace(
        scene=scene, jpeg=jpeg, sample=sample, write_set=write_set, pipeline=pipeline
    )
