"""Sound from bytes to float32 samples: WAV, FLAC, OGG (Vorbis, Opus) and MP3 of 8 to 192 kHz.

libsndfile decodes (of the libraries measured the quickest, but for whole FLACs and plain WAVs:
flac.py, wav.py), after the format was told by content; it knows dozens more, which are not let in.
Nothing that a header says is trusted: sizes are checked before memory is taken, samples are read
block by block, and a file that ends before its header says so is refused, as is one without samples
or with values that are not finite. A window is sought, not decoded up to. soxr resamples, at its
high quality; a window is resampled as a sound of its own, silent around it. Left out: other
containers, sound inside of videos, dither.
"""

from __future__ import annotations

import io
import math
from typing import NamedTuple

import numpy as np
import soundfile
import soxr
from numpy.typing import NDArray

from carillon.engine.data.decode.flac import FlacHeader, decode_flac, flac_header
from carillon.engine.data.decode.limits import (
    DEFAULT_LIMITS,
    AudioError,
    Deadline,
    Limits,
    check_decoded_bytes,
)
from carillon.engine.data.decode.wav import WavHeader, check_wav_length, wav_header, wav_samples

MIN_RATE, MAX_RATE = 8_000, 192_000
_FORMATS = {"WAV": "wav", "WAVEX": "wav", "FLAC": "flac", "OGG": "ogg", "MP3": "mp3"}
_WHOLE_NUMBERS = ("PCM_U8", "PCM_S8", "PCM_16", "PCM_24", "PCM_32", "ULAW", "ALAW")
_BLOCK_VALUES = 2**22  # 16 MB as float32
_MP3_PREROLL = 32 * 1152  # a frame's bits may lie in the 511 bytes before it: many small frames
_UNKNOWN_FRAMES = 2**62  # what libsndfile says of a stream that does not state its length


class Sound(NamedTuple):
    """Samples (C, T) float32, by convention within [-1, 1], and where they come from.

    `source_duration_s` is the whole file's length, none where only reading on would tell.
    """

    samples: NDArray[np.float32]
    rate: int
    start_s: float
    source_rate: int
    source_duration_s: float | None


class _Reader(soundfile.SoundFile):  # type: ignore[misc]
    """A SoundFile that does not seek to where it is after each read.

    The seek costs up to half of the time, and an MP3 goes on wrongly after it.
    """

    def seekable(self) -> bool:
        return False


def decode_audio(
    data: bytes,
    *,
    rate: int | None = None,
    mono: bool = False,
    start_s: float = 0.0,
    duration_s: float | None = None,
    limits: Limits = DEFAULT_LIMITS,
) -> Sound:
    """Decode a sound or a window of it, resampled to `rate` if one is given.

    `mono` averages the channels. A window may reach past the end; it must not start there.
    Raises AudioError for another format, damaged bytes, no samples, values that are not finite,
    rates outside of 8 to 192 kHz, a window past the end, or more than `limits` allow; ValueError
    for a rate or window that makes no sense.
    """
    _check_request(rate, start_s, duration_s)
    if audio_format(data) == "wav" and (plain := wav_header(data)) is not None:
        return _plain_wav(data, plain, rate, mono, start_s, duration_s, limits)
    whole = flac_header(data) if start_s == 0 and duration_s is None else None
    if whole is not None:
        return _whole_flac(data, whole, rate, mono, limits)
    try:
        with _Reader(io.BytesIO(data)) as file:
            _check_header(file)
            return _decoded(file, data, rate, mono, start_s, duration_s, limits)
    except AudioError:
        raise
    # A decoder of hostile bytes may raise anything that its author did not foresee.
    except Exception as error:
        raise AudioError(f"the sound cannot be decoded: {error}") from None


class Header(NamedTuple):
    """What a sound says of itself; `num_frames` is none where it does not know its length."""

    format: str
    rate: int
    num_channels: int
    num_frames: int | None


