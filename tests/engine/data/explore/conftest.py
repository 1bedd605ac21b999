"""A small set of four modalities, whose shards are small, too; and the commands run on it."""

import io
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
from PIL import Image

from carillon.engine.cli import main
from carillon.engine.data.shard_writer import ShardWriter
from carillon.engine.data.shards import Dataset, open_dataset

Run = Callable[..., str]
COLOURS = ((220, 40, 40), (40, 160, 60), (40, 70, 220), (230, 200, 40))


def picture(colour: tuple[int, int, int], size: tuple[int, int] = (48, 32)) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", size, colour).save(buffer, "PNG")
    return buffer.getvalue()


def tone(frequency: float, duration_s: float = 0.5, rate: int = 16_000) -> bytes:
    """FLAC: silence, then a tone."""
    times = np.arange(round(duration_s * rate)) / rate
    samples = np.where(times < duration_s / 2, 0, 0.5 * np.sin(2 * np.pi * frequency * times))
    buffer = io.BytesIO()
    soundfile.write(buffer, samples, rate, format="FLAC")
    return buffer.getvalue()


def samples() -> Iterator[tuple[str, str, dict[str, bytes], dict[str, Any]]]:
    """Split, key, members and JSON: 4 pictures, 2 sounds, 2 texts."""
    for i, colour in enumerate(COLOURS):
        data = picture(colour)
        yield (
            "held_out" if i == 3 else "train",
            f"picture{i}",
            {"png": data},
            {
                "captions": {"en": [f"a patch {i}"], "fr": [f"une tache {i}"]},
                "licence": "CC0-1.0" if i < 2 else "CC-BY-4.0",
                "author": "Ada" if i % 2 else "Bo",
                "media": {"png": {"width": 48, "height": 32}},
                "rights": {"holder": f"holder {i}"},
            },
        )
    for i in range(2):
        yield (
            "train",
            f"sound{i}",
            {"flac": tone(440 * (i + 1))},
            {
                "transcripts": {"en": [f"spoken words {i}"]},
                "author": "Ada" if i else "Cy",
                "media": {"flac": {"duration_s": 0.5, "sample_rate": 16000}},
            },
        )
    yield "train", "text0", {}, {"captions": {"ar": ["مرحبا"]}, "licence": "CC0-1.0"}
    yield "train", "text1", {}, {"captions": {"de": ["Guten Tag, Ada"]}, "licence": "CC0-1.0"}


def write_set(folder: Path, *, without: tuple[str, ...] = (), name: str = "small") -> Dataset:
    with ShardWriter(folder, name=name, source={}, max_shard_bytes=8_000) as writer:
        for split, key, members, meta in samples():
            if key not in without:
                writer.write(key, members, meta, split=split)
    return open_dataset(folder)


@pytest.fixture
def dataset(tmp_path: Path) -> Dataset:
    return write_set(tmp_path / "small")


@pytest.fixture
def run(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Run:
    """`carillon data ...` in the folder of the set; returns what it printed, or its error."""
    monkeypatch.chdir(tmp_path)

    def command(*words: str, code: int = 0) -> str:
        capsys.readouterr()
        ended = main(["data", *words])
        said, errors = capsys.readouterr()
        assert ended == code, errors
        return said if code == 0 or said else errors

    return command


@pytest.fixture
def run_json(run: Run) -> Callable[..., Any]:
    def command(*words: str, code: int = 0) -> Any:
        return json.loads(run(*words, "--json", code=code))

    return command
