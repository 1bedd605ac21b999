import io
import os
import random
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from PIL import Image, ImageDraw

from carillon.engine.config import UserError
from carillon.engine.data.sets.build import is_heldout
from carillon.engine.data.sets.clip_scenes import SIDE, draw_scene, frames_of, trimmed
from carillon.engine.data.sets.clip_video import check_encoders, encode_clip
from carillon.engine.data.sets.clip_words import MOTIONS, WORDS, Told, caption, questions
from carillon.engine.data.sets.clips import build_clips
from carillon.engine.data.sets.emoji_concepts import base_concept
from carillon.engine.data.sets.emoji_sources import Pack, Sources
from carillon.engine.data.sets.npm import Package
from carillon.engine.data.shards import Dataset

WriteNpm = Callable[[Package, Mapping[str, object]], None]
SamplesOf = Callable[..., dict[str, Any]]
Cldr = tuple[Package, Package]
needs_ffmpeg = pytest.mark.skipif(  # where CI lacks it, the tests fail
    shutil.which("ffmpeg") is None and "CI" not in os.environ,
    reason="ffmpeg is not installed: apt-get install ffmpeg",
)
RED = (255, 0, 0)


def disc() -> Image.Image:
    """A red disc in a clear picture, off its middle."""
    picture = Image.new("RGBA", (96, 96), (0, 0, 0, 0))
    ImageDraw.Draw(picture).ellipse((10, 20, 69, 79), fill=(*RED, 255))
    return picture


@pytest.fixture
def sources(cldr: Cldr, write_npm: WriteNpm) -> Sources:
    packs = tuple(
        Pack(
            vendor=vendor,
            package=Package(spec=f"@x/{vendor}@1.0.0", sha256=None),
            licence=licence,
            author=f"the makers of {vendor}",
        )
        for vendor, licence in (("noto", "Apache-2.0"), ("openmoji", "CC-BY-SA-4.0"))
    )
    points = [f"{ord(emoji):x}" for emoji in "🔴❤💜👍🐈🐕🐟🌳🚲🏠☂🍎"]
    body = {"body": '<circle cx="8" cy="8" r="6" fill="#f00"/>'}
    for pack in packs:
        icons = {"icons": {f"i{point}": body for point in points}, "width": 16, "height": 16}
        chars = {point: f"i{point}" for point in points}
        write_npm(pack.package, {"icons.json": icons, "chars.json": chars})
    return Sources(packs=packs, names=cldr[0], derived_names=cldr[1])


def build(tmp_path: Path, sources: Sources, name: str = "set", **options: Any) -> Dataset:
    arguments = {"num_clips": 8, "languages": ("en", "fr", "de"), **options}
    return build_clips(tmp_path / name, data=tmp_path / "debs", sources=sources, **arguments)


def frames_in(video: bytes) -> tuple[np.ndarray, Any]:
    with av.open(io.BytesIO(video)) as container:
        stream = container.streams.video[0]
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(stream)]
        return np.stack(frames), stream


def redness(frame: np.ndarray) -> np.ndarray:
    pixels = frame.astype(int)
    return (pixels[..., 0] > 180) & (pixels[..., 1] < 80) & (pixels[..., 2] < 80)