def audio_header(data: bytes, *, limits: Limits = DEFAULT_LIMITS) -> Header:
    """Read and check the header alone. Raises AudioError as decode_audio does."""
    audio_format(data)
    try:
        with _Reader(io.BytesIO(data)) as file:
            _check_header(file)
            if _FORMATS[file.format] == "wav":
                check_wav_length(data)
            known = file.frames if file.frames < _UNKNOWN_FRAMES else None
            header = Header(_FORMATS[file.format], file.samplerate, file.channels, known)
    except AudioError:
        raise
    except Exception as error:
        raise AudioError(f"the sound's header cannot be read: {error}") from None
    check_decoded_bytes(AudioError, "the sound", 4 * (known or 0) * header.num_channels, limits)
    return header


def audio_format(data: bytes) -> str:
    """wav, flac, ogg or mp3, by content. Raises AudioError for other formats."""
    if data[:4] == b"RIFF" and data[8:12] == b"WAVE":
        return "wav"
    if data.startswith(b"fLaC"):
        return "flac"
    if data.startswith(b"OggS"):
        return "ogg"
    if data.startswith(b"ID3") or (len(data) > 1 and data[0] == 0xFF and data[1] & 0xE0 == 0xE0):
        return "mp3"
    raise AudioError(f"not a WAV, FLAC, OGG or MP3 sound; it starts with {data[:8]!r}")


def _check_request(rate: int | None, start_s: float, duration_s: float | None) -> None:
    if rate is not None and not MIN_RATE <= rate <= MAX_RATE:
        raise ValueError(f"rate: {rate} given, {MIN_RATE} to {MAX_RATE} Hz are allowed")
    if not (math.isfinite(start_s) and start_s >= 0):
        raise ValueError(f"start_s: {start_s} given, 0 or more is allowed")
    if duration_s is not None and not (math.isfinite(duration_s) and duration_s > 0):
        raise ValueError(f"duration_s: {duration_s} given, more than 0 is allowed, or none: all")


def _check_header(file: soundfile.SoundFile) -> None:
    if file.format not in _FORMATS:
        raise AudioError(f"not a WAV, FLAC, OGG or MP3 sound, but {file.format}")
    _check_rate(file.samplerate)


def _check_rate(rate: int) -> None:
    if not MIN_RATE <= rate <= MAX_RATE:
        raise AudioError(f"a sampling rate of {rate} Hz; {MIN_RATE} to {MAX_RATE} are allowed")


def _plain_wav(
    data: bytes,
    header: WavHeader,
    rate: int | None,
    mono: bool,
    start_s: float,
    duration_s: float | None,
    limits: Limits,
) -> Sound:
    _check_rate(header.rate)
    if header.num_frames == 0:
        raise AudioError("the sound has no samples")
    first = round(start_s * header.rate)
    if first >= header.num_frames:
        raise _starts_past_the_end(start_s, header.num_frames, header.rate)
    count = header.num_frames - first
    if duration_s is not None:
        count = min(count, max(1, round(duration_s * header.rate)))
    check_decoded_bytes(AudioError, "the sound", 4 * count * header.num_channels, limits)
    samples = wav_samples(data, header, first, count)
    out = _resampled(samples, header.rate, rate, mono, limits)
    duration_s = header.num_frames / header.rate
    return Sound(out, rate or header.rate, first / header.rate, header.rate, duration_s)


def _starts_past_the_end(start_s: float, num_frames: int, rate: int) -> AudioError:
    return AudioError(
        f"the window starts at {start_s:g} s, but the sound has {num_frames:,} samples, "
        f"{num_frames / rate:.3f} s"
    )


def _whole_flac(
    data: bytes, header: FlacHeader, rate: int | None, mono: bool, limits: Limits
) -> Sound:
    _check_rate(header.rate)
    size_bytes = 4 * header.num_frames * header.num_channels
    check_decoded_bytes(AudioError, "the sound", size_bytes, limits)
    samples = decode_flac(data, header)
    out = _resampled(samples, header.rate, rate, mono, limits)
    duration_s = header.num_frames / header.rate
    return Sound(out, rate or header.rate, 0.0, header.rate, duration_s)


