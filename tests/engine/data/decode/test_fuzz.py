"""Damaged files of every kind end in arrays that make sense or in a DecodeError, whatever happens
inside of the decoders. `make fuzz-decode` runs many more of them, and leaves the bytes that it is
at in FUZZ_LAST, for a decoder that crashes takes the test with it."""

import io
import os
import runpy
import struct
import zlib
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import soundfile
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from PIL import Image

from carillon.engine.data.decode.audio import audio_header, decode_audio
from carillon.engine.data.decode.frame_choice import EveryFrame, KeyFrames, UniformFrames
from carillon.engine.data.decode.image import decode_image
from carillon.engine.data.decode.limits import AudioError, ImageError, Limits, VideoError
from carillon.engine.data.decode.video import decode_video

CLIPS = runpy.run_path(str(Path(__file__).with_name("clips.py")))
LIMITS = Limits(max_pixels=100_000, max_decoded_bytes=4_000_000, max_frames=200, max_decode_s=20.0)
EXAMPLES = int(os.environ.get("FUZZ_EXAMPLES", "150"))
LAST = os.environ.get("FUZZ_LAST")
fuzzed = settings(
    max_examples=EXAMPLES,
    deadline=None,
    derandomize="FUZZ_EXAMPLES" not in os.environ,
    suppress_health_check=list(HealthCheck),
    database=None,
)
BYTES = st.sampled_from((0, 1, 0x7F, 0x80, 0xFE, 0xFF)) | st.integers(0, 255)
MAGIC = (b"", b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"fLaC", b"OggS", b"ID3", b"GIF89a")


@cache
def pictures() -> list[bytes]:
    noise = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    image = Image.fromarray(noise).resize((40, 30))
    forms = [
        ("JPEG", {}),
        ("JPEG", {"progressive": True}),
        ("PNG", {}),
        ("WEBP", {}),
        ("WEBP", {"lossless": True}),
        ("GIF", {"save_all": True, "append_images": [image.rotate(90)]}),
        ("BMP", {}),
    ]
    return [_saved(image, form, options) for form, options in forms]


def _saved(image: Image.Image, form: str, options: dict[str, object]) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


@cache
def sounds() -> list[bytes]:
    samples = np.random.default_rng(1).normal(0, 0.1, (4000, 2))
    files = []
    for form, subtype in (
        ("WAV", "PCM_16"),
        ("WAV", "FLOAT"),
        ("FLAC", "PCM_16"),
        ("OGG", "VORBIS"),
        ("OGG", "OPUS"),
        ("MP3", "MPEG_LAYER_III"),
    ):
        buffer = io.BytesIO()
        soundfile.write(buffer, samples, 16_000, format=form, subtype=subtype)
        files.append(buffer.getvalue())
    return files


@cache
def videos() -> list[bytes]:
    return [CLIPS["video"](container, num_frames=12) for container in ("mp4", "webm")]


@st.composite
def damaged(draw: st.DrawFn, originals: Callable[[], Sequence[bytes]]) -> bytes:
    """One of the files with some bytes changed, cut out, put in, repeated or cut off."""
    data = bytearray(draw(st.sampled_from(originals())))
    for _ in range(draw(st.integers(1, 6))):
        reach = len(data) if draw(st.booleans()) else min(len(data), 200)  # headers are in front
        at = draw(st.integers(0, max(0, reach - 1)))
        size = draw(st.integers(1, 64))
        match draw(st.integers(0, 5)):
            case 0 | 1:
                data[at : at + 1] = bytes([draw(BYTES)])
            case 2:
                data[at : at + 4] = struct.pack(">I", draw(st.integers(0, 2**32 - 1)))
            case 3:
                del data[at : at + size]
            case 4:
                data[at:at] = data[at : at + size] * draw(st.integers(1, 40))
            case 5 if draw(st.integers(0, 3)) == 0:
                del data[at:]
        if not data:
            break
    if LAST:
        Path(LAST).write_bytes(data)
    return bytes(data)


@fuzzed
@given(damaged(pictures), st.sampled_from([None, 1, 16, 1000]))
def test_pictures(data: bytes, min_side: int | None) -> None:
    try:
        pixels = decode_image(data, max_pixels=LIMITS.max_pixels, min_side=min_side)
    except ImageError:
        return
    assert pixels.dtype == np.uint8
    assert pixels.ndim == 3
    assert pixels.shape[2] == 3
    assert 0 < pixels.shape[0] * pixels.shape[1] <= LIMITS.max_pixels


@fuzzed
@given(
    damaged(sounds),
    st.sampled_from([None, 8_000, 48_000]),
    st.sampled_from([(0.0, None), (0.1, 0.05), (0.2, 9e9)]),
)
def test_sounds(data: bytes, rate: int | None, window: tuple[float, float | None]) -> None:
    try:
        header = audio_header(data, limits=LIMITS)
        assert header.num_channels >= 1
        sound = decode_audio(
            data, rate=rate, start_s=window[0], duration_s=window[1], limits=LIMITS
        )
    except AudioError:
        return
    assert sound.samples.dtype == np.float32
    assert sound.samples.shape[0] == header.num_channels
    assert 0 < sound.samples.nbytes <= LIMITS.max_decoded_bytes
    assert np.isfinite(sound.samples).all()
    assert sound.rate == (rate or header.rate)


@fuzzed
@given(
    damaged(videos),
    st.sampled_from([EveryFrame(), UniformFrames(3), KeyFrames()]),
    st.sampled_from([None, 16, (9, 30)]),
)
def test_videos(data: bytes, sampling: object, size: int | tuple[int, int] | None) -> None:
    try:
        clip = decode_video(data, sampling, size=size, limits=LIMITS)
    except VideoError:
        return
    assert clip.frames.dtype == np.uint8
    assert clip.frames.shape[0] == len(clip.times_s) > 0
    assert clip.frames.shape[3] == 3
    assert clip.frames.nbytes <= LIMITS.max_decoded_bytes
    assert np.isfinite(clip.times_s).all()
    assert (np.diff(clip.times_s) >= 0).all()
    if isinstance(size, tuple):
        assert clip.frames.shape[1:3] == size


@settings(max_examples=EXAMPLES, deadline=None, database=None, derandomize=True)
@given(
    st.binary(max_size=200),
    st.sampled_from(
        [b"", b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"fLaC", b"OggS", b"ID3", b"GIF89a"]
    ),
)
@example(b"", b"\0\0\0\x20ftyp")
@example(zlib.compress(bytes(1000)), b"RIFF\0\0\0\0WEBP")
@example(b"", b"\x1aE\xdf\xa3")
def test_what_only_begins_like_a_file(tail: bytes, magic: bytes) -> None:
    with pytest.raises(ImageError):
        decode_image(magic + tail, max_pixels=LIMITS.max_pixels)
    with pytest.raises(AudioError):
        decode_audio(magic + tail, limits=LIMITS)
    with pytest.raises(VideoError):
        decode_video(magic + tail, limits=LIMITS)
