"""Turns pictures and texts into unit vectors with a trained dual encoder.

Pictures are read, decoded and cropped by a few threads one batch ahead of the model (Pillow lets go
of the interpreter lock), so nothing but two batches is ever held. Texts are sorted by length to pad
little, and equal texts are encoded once. A picture that cannot be read is reported, not replaced.
Left out: several devices, and sharded models.

Legend: B batch, D dims.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from carillon.engine.data.decode.image import decode_image
from carillon.engine.data.shards import SampleError, Split
from carillon.engine.data.tokenizer import Tokenizer
from carillon.engine.data.transforms import eval_transform, normalize
from carillon.engine.models.towers.dual_encoder import DualEncoder

if TYPE_CHECKING:
    from carillon.engine.train.run import LoadedRun


class PictureBatch(NamedTuple):
    """Encoded pictures of the readable rows of a batch, vectors (B, D) fp32 on the CPU."""

    rows: list[int]
    keys: list[str]
    metas: list[dict[str, Any]]
    vectors: Tensor
    bad: list[tuple[str, str]]


class _Picture(NamedTuple):
    row: int
    key: str
    meta: dict[str, Any]
    pixels: np.ndarray


class Encoder:
    """A model in evaluation mode with the tokenizer and the picture size that belong to it.

    `context` limits a text's tokens below the model's own limit, to what training has seen.
    `before_batch` is called before each batch is encoded; what it raises ends the work there.
    """

    def __init__(
        self,
        model: DualEncoder,
        tokenizer: Tokenizer,
        *,
        context: int | None = None,
        bf16: bool = False,
        batch_size: int = 128,
        before_batch: Callable[[], None] | None = None,
    ) -> None:
        self.model, self.tokenizer = model, tokenizer
        self._before_batch = before_batch or (lambda: None)
        self.dims = model.dims
        self.bf16, self.batch_size = bf16, batch_size
        self._size = model.vision.config.image_size
        limit = model.text.config.context
        self._context = min(context or limit, limit)
        self._device = next(model.parameters()).device

    def pictures(self, split: Split, rows: Sequence[int]) -> Iterator[PictureBatch]:
        """Encode rows of a split in order, batch by batch."""
        with ThreadPoolExecutor(max_workers=min(4, os.cpu_count() or 1)) as pool:
            loading = [pool.submit(self._load, split, int(row)) for row in rows[: self.batch_size]]
            done = 0
            while loading:
                done += self.batch_size
                following = rows[done : done + self.batch_size]
                coming = [pool.submit(self._load, split, int(row)) for row in following]
                yield self._encode_pictures([future.result() for future in loading])
                loading = coming

    def texts(self, texts: Sequence[str]) -> Tensor:
        """Encode texts. Shapes: -> (len(texts), D) fp32 on the CPU, in the order given."""
        distinct = sorted(set(texts), key=lambda text: (len(text), text))
        starts = range(0, len(distinct), self.batch_size)
        parts = [self._encode_texts(distinct[i : i + self.batch_size]) for i in starts]
        place = {text: i for i, text in enumerate(distinct)}
        vectors = torch.cat(parts) if parts else torch.empty(0, self.dims)
        return vectors[[place[text] for text in texts]]

    def picture(self, pixels: np.ndarray) -> Tensor:
        """Encode one picture. Shapes: (H, W, 3) uint8 -> (D,) fp32 on the CPU."""
        return self._forward_pictures([eval_transform(pixels, self._size)])[0]

    def _load(self, split: Split, row: int) -> _Picture | tuple[str, str]:
        try:
            sample = split.read(row)
            pixels = decode_image(sample.medium("image"), min_side=self._size)
            return _Picture(row, sample.key, sample.meta, eval_transform(pixels, self._size))
        except SampleError as error:
            return error.key, error.reason
        except ValueError as error:
            return split.key(row), str(error)

    def _encode_pictures(self, loaded: list[_Picture | tuple[str, str]]) -> PictureBatch:
        good = [item for item in loaded if isinstance(item, _Picture)]
        bad = [item for item in loaded if not isinstance(item, _Picture)]
        vectors = torch.empty(0, self.dims)
        if good:
            vectors = self._forward_pictures([item.pixels for item in good])
        return PictureBatch(
            rows=[item.row for item in good],
            keys=[item.key for item in good],
            metas=[item.meta for item in good],
            vectors=vectors,
            bad=bad,
        )

    @torch.inference_mode()
    def _forward_pictures(self, pixels: list[np.ndarray]) -> Tensor:
        self._before_batch()
        images = torch.from_numpy(np.stack(pixels)).to(self._device)
        with torch.autocast(self._device.type, torch.bfloat16, enabled=self.bf16):
            return self.model.encode_image(normalize(images)).float().cpu()

    @torch.inference_mode()
    def _encode_texts(self, texts: list[str]) -> Tensor:
        self._before_batch()
        tokens, lengths = self.tokenizer.encode(texts, self._context)
        with torch.autocast(self._device.type, torch.bfloat16, enabled=self.bf16):
            vectors = self.model.encode_text(tokens.to(self._device), lengths.to(self._device))
        return vectors.float().cpu()


def run_encoder(run: "LoadedRun", *, batch_size: int = 128) -> Encoder:
    """The encoder of a loaded run, on the device and in the precision that its config asks for."""
    layout = run.config.distributed
    use_cuda = layout.device == "cuda" or (layout.device == "auto" and torch.cuda.is_available())
    return Encoder(
        run.model.to("cuda" if use_cuda else "cpu"),
        run.tokenizer,
        context=run.config.data.augment.text.max_len,
        bf16=layout.precision != "fp32",
        batch_size=batch_size,
    )
