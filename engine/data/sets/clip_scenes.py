"""Scenes of the clips: pictures with transparency that cross a simple background, frame by frame.

Things keep to lanes along the way they move, so nothing hides anything and every box is known to
the pixel. All that is drawn by chance comes from the generator given. Left out: turning, growing,
and things that leave the picture.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from carillon.engine.data.sets.clip_words import MOTIONS, Told

SIDE = 192
FRAME_RATES = (12, 24, 25, 30)
BACKGROUNDS = ("flat", "gradient", "stripes", "checks", "clouds")

_MARGIN = 4
_MIN_FRAMES, _MAX_FRAMES = 24, 60
_OPAQUE = 128
_Field = np.ndarray[Any, np.dtype[np.float64]]


@dataclass(frozen=True, kw_only=True)
class Track:
    """One thing: its box's size, and where the box's upper left corner is in each frame."""

    role: str
    size: tuple[int, int]
    positions: tuple[tuple[int, int], ...]


@dataclass(frozen=True, kw_only=True)
class Scene:
    """All that a clip shows. Movement begins after frame `first` and ends with frame `last`."""

    told: Told
    fps: int
    num_frames: int
    first: int
    last: int
    background: str
    colours: tuple[tuple[int, int, int], tuple[int, int, int]]
    background_seed: int
    sprite_side: int
    tracks: tuple[Track, ...]


def trimmed(picture: Image.Image, side: int) -> Image.Image:
    """The visible part of a picture, its longer side of the length given."""
    alpha = picture.getchannel("A").point(lambda level: 255 * (level >= _OPAQUE))
    visible = picture.crop(alpha.getbbox() or (0, 0, *picture.size))
    scale = side / max(visible.size)
    size = (max(1, round(visible.width * scale)), max(1, round(visible.height * scale)))
    # Premultiplied, so that the colour of clear pixels does not bleed into the rim.
    return visible.convert("RGBa").resize(size, Image.Resampling.LANCZOS).convert("RGBA")


def draw_scene(
    draws: random.Random, actor: Image.Image, bystander: Image.Image | None
) -> tuple[Scene, list[Image.Image]]:
    """A scene by chance, and the picture of each of its tracks."""
    motion = draws.choice(MOTIONS if bystander is None else MOTIONS[:-1])
    count = draws.choice((1, 1, 1, 2, 3))
    num_lanes = count + (bystander is not None)
    lane = (SIDE - 2 * _MARGIN) // num_lanes
    side = min(lane - 2 * _MARGIN, round(SIDE * draws.uniform(0.25, 0.4)))
    fps = draws.choice(FRAME_RATES)
    num_frames = draws.randint(_MIN_FRAMES, _MAX_FRAMES)
    first = draws.randint(0, num_frames // 5)
    last = draws.randint(num_frames - 1 - num_frames // 5, num_frames - 1)
    lanes = list(range(num_lanes))
    draws.shuffle(lanes)
    start, end = draws.uniform(0, 0.25), draws.uniform(0.75, 1)
    tracks, pictures = [], []
    for number, place in enumerate(lanes):
        is_actor = number < count
        source = actor if is_actor or bystander is None else bystander
        picture = trimmed(source, side)
        way = motion if is_actor else "still"
        shares = _shares(way, draws.uniform(0, 1), (start, end), (first, last), num_frames)
        across = _MARGIN + place * lane
        positions = _positions(shares, motion, across, lane, picture.size)
        role = "actor" if is_actor else "bystander"
        tracks.append(Track(role=role, size=picture.size, positions=positions))
        pictures.append(picture)
    scene = Scene(
        told=Told(motion=motion, count=count, has_bystander=bystander is not None),
        fps=fps,
        num_frames=num_frames,
        first=first,
        last=last,
        background=draws.choice(BACKGROUNDS),
        colours=(_colour(draws), _colour(draws)),
        background_seed=draws.getrandbits(32),
        sprite_side=side,
        tracks=tuple(tracks),
    )
    return scene, pictures


def frames_of(scene: Scene, pictures: Sequence[Image.Image]) -> Iterator[bytes]:
    """The frames as raw RGB."""
    ground = Image.fromarray(_background(scene)).convert("RGBA")
    for number in range(scene.num_frames):
        frame = ground.copy()
        for track, picture in zip(scene.tracks, pictures, strict=True):
            frame.alpha_composite(picture, track.positions[number])
        yield frame.convert("RGB").tobytes()


def _shares(
    motion: str,
    rest: float,
    ends: tuple[float, float],
    between: tuple[int, int],
    num_frames: int,
) -> list[float]:
    """How far along its lane a thing is in each frame, 0 to 1, from left or top."""
    if motion == "still":
        return [rest] * num_frames
    start, end = ends if motion in ("right", "down") else ends[::-1]
    first, last = between
    passed = (
        min(1.0, max(0.0, (number - first) / max(1, last - first))) for number in range(num_frames)
    )
    return [start + (end - start) * share for share in passed]


def _positions(
    shares: Sequence[float], motion: str, across: int, lane: int, size: tuple[int, int]
) -> tuple[tuple[int, int], ...]:
    """Corners in pixels: lanes are columns for what moves up or down, and else rows."""
    vertical = motion in ("up", "down")
    length, breadth = (size[1], size[0]) if vertical else size
    side = across + (lane - breadth) // 2
    along = [_MARGIN + round(share * (SIDE - 2 * _MARGIN - length)) for share in shares]
    return tuple((side, place) if vertical else (place, side) for place in along)


def _background(scene: Scene) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """Two soft colours in a pattern, without any meaning."""
    generator = np.random.default_rng(scene.background_seed)
    share = _pattern(scene.background, generator)[..., None]
    one, other = (np.array(colour, np.float64) for colour in scene.colours)
    mixed: _Field = one * (1 - share) + other * share
    return mixed.round().astype(np.uint8)


def _pattern(kind: str, generator: np.random.Generator) -> _Field:
    """The share of the second colour in each pixel."""
    share: Any
    x, y = np.meshgrid(np.arange(SIDE), np.arange(SIDE))
    width = int(generator.integers(8, 33))
    match kind:
        case "gradient":
            share = (x + y) / (2 * SIDE - 2)
        case "stripes":
            share = (x + y) // width % 2
        case "checks":
            share = (x // width + y // width) % 2
        case "clouds":
            share = _clouds(generator)
        case _:
            share = np.zeros((SIDE, SIDE))
    return np.asarray(share, np.float64)


def _clouds(generator: np.random.Generator) -> _Field:
    coarse = Image.fromarray(generator.integers(0, 256, (6, 6), dtype=np.uint8))
    return np.asarray(coarse.resize((SIDE, SIDE), Image.Resampling.BICUBIC), np.float64) / 255


def _colour(draws: random.Random) -> tuple[int, int, int]:
    return draws.randint(120, 250), draws.randint(120, 250), draws.randint(120, 250)
