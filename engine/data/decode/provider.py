"""Batches of samples to tensors, by one of two providers that give the same within a bound.

`cpu` is the functions of this folder, a sample after another. `dali` is NVIDIA DALI, whose
operators run on CPUs too; on a GPU the same code makes its pipelines there. A sample that cannot be
used has its error in its place, and costs no other one. An explicit choice that cannot be served
raises.
How far apart the two may be is in tests/engine/data/decode/test_provider.py.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from carillon.engine.config import UserError
from carillon.engine.data.decode.audio import decode_audio
from carillon.engine.data.decode.frame_choice import Sampling
from carillon.engine.data.decode.image import decode_image
from carillon.engine.data.decode.limits import DEFAULT_LIMITS, DecodeError, Limits
from carillon.engine.data.decode.video import decode_video
from carillon.engine.data.transforms import resize

PROVIDERS = ("cpu", "dali")
Results = list[Tensor | DecodeError]


class BatchDecoder(Protocol):
    """Decodes batches; results stand in the order of the samples, on the decoder's device."""

    def pictures(self, batch: Sequence[bytes], *, size: tuple[int, int]) -> Results:
        """Whole pictures of `size` (height, width). Shapes: (H, W, 3) uint8."""
        ...

    def sounds(self, batch: Sequence[bytes], *, rate: int) -> Results:
        """The mean of each sound's channels at `rate`. Shapes: (T,) float32."""
        ...

    def clips(
        self, batch: Sequence[bytes], sampling: Sampling, *, size: tuple[int, int]
    ) -> Results:
        """Chosen frames of `size` (height, width). Shapes: (T, H, W, 3) uint8."""
        ...


class CpuDecoder:
    """The provider `cpu`."""

    def __init__(self, limits: Limits = DEFAULT_LIMITS) -> None:
        self._limits = limits

    def pictures(self, batch: Sequence[bytes], *, size: tuple[int, int]) -> Results:
        def decode(data: bytes) -> Tensor:
            pixels = decode_image(data, max_pixels=self._limits.max_pixels)
            return torch.from_numpy(resize(pixels, *size))

        return [_result_or_error(decode, data) for data in batch]

    def sounds(self, batch: Sequence[bytes], *, rate: int) -> Results:
        def decode(data: bytes) -> Tensor:
            sound = decode_audio(data, rate=rate, mono=True, limits=self._limits)
            return torch.from_numpy(sound.samples[0])

        return [_result_or_error(decode, data) for data in batch]

    def clips(
        self, batch: Sequence[bytes], sampling: Sampling, *, size: tuple[int, int]
    ) -> Results:
        def decode(data: bytes) -> Tensor:
            return torch.from_numpy(
                decode_video(data, sampling, size=size, limits=self._limits).frames
            )

        return [_result_or_error(decode, data) for data in batch]


def batch_decoder(
    name: str, device: torch.device | None = None, limits: Limits = DEFAULT_LIMITS
) -> BatchDecoder:
    """The decoder of that name for tensors on the device (none: the CPU).

    Raises UserError for an unknown name, DALI that is not installed, or `cpu` for a GPU.
    """
    device = device or torch.device("cpu")
    if name == "cpu":
        if device.type != "cpu":
            raise UserError(f"the decoders of `cpu` give tensors on the CPU, not on {device}")
        return CpuDecoder(limits)
    if name == "dali":
        from carillon.engine.data.decode.dali_provider import DaliDecoder

        return DaliDecoder(device, limits)
    raise UserError(f"decoder {name!r} given; {' and '.join(PROVIDERS)} are allowed")


def _result_or_error(decode: Callable[[bytes], Tensor], data: bytes) -> Tensor | DecodeError:
    try:
        return decode(data)
    except DecodeError as error:
        return error
