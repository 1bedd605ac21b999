"""Vectors of single pictures and texts by a run's checkpoint, for stages of curation.

A process opens a checkpoint once and computes by one thread: there is a process a core beside it.
On a CPU, since workers of curation share no device.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import torch

from carillon.engine.index.encoder import Encoder
from carillon.engine.train.run import find_checkpoint, find_run, load_run

Vector = np.ndarray[Any, np.dtype[np.float32]]


class Scorer:
    """A run's two encoders."""

    def __init__(self, run: str, checkpoint: str) -> None:
        torch.set_num_threads(1)
        loaded = load_run(run, checkpoint=checkpoint)
        context = loaded.config.data.augment.text.max_len
        self._encoder = Encoder(loaded.model, loaded.tokenizer, context=context)

    def picture(self, pixels: np.ndarray) -> Vector:
        """A picture's unit vector. Shapes: (H, W, 3) uint8 -> (D,)."""
        return np.asarray(self._encoder.picture(pixels).numpy(), np.float32)

    def text(self, text: str) -> Vector:
        """A text's unit vector. Shapes: -> (D,)."""
        return np.asarray(self._encoder.texts([text])[0].numpy(), np.float32)


@cache
def open_scorer(run: str, checkpoint: str) -> Scorer:
    """The scorer of a run, opened once a process. Raises UserError as load_run."""
    return Scorer(run, checkpoint)


@cache
def checkpoint_hash(run: str, checkpoint: str) -> str:
    """The content hash of a run's checkpoint. Raises UserError when there is none."""
    return find_checkpoint(find_run(run), checkpoint).content_hash
