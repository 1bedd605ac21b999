"""Samples of text, pictures, video and sound packed into fixed budgets, each kind in its own part.

A sample gives a text (a caption, else what is said in it), the patches of its picture or of frames
of its video at their own shapes, and its sound's waveform; what it lacks takes no room. What a pack
holds follows from the order (packed.py). In each part the segments of samples stand one after
another, as packed_attention takes them: `offsets` are their starts and the end, the rest is
padding; `owners` says which sample of the pack a segment belongs to.
A sample is decoded when it is read, so its sizes are known: a stream holds `window` of them.
Trade-off: a part that is not the fullest has padding; budgets are to be as the samples are.

Legend: B packs, T tokens, P patches, D values of a patch, W values of sound, S segments + 2.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from carillon.engine.data.decode.audio import audio_header, decode_audio
from carillon.engine.data.decode.frame_choice import UniformFrames
from carillon.engine.data.decode.image import decode_image
from carillon.engine.data.decode.video import decode_video
from carillon.engine.data.order import position_generator
from carillon.engine.data.packed import Filled, Packed
from carillon.engine.data.packing import Sizes, StreamState
from carillon.engine.data.patches import grid_of, patches_of, places_of
from carillon.engine.data.samples import RawSample, SampleError, main_member
from carillon.engine.data.tokenizer import Tokenizer
from carillon.engine.data.training_data import TrainingData

NO_OWNER = -1


@dataclass(frozen=True, kw_only=True)
class MediaBudget:
    """What a pack has room for, and at most how much of it one sample takes."""

    tokens: int = 2048
    patches: int = 4096
    sound_s: float = 60.0
    samples: int = 64
    pictures: int = 32  # and videos

    sample_tokens: int = 256
    picture_patches: int = 576
    frame_patches: int = 196
    frames: int = 8
    sample_sound_s: float = 10.0  # of a longer one a drawn window is taken
    patch: int = 16
    rate: int = 16_000

    def __post_init__(self) -> None:
        for least, name, room in (
            (self.sample_tokens, "tokens", self.tokens),
            (self.picture_patches, "patches", self.patches),
            (self.frame_patches * self.frames, "patches", self.patches),
            (self.sample_sound_s, "sound_s", self.sound_s),
            (1, "samples", self.samples),
            (1, "pictures", self.pictures),
        ):
            if not 0 < least <= room:
                raise ValueError(
                    f"{name}: a sample may take {least:g}, a pack has room for {room:g}; "
                    "give a pack at least as much, and a sample more than nothing"
                )

    @property
    def values(self) -> int:
        """Values of sound in a pack."""
        return round(self.sound_s * self.rate)


class Segment(NamedTuple):
    """What a sample has in one part: (n, ...) values, and of patches their places (n, 3)."""

    values: NDArray[np.generic]
    places: NDArray[np.int32] | None = None


class Media(NamedTuple):
    """A sample, decoded."""

    key: str
    tokens: Segment | None
    patches: Segment | None
    sound: Segment | None


class Part(NamedTuple):
    """One kind of all packs. Segment j of pack b is values[b, offsets[b, j]:offsets[b, j + 1]]."""

    values: Tensor  # (B, T), (B, P, D) uint8 or (B, W) fp32
    offsets: Tensor  # (B, S) int32; the last segment is padding
    owners: Tensor  # (B, S - 1) int64, NO_OWNER past the last and for the padding

    def to(self, device: torch.device) -> Part:
        return Part(*(part.to(device, non_blocking=True) for part in self))


class MediaPacks(NamedTuple):
    """One process's share of a global batch of packs."""

    tokens: Part
    patches: Part
    places: Tensor  # (B, P, 3) int32: frame, row and column of each patch
    sound: Part
    num_samples: Tensor  # (B,) int64
    keys: list[str]
    bad: list[tuple[str, str]]
    num_filtered: int
    streams: Mapping[int, StreamState]

    def to(self, device: torch.device) -> MediaPacks:
        return self._replace(
            tokens=self.tokens.to(device),
            patches=self.patches.to(device),
            places=self.places.to(device, non_blocking=True),
            sound=self.sound.to(device),
            num_samples=self.num_samples.to(device, non_blocking=True),
        )


