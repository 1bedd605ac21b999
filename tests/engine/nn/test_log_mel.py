import numpy as np
import pytest
import torch
from transformers import WhisperFeatureExtractor
from transformers.audio_utils import mel_filter_bank

from carillon.engine.nn.log_mel import LogMel, LogMelConfig, mel_filters

GENERATOR = np.random.default_rng(3)


def reference(sound: np.ndarray, config: LogMelConfig) -> np.ndarray:
    """In float64, frame by frame, by the definition of a Fourier transform."""
    half = config.window // 2
    padded = np.concatenate([sound, np.zeros(config.window + half + 1)])
    whole = np.concatenate([padded[half:0:-1], padded])
    window = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(config.window) / config.window)
    phases = np.outer(np.arange(config.window), np.arange(half + 1))
    transform = np.exp(-2j * np.pi * phases / config.window)
    frames = range(0, len(sound), config.hop)
    power = np.array(
        [np.abs(whole[k : k + config.window] * window @ transform) ** 2 for k in frames]
    )
    logs = np.log10(np.maximum(power @ mel_filters(config).numpy(), 1e-10)).T
    if config.dynamic_range is not None:
        logs = np.maximum(logs, logs.max() - config.dynamic_range)
    return (logs + 4) / 4


def sounds(*lengths: int) -> list[np.ndarray]:
    return [GENERATOR.normal(0, 0.1, length) for length in lengths]


@pytest.mark.parametrize(
    "config",
    [
        LogMelConfig(),
        LogMelConfig(mel_scale="htk", dynamic_range=None, num_mels=40, min_hz=20, max_hz=7600),
        LogMelConfig(rate=8000, window=201, hop=77, num_mels=20),
    ],
)
def test_against_the_definition_in_float64(config: LogMelConfig) -> None:
    for sound in sounds(4000, 1, 159, 161, 399):
        got, num_frames = LogMel(config)(torch.from_numpy(sound)[None])
        expected = reference(sound, config)
        assert num_frames.tolist() == [expected.shape[1]]
        assert got.dtype == torch.float32
        # float32's transform, a thousandth of a decade; quiet mels carry its rounding
        assert np.abs(got[0].numpy() - expected).max() < 1e-3
        assert np.abs(got[0].numpy() - expected).mean() < 1e-5


@pytest.mark.parametrize("scale", ["slaney", "htk"])
def test_filters_are_those_of_transformers(scale: str) -> None:
    config = LogMelConfig(mel_scale=scale, num_mels=64)
    norm = "slaney" if scale == "slaney" else None
    theirs = mel_filter_bank(201, 64, 0.0, 8000.0, 16_000, norm=norm, mel_scale=scale)
    assert np.abs(mel_filters(config).numpy() - theirs).max() < 1e-9


def test_a_clip_of_thirty_seconds_is_what_whisper_sees() -> None:
    (speech,) = sounds(16_000 * 4)
    theirs = WhisperFeatureExtractor(feature_size=80)(speech, sampling_rate=16_000)
    padded = np.zeros(480_000)
    padded[: len(speech)] = speech
    ours, _ = LogMel()(torch.from_numpy(padded)[None])
    difference = np.abs(ours[0].numpy() - theirs["input_features"][0])
    assert difference.shape == (80, 3000)
    assert difference.max() < 1e-3
    assert difference.mean() < 1e-5


def test_a_sound_is_the_same_alone_and_in_a_batch() -> None:
    lengths = [4000, 1, 800, 2399]
    parts = sounds(*lengths)
    batch = GENERATOR.normal(0, 5, (4, 4000))  # padding may hold anything
    for row, part in enumerate(parts):
        batch[row, : len(part)] = part
    module = LogMel()
    together, num_frames = module(torch.from_numpy(batch), torch.tensor(lengths))
    assert num_frames.tolist() == [25, 1, 5, 15]
    assert together.shape == (4, 80, 25)
    for row, part in enumerate(parts):
        alone, _ = module(torch.from_numpy(part)[None])
        frames = alone.shape[2]
        assert torch.allclose(together[row, :, :frames], alone[0], atol=1e-5)
        assert not together[row, :, frames:].any()


def test_half_precision_and_autocast_change_nothing() -> None:
    (sound,) = sounds(1600)
    module = LogMel()
    plain, _ = module(torch.from_numpy(sound).float()[None])
    with torch.autocast("cpu", torch.bfloat16):
        cast, _ = module(torch.from_numpy(sound).float()[None])
    assert torch.equal(cast, plain)


def test_silence_is_finite() -> None:
    got, _ = LogMel()(torch.zeros(1, 1600))
    assert torch.equal(got, torch.full_like(got, (-10 + 4) / 4))


@pytest.mark.parametrize(
    ("shape", "lengths", "message"),
    [
        ((4,), None, "the shape"),
        ((1, 0), None, "the shape"),
        ((2, 9), [9], r"\(2,\) is needed"),
        ((1, 9), [10], "1 to 9 samples"),
        ((1, 9), [0], "1 to 9 samples"),
    ],
)
def test_wrong_shapes_are_refused(
    shape: tuple[int, ...], lengths: list[int] | None, message: str
) -> None:
    given = None if lengths is None else torch.tensor(lengths)
    with pytest.raises(ValueError, match=message):
        LogMel()(torch.zeros(shape), given)


@pytest.mark.parametrize(
    "options",
    [{"max_hz": 9000.0}, {"min_hz": 8000.0}, {"num_mels": 0}, {"hop": 0}, {"mel_scale": "bark"}],
)
def test_settings_that_make_no_sense_are_refused(options: dict) -> None:
    with pytest.raises(ValueError, match=next(iter(options))):
        LogMelConfig(**options)
