"""Linear layers whose 8-bit products other packages compute: torchao and Transformer Engine.

Each is the package's own layer around the parameters of an nn.Linear, with the switch that
fp8_layers.full_products uses. The packages are imported when a layer is converted, never before.
Left out: Transformer Engine's delayed scaling, whose state is a pickle in the module, where ours
stands in the checkpoint; its layers with their own tensor parallelism.
Source: torchao.float8 (Float8LinearConfig.from_recipe_name, Float8Linear.from_float); Transformer
Engine's user guide (te.Linear, te.autocast and the classes of transformer_engine.common.recipe).
Status: torchao runs on CPU in every test, not on a GPU yet; Transformer Engine has not run at all.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from carillon.engine.nn.fp8 import whole_units
from carillon.engine.nn.fp8_scaling import Recipe


@functools.cache
def _torchao_class() -> Any:
    from torchao.float8.float8_linear import Float8Linear

    class TorchaoLinear(Float8Linear):  # type: ignore[misc]
        takes_fp8 = True

        def forward(self, x: Tensor) -> Tensor:
            if not self.takes_fp8:
                return F.linear(x, self.weight, self.bias)
            y: Tensor = super().forward(x)
            return y

    return TorchaoLinear


def torchao_linear(linear: nn.Linear, recipe: Recipe) -> nn.Module:
    """torchao's layer around the parameters of `linear`."""
    from torchao.float8 import Float8LinearConfig

    config = Float8LinearConfig.from_recipe_name(recipe)
    converted: nn.Module = _torchao_class().from_float(linear, config=config)
    return converted


@functools.cache
def _transformer_engine_class() -> Any:
    import transformer_engine.pytorch as te

    class TransformerEngineLinear(te.Linear):  # type: ignore[misc]
        takes_fp8 = True
        recipe: Any = None

        def forward(self, x: Tensor) -> Tensor:
            if not self.takes_fp8:
                return F.linear(x, self.weight, self.bias)
            rows = x.reshape(-1, x.shape[-1])
            with te.autocast(enabled=True, recipe=self.recipe):
                y: Tensor = super().forward(whole_units(rows))
            return y[: len(rows)].reshape(*x.shape[:-1], -1)

    return TransformerEngineLinear


def transformer_engine_linear(linear: nn.Linear, recipe: Recipe) -> nn.Module:
    """Transformer Engine's layer with the parameters of `linear`."""
    from transformer_engine.common import recipe as recipes

    made: dict[Recipe, Callable[[], Any]] = {
        "tensorwise": recipes.Float8CurrentScaling,
        "blockwise": recipes.Float8BlockScaling,
    }
    converted: nn.Module = _transformer_engine_class()(
        linear.in_features,
        linear.out_features,
        bias=linear.bias is not None,
        params_dtype=linear.weight.dtype,
        device=linear.weight.device,
    )
    with torch.no_grad():
        converted.get_parameter("weight").copy_(linear.weight)
        if linear.bias is not None:
            converted.get_parameter("bias").copy_(linear.bias)
    converted.recipe = made[recipe]()
    return converted
