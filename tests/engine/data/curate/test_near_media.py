"""Sounds and videos: copies are found through codecs, cuts and sizes; others are left alone."""

import io
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import av
import numpy as np
import pyarrow as pa
import pytest
import soundfile

from carillon.engine.data.curate.item import Item
from carillon.engine.data.curate.sound_fingerprint import RATE, fingerprint
from carillon.engine.data.curate.stage import Population, SetStage
from carillon.engine.data.curate.stages.near_sounds import NearSounds
from carillon.engine.data.curate.stages.near_videos import NearVideos
from carillon.engine.data.decode.audio import decode_audio
from carillon.engine.data.samples import RawSample
from carillon.engine.data.shards import open_dataset


def tones(seed: int, seconds: float = 6.0, rate: int = 16_000) -> Any:
    """A melody of drawn chords with some noise."""
    rng = np.random.default_rng(seed)
    at = np.arange(int(seconds * rate)) / rate
    sound = 0.02 * rng.standard_normal(len(at))
    for start in np.arange(0, seconds, 0.25):
        here = (at >= start) & (at < start + 0.25)
        for pitch in rng.uniform(200, 2500, 3):
            sound[here] += 0.2 * np.sin(2 * np.pi * pitch * at[here])
    return sound


def encoded(samples: Any, rate: int = 16_000, form: str = "FLAC", **more: Any) -> bytes:
    buffer = io.BytesIO()
    soundfile.write(buffer, samples, rate, format=form, **more)
    return buffer.getvalue()


def decide(stage: SetStage, members: Sequence[dict[str, bytes]]) -> dict[int, int]:
    items = [Item(RawSample("k", one, {"captions": {}}), "train") for one in members]
    findings = [stage.examine(one) for one in items]
    signatures = [one.signature if one else None for one in findings]
    decisions = stage.decide(
        Population(
            keys=[],
            signatures=pa.chunked_array([pa.array(signatures, pa.binary())]),
            quality=np.zeros(len(items)),
            is_evaluation=np.zeros(len(items), bool),
            seed=0,
        )
    )
    return dict(zip(decisions.rows.tolist(), decisions.matches.tolist(), strict=True))


def test_a_sound_is_found_through_codec_loudness_cut_and_rate() -> None:
    melody = tones(0)
    half_rate = melody.reshape(-1, 2).mean(1)
    copies = [
        {"flac": encoded(melody)},
        {"ogg": encoded(0.3 * melody, form="OGG", subtype="VORBIS")},
        {"flac": encoded(melody[20_000:80_000])},
        {"wav": encoded(np.stack([half_rate] * 2, 1), 8_000, "WAV")},
    ]
    others = [{"flac": encoded(tones(seed))} for seed in range(1, 6)]
    assert decide(NearSounds(), [*copies, *others]) == {1: 0, 2: 0, 3: 0}


def test_silence_and_short_sounds_have_no_fingerprint() -> None:
    assert fingerprint(np.zeros(RATE * 5, np.float32)) is None
    assert fingerprint(np.ones(RATE // 4, np.float32)) is None
    assert decide(NearSounds(), [{"flac": encoded(np.zeros(32_000))}] * 2) == {}


def test_real_sounds_are_told_apart(real_data: Callable[[str], Path]) -> None:
    """40 of ESC-10: each is its own, and each one's copy by Vorbis at low quality is found."""
    (split,) = open_dataset(real_data("esc10")).splits.values()
    sounds = [split.read(row).medium("audio") for row in range(0, 160, 4)]
    copies = []
    for sound in sounds[:10]:
        samples, rate = soundfile.read(io.BytesIO(sound))
        copies.append(encoded(samples, rate, "OGG", subtype="VORBIS", compression_level=0.8))
    members = [{"flac": one} for one in sounds] + [{"ogg": one} for one in copies]
    found = decide(NearSounds(), members)
    heard = [decode_audio(one, rate=RATE, mono=True).samples[0] for one in sounds[:10]]
    audible = [i for i, samples in enumerate(heard) if fingerprint(samples)]
    assert set(found) <= {40 + i for i in range(10)}
    assert len([i for i in audible if found.get(40 + i) == i]) >= 0.9 * len(audible)


def clip(
    pictures: Sequence[Any], size: int = 128, rate: int = 12, bit_rate: int = 400_000
) -> bytes:
    """An MP4 in which each picture drifts for a quarter of a second."""
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=rate)
        stream.width = stream.height = size
        stream.pix_fmt, stream.bit_rate = "yuv420p", bit_rate
        for number in range(len(pictures) * rate // 4):
            picture = pictures[number * 4 // rate].resize((size, size))
            for packet in stream.encode(av.VideoFrame.from_image(picture)):
                container.mux(packet)
        for packet in stream.encode():
            container.mux(packet)
    return buffer.getvalue()


def test_a_video_is_found_through_codec_size_crop_and_frame_rate(tools: SimpleNamespace) -> None:
    scenes = [tools.scene(seed) for seed in range(8)]
    w, h = scenes[0].size
    cropped = [one.crop((w // 20, h // 20, w * 19 // 20, h * 19 // 20)) for one in scenes]
    members = [
        {"mp4": clip(scenes)},
        {"mp4": clip(scenes, size=96, bit_rate=150_000)},
        {"mp4": clip(cropped)},
        {"mp4": clip(scenes, rate=24)},
        {"mp4": clip(scenes[::-1])},
        {"mp4": clip([tools.scene(seed) for seed in range(20, 28)])},
    ]
    assert decide(NearVideos(), members) == {1: 0, 2: 0, 3: 0}


def test_what_cannot_be_decoded_says_so() -> None:
    for stage, member in ((NearSounds(), "flac"), (NearVideos(), "mp4")):
        item = Item(RawSample("k", {member: b"neither"}, {"captions": {}}), "train")
        with pytest.raises(ValueError, match="neither"):
            stage.examine(item)
