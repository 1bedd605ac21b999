"""Packs of text, pictures, video and sound: what is in them is what the samples hold."""

import io
import json
from contextlib import closing
from itertools import islice
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import soundfile
import torch
from PIL import Image
from torch import Tensor

from carillon.engine.config import build
from carillon.engine.data.config import DataConfig
from carillon.engine.data.loader import TrainingLoader, state_of_all
from carillon.engine.data.packed_media import (
    NO_OWNER,
    MediaBudget,
    MediaPacks,
    PackedMedia,
    Part,
)
from carillon.engine.data.patches import grid_of, patches_of, places_of
from carillon.engine.data.shards import ShardWriter
from carillon.engine.data.tokenizer import Tokenizer
from carillon.engine.data.training_data import training_data

TOKENIZER = Tokenizer.train(["red green blue dog cat"], vocab_size=300)
CPU = torch.device("cpu")
BUDGET = MediaBudget(
    tokens=96,
    patches=64,
    sound_s=2.0,
    samples=12,
    pictures=6,
    sample_tokens=16,
    picture_patches=24,
    frame_patches=6,
    frames=3,
    sample_sound_s=0.5,
    patch=4,
    rate=8000,
)


def png(number: int, height: int, width: int) -> bytes:
    file = io.BytesIO()
    pixels = np.random.default_rng(number).integers(0, 256, (height, width, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def wav(number: int, seconds: float) -> bytes:
    file = io.BytesIO()
    values = np.random.default_rng(number).uniform(-0.5, 0.5, round(seconds * 8000))
    soundfile.write(file, values, 8000, format="WAV", subtype="FLOAT")
    return file.getvalue()


def mp4(number: int, frames: int) -> bytes:
    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=10)
        stream.width, stream.height, stream.pix_fmt = 32, 16, "yuv420p"
        for index in range(frames):
            level = (number * 40 + index * 20) % 256
            frame = av.VideoFrame.from_ndarray(np.full((16, 32, 3), level, np.uint8), "rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return file.getvalue()


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of every six samples: two pictures, text alone, a sound, a video with sound, all damaged."""
    out = tmp_path_factory.mktemp("sets") / "media"
    with ShardWriter(out, name="media", source={}) as writer:
        for i in range(60):
            text = {"captions": {"en": [f"dog {i}" + " cat" * (i % 5)]}}
            members: dict[str, bytes] = {}
            if i % 6 in (0, 1):
                members = {"png": png(i, 8 + 4 * (i % 7), 8 + 4 * (i % 5))}
            elif i % 6 == 3:
                members, text = {"wav": wav(i, 0.2 + 0.2 * (i % 4))}, {}
            elif i % 6 == 4:
                members = {"mp4": mp4(i, 5), "wav": wav(i, 0.3)}
                text = {"transcripts": {"en": [f"said {i}"]}}
            elif i % 6 == 5 and i < 12:
                members = {"png": b"no picture"}
            writer.write(f"key{i:02d}", members, text)
    return out


def packed(path: Path, **changes: Any) -> PackedMedia:
    values = {"path": str(path), "batch_size": 4, "num_workers": 0, "max_bad_share": 1.0}
    values |= {"packing": {"window": 6, "streams": 2}}
    config = build(DataConfig, values | changes)
    return PackedMedia(training_data(config, 5), TOKENIZER, BUDGET)


def read(samples: PackedMedia, num: int, rank: int = 0, world: int = 1) -> list[MediaPacks]:
    loader = TrainingLoader(samples, rank=rank, world_size=world, device=CPU)
    with closing(iter(loader)) as batches:
        return list(islice(batches, num))


def segments(part: Part, pack: int) -> dict[int, Tensor]:
    """Values of each sample of a pack that has any."""
    ends, owners = part.offsets[pack].tolist(), part.owners[pack].tolist()
    return {
        owner: part.values[pack, ends[j] : ends[j + 1]]
        for j, owner in enumerate(owners)
        if owner != NO_OWNER
    }


def test_packs_hold_what_the_samples_hold(path: Path) -> None:
    samples = packed(path)
    kinds = set()
    for batch in read(samples, 8):
        keys = iter(batch.keys)
        for pack, num in enumerate(batch.num_samples.tolist()):
            texts, pictures, sounds = (
                segments(part, pack) for part in (batch.tokens, batch.patches, batch.sound)
            )
            for owner in range(num):
                number = int(next(keys)[3:])
                kind = number % 6
                kinds.add(kind)
                assert (owner in texts) == (kind != 3)
                assert (owner in pictures) == (kind in (0, 1, 4))
                assert (owner in sounds) == (kind in (3, 4))
                if owner in texts:
                    dog = f"dog {number}" + " cat" * (number % 5)
                    words = f"said {number}" if kind == 4 else dog
                    assert TOKENIZER.decode(texts[owner].tolist()).strip().startswith(words[:12])
                if kind in (0, 1):
                    height, width = 8 + 4 * (number % 7), 8 + 4 * (number % 5)
                    image = np.array(Image.open(io.BytesIO(png(number, height, width))))
                    grid = grid_of(height, width, patch=4, most=24)
                    assert np.array_equal(pictures[owner].numpy(), patches_of(image, grid, 4))
                if kind == 3 and 0.2 + 0.2 * (number % 4) <= 0.5:
                    whole, _ = soundfile.read(io.BytesIO(wav(number, 0.2 + 0.2 * (number % 4))))
                    assert np.allclose(sounds[owner].numpy(), whole, atol=1e-6)
            assert len(texts) + len(pictures) + len(sounds) > 0
    assert kinds == {0, 1, 2, 3, 4, 5}


def test_frames_of_a_video_have_their_numbers(path: Path) -> None:
    for batch in read(packed(path), 8):
        first = 0
        for pack, num in enumerate(batch.num_samples.tolist()):
            keys = batch.keys[first : first + num]
            first += num
            starts = batch.patches.offsets[pack].tolist()
            for j, owner in enumerate(batch.patches.owners[pack].tolist()):
                if owner == NO_OWNER or int(keys[owner][3:]) % 6 != 4:
                    continue
                places = batch.places[pack, starts[j] : starts[j + 1]]
                assert places[:, 0].unique().tolist() == [0, 1, 2]
                assert len(places) == 3 * 6 or len(places) == 3 * 2 * 3
                return
    raise AssertionError("no video was read")


def test_budgets_hold_and_the_rest_is_padding(path: Path) -> None:
    for batch in read(packed(path), 6):
        assert batch.tokens.values.shape == (4, 96)
        assert batch.patches.values.shape == (4, 64, 48)
        assert batch.sound.values.shape == (4, 16_000)
        assert (batch.num_samples <= 12).all()
        assert ((batch.patches.owners != NO_OWNER).sum(1) <= 6).all()
        for part, pad in ((batch.tokens, TOKENIZER.pad_id), (batch.patches, 0), (batch.sound, 0)):
            assert (part.offsets.diff(dim=1) >= 0).all()
            assert (part.offsets[:, -1] == part.values.shape[1]).all()
            for pack, owners in enumerate(part.owners.tolist()):
                used = part.offsets[pack, sum(owner != NO_OWNER for owner in owners)]
                assert (part.values[pack, used:] == pad).all()


def test_any_ranks_and_any_stop_give_the_same_packs(path: Path) -> None:
    whole = read(packed(path), 6)
    states: list[dict[str, Any]] = []
    for world, workers in ((2, 0), (4, 2), (1, 1)):
        loaders = [
            TrainingLoader(packed(path, num_workers=workers), rank=r, world_size=world, device=CPU)
            for r in range(world)
        ]
        for loader in loaders if states else ():
            loader.load_state_dict(json.loads(json.dumps(state_of_all(states))))
        done = loaders[0].position // 4
        for step in (done, done + 1):
            parts = [next(one) for one in [iter(loader) for loader in loaders]]
            assert [key for one in parts for key in one.keys] == whole[step].keys
            assert torch.equal(
                torch.cat([p.patches.values for p in parts]), whole[step].patches.values
            )
            assert torch.equal(torch.cat([p.sound.values for p in parts]), whole[step].sound.values)
        states = [loader.state_dict() for loader in loaders]


def test_a_long_sound_gives_a_drawn_window(path: Path) -> None:
    lengths = {
        len(values)
        for batch in read(packed(path), 8)
        for pack in range(4)
        for values in segments(batch.sound, pack).values()
    }
    assert max(lengths) == 4000  # half a second of 0.6 and 0.8


def test_damaged_pictures_are_bad_samples(path: Path) -> None:
    bad = {key for batch in read(packed(path), 12) for key, _ in batch.bad}
    assert bad == {"key05", "key11"}


@pytest.mark.parametrize("size", [(1, 1), (1, 5000), (3000, 2), (100, 100), (17, 31), (640, 480)])
def test_grids_keep_the_shape_within_the_budget(size: tuple[int, int]) -> None:
    for most in (1, 7, 64, 576):
        rows, columns = grid_of(*size, patch=16, most=most)
        assert 1 <= rows * columns <= most
        asked = max(1, round(size[0] / 16)), max(1, round(size[1] / 16))
        assert rows <= asked[0]
        assert columns <= asked[1]
        if most == 576 and asked[0] * asked[1] <= most:
            assert (rows, columns) == asked
        elif most == 576 and min(size) > 50:
            assert rows / columns == pytest.approx(size[0] / size[1], rel=0.1)


def test_patches_are_the_picture_cut_up() -> None:
    image = np.random.default_rng(0).integers(0, 256, (12, 20, 3), dtype=np.uint8)
    patches, places = patches_of(image, (3, 5), 4), places_of((3, 5), frame=2)
    assert patches.shape == (15, 48)
    for patch, (frame, row, column) in zip(patches, places, strict=True):
        cut = image[4 * row : 4 * row + 4, 4 * column : 4 * column + 4]
        assert np.array_equal(patch.reshape(4, 4, 3), cut)
        assert frame == 2


def test_budgets_that_hold_no_sample_are_refused() -> None:
    with pytest.raises(ValueError, match="patches: a sample may take 1568, a pack has room for 9"):
        MediaBudget(patches=900)
    with pytest.raises(ValueError, match="tokens: a sample may take 0, a pack"):
        MediaBudget(sample_tokens=0)
