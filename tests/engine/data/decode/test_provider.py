"""Both providers on the same samples. The bounds are what another resampler and another conversion
of chroma may differ by: pictures 8 levels and 0.3 on average (none before they are resized), sounds
2e-3 (1e-6 at their own rate), frames of video 3 levels on average."""

import io
import platform
import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from PIL import Image

from carillon.engine.config import UserError
from carillon.engine.data.decode.frame_choice import EveryFrame, KeyFrames, UniformFrames
from carillon.engine.data.decode.image import decode_image
from carillon.engine.data.decode.limits import (
    DEFAULT_LIMITS,
    AudioError,
    ImageError,
    Limits,
    VideoError,
)
from carillon.engine.data.decode.provider import BatchDecoder, batch_decoder

X86 = platform.machine() == "x86_64"  # DALI is for other machines only in parts
CLIPS = runpy.run_path(str(Path(__file__).with_name("clips.py")))


def decoder_of(name: str, limits: Limits = DEFAULT_LIMITS) -> BatchDecoder:
    if name == "dali" and not X86:
        pytest.skip("the extra `dali` is for x86-64")
    return batch_decoder(name, limits=limits)


@pytest.fixture(scope="module", params=["cpu", "dali"])
def decoder(request: pytest.FixtureRequest) -> BatchDecoder:
    return decoder_of(request.param)


@pytest.fixture(scope="module")
def dali() -> BatchDecoder:
    return decoder_of("dali")


def picture(form: str = "JPEG", size: tuple[int, int] = (90, 60), **options: object) -> bytes:
    """Smooth noise."""
    noise = np.random.default_rng(size[0]).integers(0, 256, (7, 9, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(noise).resize(size, Image.Resampling.BICUBIC).save(buffer, form, **options)
    return buffer.getvalue()


def sound(form: str, rate: int, channels: int = 1) -> bytes:
    time_s = np.arange(rate) / rate
    tones = [0.3 * np.sin(2 * np.pi * (300 + 90 * c) * time_s) for c in range(channels)]
    buffer = io.BytesIO()
    soundfile.write(buffer, np.stack(tones, axis=1), rate, format=form)
    return buffer.getvalue()


def difference(one: object, other: object) -> np.ndarray:
    assert isinstance(one, torch.Tensor)
    assert isinstance(other, torch.Tensor)
    assert one.shape == other.shape
    assert one.dtype == other.dtype
    return (one.double() - other.double()).abs().numpy()


def test_pictures_are_the_same(dali: BatchDecoder) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    batch = [
        picture(size=(90, 60)),
        picture(size=(200, 150), progressive=True, subsampling=0),
        picture(size=(31, 80), exif=exif),
        picture("PNG"),
        picture("WEBP"),
    ]
    for ours, theirs in zip(
        batch_decoder("cpu").pictures(batch, size=(48, 40)),
        dali.pictures(batch, size=(48, 40)),
        strict=True,
    ):
        apart = difference(ours, theirs)
        assert apart.shape == (48, 40, 3)
        assert apart.max() <= 8
        assert apart.mean() < 0.3
    (whole,) = dali.pictures(batch[:1], size=(60, 90))
    assert difference(whole, torch.from_numpy(decode_image(batch[0]))).max() == 0


@pytest.mark.parametrize("form", ["WAV", "FLAC", "OGG", "MP3"])
def test_sounds_are_the_same(dali: BatchDecoder, form: str) -> None:
    batch = [sound(form, 16_000), sound(form, 44_100, channels=2)]
    cpu = batch_decoder("cpu")
    (one, _), (other, _) = cpu.sounds(batch, rate=16_000), dali.sounds(batch, rate=16_000)
    assert difference(one, other).max() < 1e-6
    for ours, theirs in zip(
        cpu.sounds(batch, rate=24_000), dali.sounds(batch, rate=24_000), strict=True
    ):
        assert difference(ours, theirs)[240:-240].max() < 2e-3


def test_clips_are_the_same(dali: BatchDecoder) -> None:
    batch = [CLIPS["video"]("webm"), CLIPS["video"]("webm", num_frames=12)]
    for sampling in (EveryFrame(), UniformFrames(3), KeyFrames()):
        for size in ((48, 64), (30, 30)):
            for ours, theirs in zip(
                batch_decoder("cpu").clips(batch, sampling, size=size),
                dali.clips(batch, sampling, size=size),
                strict=True,
            ):
                apart = difference(ours, theirs)
                assert apart.mean() < 3
                assert apart[:, size[0] * 3 // 4, size[1] * 3 // 4].max() <= 3  # far from an edge


def test_h264_is_refused_by_dali_on_a_cpu(dali: BatchDecoder) -> None:
    batch = [CLIPS["video"]("mp4"), CLIPS["video"]("webm")]
    refused, decoded = dali.clips(batch, UniformFrames(2), size=(48, 64))
    assert isinstance(refused, VideoError)
    assert "H.264, which DALI decodes on a GPU only" in str(refused)
    assert isinstance(decoded, torch.Tensor)


def test_a_bad_sample_costs_no_other_one(decoder: BatchDecoder) -> None:
    good = picture()
    huge = picture(size=(3000, 22_000))
    bad = [good[: len(good) // 2], b"8BPS\0\1" + bytes(30), huge]
    results = decoder.pictures([good, *bad, good], size=(20, 20))
    assert [isinstance(result, ImageError) for result in results] == [
        False,
        True,
        True,
        True,
        False,
    ]
    assert torch.equal(results[0], results[4])
    again = decoder.pictures([good], size=(20, 20))  # an error leaves nothing behind
    assert torch.equal(again[0], results[0])

    loud = io.BytesIO()
    soundfile.write(loud, np.full(800, np.nan), 8000, format="WAV", subtype="FLOAT")
    flac = sound("FLAC", 8000)
    results = decoder.sounds([flac, flac[:999], loud.getvalue(), b"", flac], rate=8000)
    assert [isinstance(result, AudioError) for result in results] == [
        False,
        True,
        True,
        True,
        False,
    ]
    assert torch.equal(results[0], results[4])

    webm = CLIPS["video"]("webm")
    results = decoder.clips([webm, webm[:300], b"GIF89a"], UniformFrames(2), size=(9, 9))
    assert isinstance(results[0], torch.Tensor)
    assert [type(result) for result in results[1:]] == [VideoError] * 2


def test_limits_hold_for_both() -> None:
    limits = Limits(max_pixels=90 * 60 - 1, max_decoded_bytes=1000)
    for name in ("cpu", "dali"):
        decoder = decoder_of(name, limits)
        (pixels,) = decoder.pictures([picture()], size=(4, 4))
        (samples,) = decoder.sounds([sound("FLAC", 8000)], rate=8000)
        (frames,) = decoder.clips([CLIPS["video"]("webm")], EveryFrame(), size=(48, 64))
        for result, message in ((pixels, "at most 5,399"), (samples, "1,000"), (frames, "1,000")):
            assert message in str(result)


def test_choices_that_cannot_be_served_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="'gpu' given; cpu and dali are allowed"):
        batch_decoder("gpu")
    with pytest.raises(UserError, match="not on cuda"):
        batch_decoder("cpu", torch.device("cuda"))
    monkeypatch.setitem(sys.modules, "nvidia.dali", None)
    monkeypatch.setitem(sys.modules, "nvidia", None)
    with pytest.raises(UserError, match=r"pip install 'carillon-engine\[dali\]'"):
        batch_decoder("dali")
