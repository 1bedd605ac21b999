"""How the three matrices of an 8-bit linear layer are cast: which groups share a scale, and where
the scale comes from.

| recipe | inputs and gradients | weights | scale |
| --- | --- | --- | --- |
| tensorwise | one | one | of the tensor itself |
| rowwise | one a row | one a row | of the row itself |
| blockwise | one for 1 x 128 | one for 128 x 128 | of the block itself |
| delayed | one | one | of the largest amax of the last steps |

Gradients are e5m2, all else e4m3; blockwise, whose groups are small enough for it, has e4m3 only.
Delayed scaling casts from one read, and its amaxes meet once a step instead of once a product.
Where a process holds a share of a matrix, one scale for all shares needs the amax of them all;
rows and blocks are scaled by share, in groups as fine as one process's or finer. Processes with
other samples share delayed scales only: tensorwise, each scales by its own rows.
Source: Micikevicius et al. 2022 (FP8 formats for deep learning), sections 3 and 4; DeepSeek-V3
(arXiv 2412.19437) section 3.3.2; NVIDIA's Transformer Engine (DelayedScaling).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from enum import Enum
from typing import Literal

import torch
from torch import Tensor

from carillon.kernels.fp8_cast.amax_history import AmaxHistory
from carillon.kernels.fp8_cast.reference import Fp8Copies, group_amax, scale_from_amax
from carillon.kernels.table import resolve

Recipe = Literal["tensorwise", "rowwise", "blockwise", "delayed"]
_E4M3, _E5M2 = torch.float8_e4m3fn, torch.float8_e5m2


class Role(Enum):
    """The matrices of a linear layer; the value is its place among a layer's amaxes."""

    INPUT = 0
    WEIGHT = 1
    GRADIENT = 2


class Scaling:
    """The casts of one layer."""

    def __init__(self, recipe: Recipe, slot: Slot | None = None) -> None:
        self.recipe: Recipe = recipe
        self.slot = slot
        # Set by a layout in which this process holds a share of a matrix: of which ones, and the
        # largest of one number of each process that holds a share.
        self.shares: frozenset[Role] = frozenset()
        self.largest_of_shares: Callable[[Tensor], Tensor] | None = None

    def cast(self, x_MK: Tensor, role: Role) -> Fp8Copies:
        """The copies of x and of its transpose."""
        if x_MK.dtype not in (torch.float32, torch.bfloat16):
            x_MK = x_MK.float()
        dtype = _E5M2 if role is Role.GRADIENT and self.recipe != "blockwise" else _E4M3
        scale = self._scale(x_MK, role, dtype)
        cast = resolve("fp8_cast", x_MK.device)
        copies = Fp8Copies(*cast(x_MK, self._granularity(role), dtype, scale, column=True))
        if self.slot is not None:
            self.slot.see(role, copies.amax)
        return copies

    def _granularity(self, role: Role) -> str:
        if self.recipe == "blockwise":
            return "128x128" if role is Role.WEIGHT else "1x128"
        return "rowwise" if self.recipe == "rowwise" else "tensorwise"

    def _scale(self, x_MK: Tensor, role: Role, dtype: torch.dtype) -> Tensor | None:
        """The scale that the cast is given; None where it computes its own."""
        if self.recipe in ("rowwise", "blockwise"):
            return None
        if self.slot is not None and self.slot.is_known:
            return self.slot.scale(role)
        if role not in self.shares or self.largest_of_shares is None:
            return None
        amax = self.largest_of_shares(group_amax(x_MK, "tensorwise").float())
        return scale_from_amax(amax, dtype, power_of_two=False)


class DelayedScaling:
    """The amaxes of all layers of a model over the last steps; part of the checkpoint.

    Until the first step has ended, tensors are scaled by themselves: with a scale of 1 the
    gradients of a mean over a batch would round to zero.
    """

    def __init__(self, names: Sequence[str], length: int, device: torch.device) -> None:
        """`names`: of the layers; `length`: steps whose amaxes count."""
        self._names = list(names)
        count = len(self._names)
        self._histories = (
            AmaxHistory(length, _E4M3, shape=(count, 2), device=device),
            AmaxHistory(length, _E5M2, shape=(count, 1), device=device),
        )
        self.seen = torch.zeros((count, len(Role)), dtype=torch.float32, device=device)
        self.num_steps = 0

    def slot(self, index: int) -> Slot:
        """The place of one layer, in the order of the names."""
        return Slot(self, index)

    def scale(self, index: int, role: Role) -> Tensor:
        history = self._histories[role is Role.GRADIENT]
        return history.scale[index, 0 if role is Role.GRADIENT else role.value]

    @torch.no_grad()
    def end_step(self, largest: Callable[[Tensor], Tensor] | None = None, *, counts: bool) -> None:
        """Set the scales of the next step by what was seen in this one.

        `largest`: of each number, over all processes that hold shares of tensors or samples. A
        step that was skipped does not count: what made it bad may be in its amaxes.
        """
        if counts:
            seen = torch.where(self.seen.isfinite(), self.seen, 0.0)
            seen = seen if largest is None else largest(seen)
            forward, backward = self._histories
            forward.record(seen[:, :2])
            backward.record(seen[:, 2:])
            self.num_steps += 1
        self.seen.zero_()

    def state_tensors(self) -> dict[str, Tensor]:
        """Of each layer, by its name; what is written into them is what training goes on with."""
        tensors = {}
        for kind, history in zip(("forward", "backward"), self._histories, strict=True):
            for index, name in enumerate(self._names):
                tensors[f"{name}.{kind}.amaxes"] = history.amaxes[:, index]
                tensors[f"{name}.{kind}.scale"] = history.scale[index]
        return tensors

    def state_dict(self) -> dict[str, int]:
        return {"num_steps": self.num_steps}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.num_steps = int(state["num_steps"])
        for history in self._histories:
            history.position = self.num_steps % len(history.amaxes)


class Slot:
    """One layer's place among the histories."""

    def __init__(self, table: DelayedScaling, index: int) -> None:
        self.table, self._index = table, index

    @property
    def is_known(self) -> bool:
        return self.table.num_steps > 0

    def scale(self, role: Role) -> Tensor:
        return self.table.scale(self._index, role)

    def see(self, role: Role, amax: Tensor) -> None:
        seen = self.table.seen[self._index, role.value]
        seen.copy_(torch.maximum(seen, amax))
