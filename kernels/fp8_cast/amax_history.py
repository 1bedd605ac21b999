"""Delayed scaling: the scale of the next cast from the amaxes of the last ones.

A scale that is known before the cast makes tensorwise fp8_cast one read of x. The rule is that of
NVIDIA's Transformer Engine (recipe DelayedScaling, amax_compute_algo "max"): the largest of the
last n amaxes, over fp8_max, times 2^margin; the scale stays as it is where that amax is 0. It
differs in one thing: an amax that is not finite is not counted, where Transformer Engine keeps the
scale for as long as it is in the history. All runs on the device, without waiting for it.
Left out: the reduction over ranks, which the caller does to the amax before `record`.
"""

from typing import Any

import torch
from torch import Tensor

from carillon.kernels.fp8_cast.reference import FP8_MAX, MIN_SCALE


class AmaxHistory:
    """The last amaxes of one tensor of a model, or of several, and the scale that follows.

    cast:   `copies = fp8_cast(x, "tensorwise", dtype, history.scale)`, then
            `history.record(copies.amax)`; before the first record the scale is 1.
    """

    def __init__(
        self,
        length: int,
        dtype: torch.dtype,
        *,
        margin: int = 0,
        shape: tuple[int, ...] = (),
        device: torch.device | str = "cpu",
    ) -> None:
        """`length` amaxes are kept; `margin` leaves room for 2^margin times the largest of them.

        With a `shape`, amaxes and scales have it: one of each tensor, all recorded at a time.

        Raises:
            ValueError: a length below 1, a dtype that is not fp8, a margin outside 0 to 16.
        """
        if length < 1:
            raise ValueError(f"AmaxHistory: length must be at least 1, got {length}")
        if dtype not in FP8_MAX:
            raise ValueError(
                f"AmaxHistory: dtype must be float8_e4m3fn or float8_e5m2, got {dtype}"
            )
        if not 0 <= margin <= 16:
            raise ValueError(f"AmaxHistory: margin must be between 0 and 16, got {margin}")
        self._divisor = FP8_MAX[dtype] / 2.0**margin
        self._shape = shape
        self.amaxes = torch.zeros((length, *shape), dtype=torch.float32, device=device)
        self.position = 0
        self.scale = torch.ones(shape, dtype=torch.float32, device=device)

    def record(self, amax: Tensor) -> None:
        """Counts the amax of one cast and sets `scale` for the next.

        Shapes: amax as the history's `shape`, float32, on the device of the history.

        Raises:
            ValueError: an amax of another shape, dtype or device.
        """
        own = self.amaxes
        count = self.scale.numel()
        if amax.numel() != count or amax.dtype != torch.float32 or amax.device != own.device:
            raise ValueError(
                f"AmaxHistory: amax must be {'one' if count == 1 else count} float32 "
                f"value{'s' if count > 1 else ''} on {own.device}, got "
                f"{amax.numel()} of {amax.dtype} on {amax.device}"
            )
        value = amax.detach().reshape(self._shape)
        own[self.position] = torch.where(value.isfinite(), value, 0.0)
        self.position = (self.position + 1) % len(own)
        largest = own.amax(0)
        scale = (largest / self._divisor).clamp_min(MIN_SCALE)
        # A new tensor: the scale of an earlier cast is still held by its copies.
        self.scale = torch.where(largest == 0, self.scale, scale)

    def state_dict(self) -> dict[str, Any]:
        return {"amaxes": self.amaxes.clone(), "next": self.position, "scale": self.scale.clone()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on where the state was taken, on this history's device.

        Raises:
            ValueError: a state with other keys, or of a history of another length.
        """
        if state.keys() != {"amaxes", "next", "scale"}:
            raise ValueError(
                f"AmaxHistory: the state must have amaxes, next and scale, got {sorted(state)}"
            )
        amaxes, position = state["amaxes"], int(state["next"])
        if amaxes.shape != self.amaxes.shape or not 0 <= position < len(self.amaxes):
            raise ValueError(
                f"AmaxHistory: the state is of {amaxes.numel()} amaxes at {position}, "
                f"this history has {len(self.amaxes)}"
            )
        self.amaxes.copy_(amaxes)
        self.position = position
        self.scale = state["scale"].to(self.scale, copy=True)
