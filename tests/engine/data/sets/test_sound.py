import io

import av
import numpy as np
import pytest

from carillon.engine.data.sets.sound import (
    SoundError,
    decode_g722,
    encode_flac,
    facts_of,
    read_facts,
)


def sine(num_samples: int, frequency_hz: float = 440.0) -> np.ndarray:
    times_s = np.arange(num_samples) / 16_000
    return np.round(9000 * np.cos(2 * np.pi * frequency_hz * times_s)).astype(np.int16)


def g722_of(samples: np.ndarray) -> bytes:
    encoder = av.CodecContext.create("g722", "w")
    encoder.sample_rate, encoder.layout, encoder.format = 16_000, "mono", "s16"
    frame = av.AudioFrame.from_ndarray(samples[None], format="s16", layout="mono")
    frame.sample_rate = 16_000
    return b"".join(bytes(packet) for packet in [*encoder.encode(frame), *encoder.encode(None)])


@pytest.mark.parametrize("num_samples", [1, 100, 4096, 4097, 16_000])
def test_flac_keeps_every_sample(num_samples: int) -> None:
    samples = sine(num_samples)
    flac = encode_flac(samples, 16_000)
    assert flac == encode_flac(samples, 16_000)
    with av.open(io.BytesIO(flac)) as container:
        decoded = np.concatenate([f.to_ndarray() for f in container.decode(audio=0)], axis=1)
    np.testing.assert_array_equal(decoded[0], samples)
    assert read_facts(flac) == facts_of(samples, 16_000)


def test_g722_comes_back_at_16_khz() -> None:
    samples = sine(16_000)
    decoded = decode_g722(g722_of(samples))
    assert decoded.dtype == np.int16
    assert abs(len(decoded) - 16_000) <= 64
    spectrum = np.abs(np.fft.rfft(decoded[:16_000].astype(float), 16_000))
    assert abs(int(spectrum.argmax()) - 440) <= 1  # bins of 1 Hz
    # 64 kbit/s of ADPCM: 20 dB above its noise is far from what a wrong decoder gives.
    assert spectrum[435:446].max() > 10 * np.sort(spectrum)[-60]


@pytest.mark.parametrize("data", [b"", b"OggS" + bytes(50), b"no sound at all" * 20])
def test_what_is_no_sound_is_refused(data: bytes) -> None:
    with pytest.raises(SoundError):
        read_facts(data)


def test_silence_is_refused() -> None:
    for quiet in (0, 20):
        with pytest.raises(SoundError, match="silent"):
            read_facts(encode_flac(np.full(16_000, quiet, np.int16), 16_000))
    assert read_facts(encode_flac(np.full(1600, 200, np.int16), 16_000)).duration_s == 0.1


def test_an_empty_stream_is_refused() -> None:
    with pytest.raises(SoundError):
        decode_g722(b"")
