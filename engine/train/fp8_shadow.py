"""Whether training by 8-bit products is still near training by bfloat16 ones.

Every few steps the batch's loss is computed a second time, without gradients and with bfloat16
products, from the same weights. The gap |fp8 - bf16| / bf16 is a metric (`fp8_gap`); the run stops
once it was above the bound in several looks in a row. Both losses are those of the global batch, so
every rank takes the same decision. A look costs one forward pass.
Left out: the gap of a second training, which only `make prove-fp8` measures.
"""

from __future__ import annotations

import math

from carillon.engine.parallel.config import Fp8ShadowConfig
from carillon.engine.train.guard import TrainingStopped


class Fp8Shadow:
    """Counts the looks above the bound; part of the checkpoint."""

    def __init__(self, config: Fp8ShadowConfig) -> None:
        self._config = config
        self._gap = 0.0
        self._above = 0

    def due(self, step: int) -> bool:
        """Whether step `step`, counted from 1, is looked at."""
        return self._config.every > 0 and step % self._config.every == 0

    def judge(self, fp8: float, bf16: float) -> float:
        """The gap of two losses. A bfloat16 loss that is not finite says nothing of the products:
        it is the step guard's to judge."""
        self._gap = abs(fp8 - bf16) / abs(bf16) if bf16 else math.inf if fp8 else 0.0
        if math.isfinite(bf16):
            self._above = 0 if self._gap <= self._config.bound else self._above + 1
        return self._gap

    def check(self) -> None:
        """Raises TrainingStopped once too many looks in a row were above the bound."""
        if self._above >= self._config.patience:
            raise TrainingStopped(
                f"the loss by fp8 products was off that by bf16 ones by more than "
                f"{self._config.bound:.3g} of it (distributed.fp8_shadow.bound) in {self._above} "
                f"looks in a row, last by {self._gap:.3g}. Train anew with "
                "distributed.fp8_recipe=blockwise, with more distributed.fp8_keep_blocks, or with "
                "distributed.precision=bf16"
            )

    def state_dict(self) -> dict[str, int]:
        return {"above": self._above}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self._above = int(state["above"])
