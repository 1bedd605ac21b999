"""One sample while stages look at it: what is decoded, is decoded once, when it is first asked for.

A JPEG is decoded at a fraction of its size (DCT scaling), down to MIN_SIDE: every measure here is
taken of a smaller picture than that. Pictures, sounds and videos that cannot be decoded raise
ValueError with the reason, which sends the item to quarantine.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from functools import cached_property
from typing import Any

import numpy as np
from PIL import Image

from carillon.engine.data.decode.image import MAX_PIXELS, decode_image
from carillon.engine.data.samples import RawSample, main_member

MIN_SIDE = 256

_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP")


class Item:
    """A sample with the captions that stages have left of it so far."""

    def __init__(self, sample: RawSample, split: str) -> None:
        self.key, self.members, self.meta = sample.key, sample.members, sample.meta
        self.split = split
        self.captions: dict[str, list[str]] = {
            k: list(v) for k, v in sample.meta["captions"].items()
        }

    def has(self, modality: str) -> bool:
        return main_member(self.members, modality) is not None

    def medium(self, modality: str) -> bytes:
        """The bytes of the main member of a modality that the item `has`."""
        name = main_member(self.members, modality)
        assert name is not None
        return self.members[name]

    @property
    def texts(self) -> Iterator[tuple[str, str]]:
        """(language, text) of every caption, by language."""
        for language in sorted(self.captions):
            for text in self.captions[language]:
                yield language, text

    @cached_property
    def picture(self) -> np.ndarray[Any, np.dtype[np.uint8]]:
        """The main picture, (H, W, 3), its sides at least MIN_SIDE where they were.

        Raises ValueError when it cannot be decoded.
        """
        return decode_image(self.medium("image"), min_side=MIN_SIDE)

    @cached_property
    def picture_size(self) -> tuple[int, int]:
        """Width and height in the header of the main picture. Raises ValueError."""
        try:
            with Image.open(io.BytesIO(self.medium("image")), formats=_FORMATS) as image:
                width, height = image.size
        # Readers of hostile headers raise nearly anything (OSError, SyntaxError, struct.error).
        except Exception as error:
            raise ValueError(f"the picture's header cannot be read: {error}") from None
        if width * height > MAX_PIXELS:
            raise ValueError(f"the picture has {width} x {height} pixels; {MAX_PIXELS:,} at most")
        return width, height

    @cached_property
    def grey(self) -> np.ndarray[Any, np.dtype[np.uint8]]:
        """The picture's brightness, its longer side at most MIN_SIDE, for measures of quality."""
        image = Image.fromarray(self.picture).convert("L")
        image.thumbnail((MIN_SIDE, MIN_SIDE), Image.Resampling.BOX)
        return np.asarray(image)

    @cached_property
    def signature(self) -> bytes:
        """The picture's signature (picture_signature.py)."""
        from carillon.engine.data.curate.picture_signature import picture_signature

        return picture_signature(self.picture)
