import io
import struct
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import soundfile

from carillon.engine.data.decode.audio import AudioError, audio_format, decode_audio
from carillon.engine.data.decode.limits import Limits

CODECS = {
    "wav": ("WAV", "PCM_16"),
    "wav24": ("WAV", "PCM_24"),
    "wavfloat": ("WAV", "FLOAT"),
    "flac": ("FLAC", "PCM_16"),
    "ogg": ("OGG", "VORBIS"),
    "opus": ("OGG", "OPUS"),
    "mp3": ("MP3", "MPEG_LAYER_III"),
}
LOSSLESS = ("wav", "wav24", "wavfloat", "flac")


def tone(rate: int, seconds: float = 1.0, channels: int = 1) -> np.ndarray:
    """(T, C): channel c has a tone of 400 + 150 c Hz, rising from silence."""
    time_s = np.arange(round(rate * seconds)) / rate
    tones = [np.sin(2 * np.pi * (400 + 150 * c) * time_s) for c in range(channels)]
    return (0.4 * np.stack(tones, axis=1) * (time_s / seconds)[:, None]).astype(np.float32)


def encoded(samples: np.ndarray, rate: int, codec: str = "wav") -> bytes:
    form, subtype = CODECS[codec]
    buffer = io.BytesIO()
    soundfile.write(buffer, samples, rate, format=form, subtype=subtype)
    return buffer.getvalue()


