"""What a sample's media look like: pictures, sounds as waveform and spectrogram, frames of videos.

Every medium goes through the decoders of decode/ under limits of their own, for a page of samples
must not cost what one hostile file asks for. Of a long sound the first minute is drawn.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from carillon.engine.data.decode.image import decode_image
from carillon.engine.data.decode.limits import DecodeError, Limits
from carillon.engine.data.explore.sound_picture import sound_picture
from carillon.engine.data.samples import MODALITIES, RawSample, main_member

PANEL_WIDTH, PANEL_HEIGHT = 640, 480
SOUND_S = 60.0
FRAMES, FRAMES_A_ROW, FRAME_SIDE = 6, 3, 160
LIMITS = Limits(max_decode_s=20.0, max_decoded_bytes=2**28)
_WHOLE = Limits(max_decoded_bytes=2**40)  # of a header: the sound is not decoded to its end
_GAP = 4

Pixels = NDArray[np.uint8]


class Panel(NamedTuple):
    """A medium as pixels (H, W, 3) with a line about it; without pixels the line says why."""

    modality: str
    pixels: Pixels | None
    note: str


def panels_of(sample: RawSample) -> list[Panel]:
    """A panel for the main medium of each modality."""
    return list(_panels(sample))


def _panels(sample: RawSample) -> Iterator[Panel]:
    draw = {"image": _picture, "audio": _sound, "video": _video}
    for modality in MODALITIES:
        name = main_member(sample.members, modality)
        if name is None:
            continue
        try:
            yield draw[modality](sample.members[name], name)
        except DecodeError as error:
            yield Panel(modality, None, f"{name}: {error}")


def _picture(data: bytes, name: str) -> Panel:
    stored = decode_image(data, max_pixels=LIMITS.max_pixels, min_side=None)
    height, width, _ = stored.shape
    return Panel("image", _shrunk(stored), f"{name}, {width} x {height}, {len(data):,} bytes")


def _shrunk(pixels: Pixels) -> Pixels:
    picture = Image.fromarray(pixels)
    picture.thumbnail((PANEL_WIDTH, PANEL_HEIGHT))
    return np.array(picture, dtype=np.uint8)


def _sound(data: bytes, name: str) -> Panel:
    from carillon.engine.data.decode.audio import audio_header, decode_audio

    header = audio_header(data, limits=_WHOLE)
    sound = decode_audio(data, mono=True, duration_s=SOUND_S, limits=LIMITS)
    duration_s = sound.source_duration_s
    length = f"{duration_s:.3g} s" if duration_s is not None else "of unknown length"
    channels = {1: "mono", 2: "stereo"}.get(header.num_channels, f"{header.num_channels} channels")
    drawn = sound.samples.shape[1] / sound.rate
    if duration_s is None or duration_s > drawn + 0.01:
        length += f" (drawn: {drawn:.3g} s)"
    pixels = sound_picture(sound.samples[0], sound.rate, width=PANEL_WIDTH)
    note = f"{name}, {length}, {sound.source_rate / 1000:g} kHz, {channels}"
    return Panel("audio", pixels, note)


def _video(data: bytes, name: str) -> Panel:
    from carillon.engine.data.decode.frame_choice import UniformFrames
    from carillon.engine.data.decode.video import decode_video

    clip = decode_video(data, UniformFrames(FRAMES), size=FRAME_SIDE, limits=LIMITS)
    times = ", ".join(f"{time:.2f}" for time in clip.times_s)
    note = f"{name}, {clip.duration_s:.3g} s, {clip.frame_rate:.3g} frames/s, {clip.codec}"
    return Panel("video", _strip(clip.frames), f"{note}; at {times} s")


def _strip(frames: Pixels) -> Pixels:
    """Frames in the order of time, FRAMES_A_ROW beside each other, on white."""
    num, height, width, _ = frames.shape
    columns = min(num, FRAMES_A_ROW)
    rows = -(-num // columns)
    size = (rows * (height + _GAP) - _GAP, columns * (width + _GAP) - _GAP, 3)
    strip = np.full(size, 255, dtype=np.uint8)
    for number, frame in enumerate(frames):
        top = number // columns * (height + _GAP)
        left = number % columns * (width + _GAP)
        strip[top : top + height, left : left + width] = frame
    return _shrunk(strip)