def _decoded(
    file: soundfile.SoundFile,
    data: bytes,
    rate: int | None,
    mono: bool,
    start_s: float,
    duration_s: float | None,
    limits: Limits,
) -> Sound:
    known = file.frames if file.frames < _UNKNOWN_FRAMES else None
    first = round(start_s * file.samplerate)
    asked = None if duration_s is None else max(1, round(duration_s * file.samplerate))
    if first and known is not None and first >= known:
        raise _starts_past_the_end(start_s, known, file.samplerate)
    if first:
        _seek(file, first)
    expected = None if known is None else known - first
    wanted = expected if asked is None else asked if expected is None else min(asked, expected)
    if wanted is not None:
        check_decoded_bytes(AudioError, "the sound", 4 * wanted * file.channels, limits)
    samples = _read(file, wanted, limits)
    _check_complete(file, data, len(samples), wanted)
    if expected is None and (asked is None or len(samples) < asked):
        known = first + len(samples)
    source_s = None if known is None else known / file.samplerate
    out = _resampled(samples, file.samplerate, rate, mono, limits)
    if file.subtype not in _WHOLE_NUMBERS:
        _check_finite(out)
    return Sound(out, rate or file.samplerate, first / file.samplerate, file.samplerate, source_s)


def _check_finite(samples: NDArray[np.float32]) -> None:
    flat = samples.ravel()
    # One product is several times as quick as looking at each; it may also overflow.
    if not math.isfinite(np.dot(flat, flat)) and not np.isfinite(flat).all():
        raise AudioError("the sound has samples that are no finite numbers")


def _seek(file: soundfile.SoundFile, first: int) -> None:
    preroll = min(first, _MP3_PREROLL) if file.format == "MP3" else 0
    file.seek(first - preroll)
    if preroll:
        file.read(preroll, dtype="float32", always_2d=True)


def _read(file: soundfile.SoundFile, wanted: int | None, limits: Limits) -> NDArray[np.float32]:
    """(T, C), as many as wanted or there are; memory follows what is there, not the header."""
    deadline = Deadline(AudioError, "the sound", limits)
    block_frames = max(1, _BLOCK_VALUES // file.channels)
    blocks: list[NDArray[np.float32]] = []
    num_read = 0
    while wanted is None or num_read < wanted:
        asked = block_frames if wanted is None else min(block_frames, wanted - num_read)
        block = file.read(asked, dtype="float32", always_2d=True)
        num_read += len(block)
        check_decoded_bytes(AudioError, "the sound", 4 * num_read * file.channels, limits)
        blocks.append(block)
        if len(block) < asked:
            break
        deadline.check()
    if num_read == 0:
        raise AudioError("the sound has no samples")
    return blocks[0] if len(blocks) == 1 else np.concatenate(blocks)


def _check_complete(
    file: soundfile.SoundFile, data: bytes, num_read: int, wanted: int | None
) -> None:
    # The length of an MP3 is often an estimate, so less than that is no sign of damage.
    if wanted is not None and num_read < wanted and file.format != "MP3":
        raise AudioError(f"the sound ends after {num_read:,} of {wanted:,} samples: damaged or cut")
    if _FORMATS[file.format] == "wav":
        check_wav_length(data)


def _resampled(
    samples: NDArray[np.float32], source: int, rate: int | None, mono: bool, limits: Limits
) -> NDArray[np.float32]:
    """(T, C) at the source's rate -> (C, T') at `rate`, of round(T * rate / source) samples."""
    if mono and samples.shape[1] > 1:
        samples = samples.mean(axis=1, keepdims=True, dtype=np.float32)
    if rate is not None and rate != source:
        length = max(1, round(len(samples) * rate / source))
        check_decoded_bytes(AudioError, "the sound", 4 * length * samples.shape[1], limits)
        resampled = soxr.resample(samples, source, rate, quality="HQ")[:length]
        samples = np.pad(resampled, ((0, length - len(resampled)), (0, 0)))
    return np.ascontiguousarray(samples.T)