@pytest.mark.parametrize("codec", CODECS)
def test_the_formats_decode(codec: str) -> None:
    rate = 48_000 if codec == "opus" else 16_000
    samples = tone(rate, channels=2)
    data = encoded(samples, rate, codec)
    sound = decode_audio(data)
    assert audio_format(data) == CODECS[codec][0].lower()
    assert sound.samples.dtype == np.float32
    assert sound.samples.shape == (2, rate)
    assert (sound.rate, sound.source_rate, sound.source_duration_s) == (rate, rate, 1.0)
    error = np.abs(sound.samples - samples.T)[:, : -rate // 100]  # a cut tone spoils its end
    assert error.max() < (1e-4 if codec in LOSSLESS else 0.05)
    assert sound.samples.flags.c_contiguous
    assert sound.samples.flags.writeable


@pytest.mark.parametrize("codec", CODECS)
def test_a_window_has_the_samples_of_the_whole(codec: str) -> None:
    rate = 48_000 if codec == "opus" else 16_000
    data = encoded(tone(rate, 6.0), rate, codec)
    whole = decode_audio(data).samples
    window = decode_audio(data, start_s=4.5, duration_s=0.75)
    assert window.start_s == 4.5
    assert window.source_duration_s == 6.0
    expected = whole[:, round(4.5 * rate) : round(5.25 * rate)]
    assert window.samples.shape == expected.shape
    assert np.abs(window.samples - expected).max() < (1e-7 if codec != "opus" else 1e-3)


@pytest.mark.parametrize("subtype", ["PCM_S8", "PCM_16", "PCM_24"])
def test_a_whole_flac_has_the_samples_of_libsndfile(subtype: str) -> None:
    noise = np.random.default_rng(5).uniform(-1, 1, (5000, 3))
    noise[:2] = [[-1, 1, 0], [1, -1, 2.0**-7]]
    buffer = io.BytesIO()
    soundfile.write(buffer, noise, 44_100, format="FLAC", subtype=subtype)
    theirs, _ = soundfile.read(io.BytesIO(buffer.getvalue()), dtype="float32")
    assert np.array_equal(decode_audio(buffer.getvalue()).samples, theirs.T)


def test_a_plain_wav_has_the_samples_of_libsndfile() -> None:
    noise = np.random.default_rng(6).uniform(-1, 1, (5000, 3))
    noise[:2] = [[-1, 1, 0], [1, -1, 2.0**-15]]
    buffer = io.BytesIO()
    soundfile.write(buffer, noise, 44_100, subtype="PCM_16", format="WAV")
    theirs, _ = soundfile.read(io.BytesIO(buffer.getvalue()), dtype="float32")
    assert np.array_equal(decode_audio(buffer.getvalue()).samples, theirs.T)
    extra = b"LIST\x03\0\0\0abc\0"  # a chunk of odd length before the format
    data = buffer.getvalue()[:12] + extra + buffer.getvalue()[12:]
    assert np.array_equal(decode_audio(data).samples, theirs.T)


def test_a_flac_with_flipped_bits_is_refused() -> None:
    data = bytearray(encoded(tone(16_000), 16_000, "flac"))
    data[len(data) // 2] ^= 0x10
    with pytest.raises(AudioError, match="ends after"):
        decode_audio(bytes(data))


def test_a_window_may_reach_past_the_end_but_not_start_there() -> None:
    data = encoded(tone(8_000), 8_000, "flac")
    assert decode_audio(data, start_s=0.75, duration_s=9.0).samples.shape == (1, 2_000)
    with pytest.raises(AudioError, match=r"starts at 1 s, but the sound has 8,000 samples"):
        decode_audio(data, start_s=1.0)


@pytest.mark.parametrize("source", [8_000, 11_025, 44_100, 96_000, 192_000])
@pytest.mark.parametrize("rate", [8_000, 16_000, 48_000])
def test_resampling_gives_the_tone_at_the_other_rate(source: int, rate: int) -> None:
    sound = decode_audio(encoded(tone(source, channels=3), source), rate=rate)
    expected = tone(rate, channels=3).T
    assert sound.samples.shape == expected.shape
    assert sound.rate == rate
    middle = slice(rate // 20, -rate // 20)  # the filter meets silence at both ends
    assert np.abs(sound.samples - expected)[:, middle].max() < 2e-3


def test_mono_is_the_mean_of_eight_channels() -> None:
    samples = tone(16_000, channels=8)
    data = encoded(samples, 16_000, "flac")
    assert decode_audio(data).samples.shape == (8, 16_000)
    mono = decode_audio(data, mono=True).samples
    assert np.abs(mono[0] - samples.mean(axis=1)).max() < 1e-4


def test_real_sounds_decode(real_data: Callable[[str], Path]) -> None:
    for name in ("esc10", "fsdd_digits"):
        with tarfile.open(min(real_data(name).glob("*.tar"))) as tar:
            clips = [tar.extractfile(m).read() for m in tar if m.name.endswith(".flac")][:5]
        for clip in clips:
            sound = decode_audio(clip, rate=16_000, mono=True)
            assert sound.source_rate == 16_000
            assert sound.samples.shape == (1, round(sound.source_duration_s * 16_000))
            assert 0.001 < np.abs(sound.samples).max() <= 1


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"FORM\0\0\0\0AIFF",
        b"caff",
        b".snd",
        b"RIFF\0\0\0\0AVI LIST",
        b"\0\0\0\x20ftypM4A ",
        b"MThd",
    ],
)
def test_other_formats_are_refused(data: bytes) -> None:
    with pytest.raises(AudioError, match="not a WAV, FLAC, OGG or MP3"):
        decode_audio(data + bytes(40) if data else data)


def test_no_samples_are_refused() -> None:
    with pytest.raises(AudioError, match="no samples"):
        decode_audio(encoded(np.zeros((0, 1), np.float32), 16_000))
    flac = bytearray(encoded(tone(16_000), 16_000, "flac")[:42])  # the header alone
    flac[4] |= 0x80  # of the blocks before the sound it is the last
    flac[21], flac[22:26] = flac[21] & 0xF0, bytes(4)  # and it knows no length
    assert flac[4:8] == bytes([0x80, 0, 0, 34])
    with pytest.raises(AudioError, match=r"no samples|psf_fseek"):
        decode_audio(bytes(flac))


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_samples_that_are_not_finite_are_refused(value: float) -> None:
    samples = tone(16_000)
    samples[777] = value
    data = encoded(samples, 16_000, "wavfloat")
    with pytest.raises(AudioError, match="no finite numbers"):
        decode_audio(data)
    with pytest.raises(AudioError, match="no finite numbers"):
        decode_audio(data, rate=8_000, mono=True)


@pytest.mark.parametrize("rate", [0, 1, 7_999, 192_001, 3_000_000_000])
def test_other_rates_are_refused(rate: int) -> None:
    data = bytearray(encoded(tone(16_000), 16_000))
    data[24:28] = struct.pack("<I", rate)
    with pytest.raises(AudioError):
        decode_audio(bytes(data))
    with pytest.raises(ValueError, match="8000 to 192000"):
        decode_audio(encoded(tone(16_000), 16_000), rate=rate)


def test_a_forged_flac_length_is_refused_and_takes_no_memory() -> None:
    data = bytearray(encoded(tone(16_000), 16_000, "flac"))
    at = 8 + 13  # STREAMINFO: the 36 bits of the number of samples end there
    assert int.from_bytes(data[at : at + 5], "big") & (2**36 - 1) == 16_000
    for claimed in (16_001, 2**24, 2**36 - 1):
        data[at : at + 5] = ((data[at] >> 4 << 36) | claimed).to_bytes(5, "big")
        with pytest.raises(AudioError, match=r"ends after|at most|cannot be decoded"):
            decode_audio(bytes(data))


def test_a_forged_wav_length_is_refused() -> None:
    data = bytearray(encoded(tone(16_000), 16_000))
    at = data.index(b"data") + 4
    data[at : at + 4] = struct.pack("<I", 1_000_000_000)
    with pytest.raises(AudioError, match=r"says that it has 1,000,000,0\d\d bytes"):
        decode_audio(bytes(data))


def test_a_wav_that_was_streamed_has_the_samples_that_are_there() -> None:
    data = bytearray(encoded(tone(16_000), 16_000))
    at = data.index(b"data") + 4
    data[at : at + 4] = b"\xff\xff\xff\xff"
    assert decode_audio(bytes(data)).samples.shape == (1, 16_000)


@pytest.mark.parametrize("codec", CODECS)
def test_truncated_sounds_are_refused_or_shorter(codec: str) -> None:
    rate = 48_000 if codec == "opus" else 16_000
    data = encoded(tone(rate), rate, codec)
    for share in (0.01, 0.5, 0.9):
        cut = data[: int(len(data) * share)]
        if codec in ("mp3", "ogg", "opus"):  # streams: they may end anywhere
            try:
                assert decode_audio(cut).samples.shape[1] < rate
            except AudioError:
                continue
        else:
            with pytest.raises(AudioError):
                decode_audio(cut)


def test_limits_are_the_callers() -> None:
    data = encoded(tone(16_000, 2.0), 16_000, "flac")
    limits = Limits(max_decoded_bytes=64_000)
    with pytest.raises(AudioError, match="128,000 bytes; at most 64,000"):
        decode_audio(data, limits=limits)
    assert decode_audio(data, duration_s=1.0, limits=limits).samples.shape == (1, 16_000)
    with pytest.raises(AudioError, match="192,000 bytes; at most 64,000"):
        decode_audio(data, duration_s=1.0, rate=48_000, limits=limits)


@pytest.mark.parametrize(
    ("option", "value"),
    [("start_s", -1.0), ("start_s", np.nan), ("duration_s", 0.0), ("duration_s", np.inf)],
)
def test_windows_that_make_no_sense_are_refused(option: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"{option}: "):
        decode_audio(encoded(tone(8_000), 8_000), **{option: value})