@needs_ffmpeg
def test_everything_is_where_its_track_says(
    tmp_path: Path, sources: Sources, samples_of: SamplesOf
) -> None:
    samples = samples_of(build(tmp_path, sources))
    assert set(samples) == {f"clip-{number:06d}" for number in range(8)}
    for split, sample in samples.values():
        meta = sample.meta
        (suffix,) = sample.members
        frames, stream = frames_in(sample.members[suffix])
        facts = meta["media"][suffix]
        assert frames.shape == (facts["num_frames"], facts["height"], facts["width"], 3)
        assert float(stream.average_rate) == facts["fps"]
        assert stream.codec_context.name == meta["codec"] == {"mp4": "h264", "webm": "vp9"}[suffix]
        assert facts["duration_s"] == pytest.approx(facts["num_frames"] / facts["fps"], abs=1e-6)
        outs = {is_heldout(base_concept(concept)) for concept in meta["concepts"]}
        assert outs == {split == "heldout_concept"}
        assert sum(track["role"] == "actor" for track in meta["tracks"]) == meta["count"]
        for number, frame in enumerate(frames):
            left = redness(frame)
            for track in meta["tracks"]:
                (x, y), (width, height) = track["positions"][number], track["size"]
                assert left[y + height // 2, x + width // 2]
                left[max(0, y - 2) : y + height + 2, max(0, x - 2) : x + width + 2] = False
            assert not left.any(), "something is where no track is"
        first, last = np.array(meta["tracks"][0]["positions"])[[0, -1]]
        moved = {"right": (1, 0), "left": (-1, 0), "down": (0, 1), "up": (0, -1)}
        actors = [track for track in meta["tracks"] if track["role"] == "actor"]
        first, last = np.array(actors[0]["positions"])[[0, -1]]
        assert tuple(np.sign(last - first)) == moved.get(meta["motion"], (0, 0))


@needs_ffmpeg
def test_what_is_told_is_what_was_drawn(
    tmp_path: Path, sources: Sources, samples_of: SamplesOf
) -> None:
    samples = samples_of(build(tmp_path, sources, num_clips=5))
    vendors = {sample.meta["vendor"] for _, sample in samples.values()}
    assert vendors == {"noto"}  # the vendor held out in the emoji set is not used
    for _, sample in samples.values():
        meta = sample.meta
        assert set(meta["captions"]) == {"en", "fr", "de"}
        answers = {(qa["language"], qa["kind"]): qa["answer"] for qa in meta["qa"]}
        assert answers["en", "count"] == answers["de", "count"] == str(meta["count"])
        assert answers["en", "what"] in meta["captions"]["en"][0]
        assert ("en", "bystander") in answers or len(meta["concepts"]) == 1
        assert (meta["licence"], meta["author"]) == ("Apache-2.0", "the makers of noto")
        assert meta["licence_source"] == "npm:@x/noto@1.0.0 package/package.json"
    assert {len(sample.meta["concepts"]) for _, sample in samples.values()} == {1, 2}


@needs_ffmpeg
def test_a_seed_gives_the_same_bytes(tmp_path: Path, sources: Sources) -> None:
    first = build(tmp_path, sources, "a", num_clips=2)
    again = build(tmp_path, sources, "b", num_clips=2)
    assert again.fingerprint == first.fingerprint
    other = build(tmp_path, sources, "c", num_clips=2, seed=1)
    assert other.fingerprint != first.fingerprint


@pytest.mark.parametrize("seed", range(40))
def test_scenes_keep_to_their_lanes(seed: int) -> None:
    scene, pictures = draw_scene(random.Random(seed), disc(), disc() if seed % 2 else None)
    assert len(scene.tracks) == len(pictures) == scene.told.count + seed % 2
    for number in range(scene.num_frames):
        taken = np.zeros((SIDE, SIDE), int)
        for track in scene.tracks:
            assert len(track.positions) == scene.num_frames
            (x, y), (width, height) = track.positions[number], track.size
            assert 0 <= x <= SIDE - width
            assert 0 <= y <= SIDE - height
            taken[y : y + height, x : x + width] += 1
        assert taken.max() == 1, "one thing hides another"
    for track in scene.tracks:
        before, after = track.positions[: scene.first + 1], track.positions[scene.last :]
        assert len(set(before)) == len(set(after)) == 1
        is_moving = track.role == "actor" and scene.told.motion != "still"
        assert (before[0] != after[0]) == is_moving


def test_pictures_keep_their_transparency() -> None:
    scene, pictures = draw_scene(random.Random(2), disc(), None)
    frame = np.frombuffer(next(frames_of(scene, pictures)), np.uint8).reshape(SIDE, SIDE, 3)
    (x, y), (width, height) = scene.tracks[0].positions[0], scene.tracks[0].size
    box = frame[y : y + height, x : x + width].astype(int)
    assert redness(box)[height // 2, width // 2]
    # The corners beside the disc show the background, which is neither white nor black.
    for corner in (box[0, 0], box[0, -1], box[-1, 0], box[-1, -1]):
        assert corner.min() > 110
        assert corner.max() <= 251
    assert redness(box).mean() == pytest.approx(np.pi / 4, abs=0.06)


def test_only_what_can_be_seen_counts() -> None:
    picture = trimmed(disc(), 30)
    assert picture.size == (30, 30)
    assert picture.getpixel((15, 15)) == (*RED, 255)
    wide = Image.new("RGBA", (40, 40), (0, 0, 0, 0))
    wide.paste((0, 0, 255, 255), (0, 10, 40, 20))
    assert trimmed(wide, 20).size == (20, 5)


@pytest.mark.parametrize("language", WORDS)
@pytest.mark.parametrize("motion", MOTIONS)
def test_every_language_tells_every_scene(language: str, motion: str) -> None:
    words = WORDS[language]
    assert len(words.ways) == len(set(words.ways)) == len(MOTIONS)
    told = Told(motion=motion, count=3, has_bystander=True)
    text = caption(told, words, "NAME", "OTHER")
    assert text.startswith("3 × NAME")
    assert text.count("OTHER") == 1
    assert "{" not in text
    asked = {
        kind: (question, answer)
        for kind, question, answer in questions(told, words, "NAME", "OTHER")
    }
    assert set(asked) == {"what", "count", "motion", "bystander"}
    assert asked["what"][1] == "NAME"
    assert asked["count"][1] == "3"
    assert asked["motion"][1] == words.ways[MOTIONS.index(motion)]
    assert asked["bystander"][1] == "OTHER"
    alone = caption(Told(motion=motion, count=1, has_bystander=False), words, "NAME", None)
    assert alone.startswith("NAME")
    assert "×" not in alone


def test_without_ffmpeg_the_package_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match=r"ffmpeg was not found.*apt-get install ffmpeg"):
        build_clips(tmp_path / "set")
    assert not (tmp_path / "set").exists()
    bare = tmp_path / "ffmpeg"
    bare.write_text("#!/bin/sh\necho ' V..... mpeg4'\n")
    bare.chmod(0o755)
    with pytest.raises(UserError, match="has no encoder libx264"):
        check_encoders()
    bare.write_text("#!/bin/sh\necho 'no space' >&2\nexit 1\n")
    with pytest.raises(UserError, match=r"ffmpeg failed \(1\): no space"):
        encode_clip(b"", "mp4", width=2, height=2, fps=1)


@pytest.mark.parametrize("num_clips", [0, 10**9])
def test_bad_settings_are_refused(tmp_path: Path, num_clips: int) -> None:
    with pytest.raises(UserError, match=r"--clips \d+: 1 to 100,000"):
        build_clips(tmp_path / "set", num_clips=num_clips)