class PackedMedia(Packed[MediaPacks, Media]):
    """Global position -> pack."""

    def __init__(self, data: TrainingData, tokenizer: Tokenizer, budget: MediaBudget) -> None:
        rooms = (budget.tokens, budget.patches, budget.values, budget.samples, budget.pictures)
        super().__init__(data, rooms)
        self._tokenizer, self._limits = tokenizer, budget

    def sample_of(self, position: int, raw: RawSample) -> Media:
        generator = position_generator(self.seed, "sample", position)
        tokens = self._tokens(raw, generator)
        try:
            patches, sound = self._patches(raw), self._sound(raw, generator)
        except ValueError as error:
            raise SampleError(raw.key, str(error)) from None
        if tokens is None and patches is None and sound is None:
            raise SampleError(raw.key, "neither text, nor a picture, a video or a sound")
        return Media(raw.key, tokens, patches, sound)

    def sizes_of(self, sample: Media) -> Sizes:
        parts = (sample.tokens, sample.patches, sample.sound)
        lengths = [0 if part is None else len(part.values) for part in parts]
        return (*lengths, 1, int(sample.patches is not None))

    def collate(self, filled: Filled[Media]) -> MediaPacks:
        limits, packs = self._limits, filled.packs
        pad = self._tokenizer.pad_id
        tokens = _part([[m.tokens for m in p] for p in packs], (limits.tokens,), np.int64, pad)
        in_patches = [[m.patches for m in pack] for pack in packs]
        shape = (limits.patches, 3 * limits.patch**2)
        places = [[_places_alone(segment) for segment in pack] for pack in in_patches]
        return MediaPacks(
            tokens=tokens,
            patches=_part(in_patches, shape, np.uint8),
            places=_part(places, (limits.patches, 3), np.int32).values,
            sound=_part([[m.sound for m in p] for p in packs], (limits.values,), np.float32),
            num_samples=torch.tensor([len(pack) for pack in packs]),
            keys=[media.key for pack in packs for media in pack],
            bad=filled.bad,
            num_filtered=filled.num_filtered,
            streams=filled.streams,
        )

    def _tokens(self, raw: RawSample, generator: np.random.Generator) -> Segment | None:
        texts = raw.meta.get("captions") or raw.meta.get("transcripts")
        if not texts:
            return None
        text = self.choose_text(texts, generator)[1]
        ids = self._tokenizer.ids(text)[: self._limits.sample_tokens - 2]
        return Segment(np.array([self._tokenizer.bos_id, *ids, self._tokenizer.eos_id]))

    def _patches(self, raw: RawSample) -> Segment | None:
        limits = self._limits
        if main_member(raw.members, "image") is not None:
            picture = self.decoded(decode_image, "image", raw.medium("image"))
            grid = grid_of(*picture.shape[:2], patch=limits.patch, most=limits.picture_patches)
            return Segment(patches_of(picture, grid, limits.patch), places_of(grid))
        if main_member(raw.members, "video") is None:
            return None
        chosen = UniformFrames(limits.frames)
        clip = self.decoded(decode_video, "video", raw.medium("video"), sampling=chosen)
        grid = grid_of(*clip.frames.shape[1:3], patch=limits.patch, most=limits.frame_patches)
        frames = [patches_of(frame, grid, limits.patch) for frame in clip.frames]
        places = [places_of(grid, number) for number in range(len(frames))]
        return Segment(np.concatenate(frames), np.concatenate(places))

    def _sound(self, raw: RawSample, generator: np.random.Generator) -> Segment | None:
        if main_member(raw.members, "audio") is None:
            return None
        data, most = raw.medium("audio"), self._limits.sample_sound_s
        header = audio_header(data)
        whole = (header.num_frames or 0) / header.rate
        start = float(generator.random()) * max(0.0, whole - most)
        window = {"rate": self._limits.rate, "mono": True, "start_s": start, "duration_s": most}
        sound = self.decoded(decode_audio, "audio", data, **window)
        return Segment(sound.samples[0][: round(most * self._limits.rate)])


def _places_alone(segment: Segment | None) -> Segment | None:
    if segment is None:
        return None
    assert segment.places is not None
    return Segment(segment.places)


def _part(
    packs: Sequence[Sequence[Segment | None]],
    shape: tuple[int, ...],
    dtype: type[np.generic],
    pad: int = 0,
) -> Part:
    """One kind of all packs: `shape` is the room of a pack in it."""
    most = max((sum(s is not None for s in pack) for pack in packs), default=0)
    values = np.full((len(packs), *shape), pad, dtype)
    offsets = np.full((len(packs), most + 2), shape[0], np.int32)
    owners = np.full((len(packs), most + 1), NO_OWNER, np.int64)
    for number, pack in enumerate(packs):
        end, there = 0, [(owner, s) for owner, s in enumerate(pack) if s is not None]
        for place, (owner, segment) in enumerate(there):
            values[number, end : end + len(segment.values)] = segment.values
            offsets[number, place], owners[number, place] = end, owner
            end += len(segment.values)
        offsets[number, len(there)] = end
    return Part(*(torch.from_numpy(array) for array in (values, offsets, owners)))
