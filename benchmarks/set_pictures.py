"""Pictures of what is in the real sets, for the docs: a grid, spectrograms, lines, frames.

Only of items whose licence allows it without more than naming the author (ALLOWED): so none of the
stamps (GPL) and none under a share-alike licence.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import av
import numpy as np
from matplotlib import get_data_path
from PIL import Image, ImageDraw, ImageFont

from carillon.engine.data.decode.image import decode_rgb
from carillon.engine.data.samples import RawSample
from carillon.engine.data.shards import Dataset

ALLOWED = ("CC0-1.0", "CC-BY-3.0", "CC-BY-4.0", "Apache-2.0", "MIT", "Unicode-3.0")
_FONT = ImageFont.truetype(str(Path(get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf"), 13)
_WIDTH = 900
_LABELLED = 0x0530  # the label's font has Latin, Greek and Cyrillic letters


def draw(name: str, dataset: Dataset, out: Path) -> bool:
    """Write the picture of a set; False when the set has none that may be shown."""
    samples = sorted(_allowed(dataset), key=lambda sample: sample.key)
    if name not in _DRAWN or not samples:
        return False
    image = _DRAWN[name](samples)
    out.parent.mkdir(parents=True, exist_ok=True)
    image.quantize(160, dither=Image.Dither.NONE).save(out, optimize=True)
    return True


def _allowed(dataset: Dataset) -> Iterator[RawSample]:
    for split in dataset.splits.values():
        step = max(1, len(split) // 600)
        for row in range(0, len(split), step):
            sample = split.read(row)
            if sample.meta["licence"] in ALLOWED:
                yield sample


def _spread(samples: Sequence[RawSample], count: int) -> list[RawSample]:
    count = min(count, len(samples))
    return [samples[number * len(samples) // count] for number in range(count)]


def _grid(samples: Sequence[RawSample]) -> Image.Image:
    side, columns, rows = 64, 14, 5
    image = Image.new("RGB", (columns * side, rows * side), "white")
    for number, sample in enumerate(_spread(samples, columns * rows)):
        picture = decode_rgb(sample.medium("image"))
        picture.thumbnail((side - 8, side - 8))
        image.paste(picture, (number % columns * side + 4, number // columns * side + 4))
    return image


def _lines(samples: Sequence[RawSample]) -> Image.Image:
    """A picture of each language, with the polygons that the set states."""
    first: dict[str, RawSample] = {}
    for sample in samples:
        if len(sample.meta["lines"]) == 1:
            first.setdefault(next(iter(sample.meta["captions"])), sample)
    columns, width, height = 3, _WIDTH // 3, 62
    image = Image.new("RGB", (_WIDTH, -(-len(first) // columns) * height), "white")
    for number, sample in enumerate(first.values()):
        picture = decode_rgb(sample.medium("image"))
        for line in sample.meta["lines"]:
            corners = [tuple(corner) for corner in line["polygon"]]
            ImageDraw.Draw(picture).polygon(corners, outline=(220, 0, 0))
        picture.thumbnail((width - 8, height - 8))
        image.paste(picture, (number % columns * width + 4, number // columns * height + 4))
    return image


def _sounds(samples: Sequence[RawSample]) -> Image.Image:
    """A clip of each speaker as a spectrogram, with what is said."""
    first: dict[str, RawSample] = {}
    for sample in samples:
        duration_s = sample.meta["media"]["flac"]["duration_s"]
        if "transcripts" in sample.meta and 1.2 < duration_s < 3.5:
            ((language, (said,)),) = sample.meta["transcripts"].items()
            if all(ord(char) < _LABELLED for char in said):
                first.setdefault(language, sample)
    strips = []
    for language, sample in sorted(first.items())[:6]:
        samples_heard, rate = _heard(sample.medium("audio"))
        strip = _spectrogram(samples_heard, rate, width=_WIDTH - 20, seconds=3.5, height=90)
        said = sample.meta["transcripts"][language][0]
        label = f"{language}  {sample.meta['speaker']}: {said}"
        strips.append(_labelled(strip, label[:110]))
    return _stacked(strips)


def _heard(sound: bytes) -> tuple[np.ndarray[Any, Any], int]:
    with av.open(io.BytesIO(sound), "r") as container:
        rate = container.streams.audio[0].rate
        frames = [frame.to_ndarray().reshape(-1) for frame in container.decode(audio=0)]
    return np.concatenate(frames).astype(np.float64) / 32768, rate


def _spectrogram(
    heard: np.ndarray[Any, Any], rate: int, *, width: int, seconds: float, height: int
) -> Image.Image:
    """Power of 0-8 kHz in dB, 55 dB from white to black, on a time scale of `width` a `seconds`."""
    size, hop = 512, max(1, round(seconds * rate / width))
    padded = np.pad(heard, size // 2)
    starts = np.arange(0, len(heard), hop)
    windows = np.stack([padded[start : start + size] for start in starts]) * np.hanning(size)
    power = np.abs(np.fft.rfft(windows, axis=1)) ** 2
    top = min(size // 2, round(8000 / rate * size))
    decibels = 10 * np.log10(power[:, :top] + 1e-8)
    scaled = ((decibels - decibels.max() + 55) / 55).clip(0, 1)
    levels = (255 - 255 * scaled.T[::-1]).astype(np.uint8)
    image = Image.new("L", (width, height), 255)
    drawn = Image.fromarray(levels).resize((len(starts), height), Image.Resampling.BILINEAR)
    image.paste(drawn.crop((0, 0, min(width, drawn.width), height)))
    return image.convert("RGB")


def _clips(samples: Sequence[RawSample]) -> Image.Image:
    """Frames of a few clips at equal distances, with what is told of them."""
    strips = []
    of_codec = [[s for s in samples if s.meta["codec"] == codec] for codec in ("h264", "vp9")]
    for sample in [*_spread(of_codec[0], 3), *_spread(of_codec[1], 3)]:
        with av.open(io.BytesIO(sample.medium("video")), "r") as container:
            frames = [frame.to_image() for frame in container.decode(video=0)]
        side, columns = 112, 8
        strip = Image.new("RGB", (columns * side, side), "white")
        for number in range(columns):
            frame = frames[number * (len(frames) - 1) // (columns - 1)]
            strip.paste(frame.resize((side - 4, side - 4)), (number * side + 2, 2))
        told = sample.meta["captions"]
        label = f"{sample.meta['codec']}  {told['en'][0]}"
        longer = f"{label}  |  {told['fr'][0]}"
        strips.append(_labelled(strip, longer if len(longer) < 100 else label))
    return _stacked(strips)


def _labelled(strip: Image.Image, label: str) -> Image.Image:
    image = Image.new("RGB", (_WIDTH, strip.height + 20), "white")
    ImageDraw.Draw(image).text((4, 2), label, fill="black", font=_FONT)
    image.paste(strip, (2, 20))
    return image


def _stacked(strips: Sequence[Image.Image]) -> Image.Image:
    image = Image.new("RGB", (_WIDTH, sum(strip.height for strip in strips)), "white")
    y = 0
    for strip in strips:
        image.paste(strip, (0, y))
        y += strip.height
    return image


_DRAWN = {
    "emoji": _grid,
    "prompts": _sounds,
    "text-lines": _lines,
    "clips": _clips,
    "speech": _sounds,
}
