"""Which linear layers of a model take 8-bit products, and who computes these.

A model's blocks stand in lists that are called `blocks` (transformer.py); their linear layers are
converted, less those of the first and last blocks that are to be kept. Embeddings, norms, pools,
projections, routers and the loss keep their precision always, and so does a layer with a side that
is no multiple of 16. What is converted keeps its parameters, names and checkpoints.
Status: native and torchao run on CPU; not run on a GPU yet, which Transformer Engine needs.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Literal, cast

import torch
from torch import nn

from carillon.engine.log import logger
from carillon.engine.nn.fp8 import UNIT, Fp8Linear
from carillon.engine.nn.fp8_foreign import torchao_linear, transformer_engine_linear
from carillon.engine.nn.fp8_scaling import DelayedScaling, Recipe, Scaling

Provider = Literal["auto", "native", "torchao", "transformer_engine"]
RECIPES: dict[Provider, tuple[Recipe, ...]] = {
    "native": ("tensorwise", "rowwise", "blockwise", "delayed"),
    "torchao": ("tensorwise", "rowwise"),
    "transformer_engine": ("tensorwise", "blockwise"),
}
_TABLE = "delayed_scaling"  # an attribute of each part of a model
_INSTALL = {
    "torchao": "pip install torchao",
    "transformer_engine": "pip install --no-build-isolation transformer_engine[pytorch]",
}


def provider_problems(provider: Provider, recipe: Recipe) -> Iterator[str]:
    """Why the provider cannot compute the recipe here; nothing where it can."""
    known = RECIPES["native" if provider == "auto" else provider]
    if recipe not in known:
        yield (
            f"fp8_provider: {provider} does not compute the recipe {recipe}; set "
            f"distributed.fp8_recipe to {' or '.join(known)}, or distributed.fp8_provider=native"
        )
    if provider in _INSTALL and find_spec(provider) is None:
        yield (
            f"fp8_provider: {provider} given, and the package is not installed: "
            f"{_INSTALL[provider]}, or set distributed.fp8_provider=native"
        )
    if provider == "transformer_engine" and not torch.cuda.is_available():
        yield (
            "fp8_provider: transformer_engine needs a CUDA device and there is none; use native "
            "or torchao"
        )


def fp8_linears(model: nn.Module, keep_blocks: int) -> dict[str, nn.Linear]:
    """The layers that take 8-bit products, by name; `keep_blocks` are left out at either end of
    each stack."""
    found: dict[str, nn.Linear] = {}
    num = 0
    for stack, blocks in model.named_modules():
        if stack.rpartition(".")[2] != "blocks" or not isinstance(blocks, nn.ModuleList):
            continue
        for index, block in enumerate(blocks):
            linears = {
                name: module
                for name, module in block.named_modules()
                if type(module) is nn.Linear and "router" not in name
            }
            num += len(linears)
            if keep_blocks <= index < len(blocks) - keep_blocks:
                found |= {f"{stack}.{index}.{n}": m for n, m in linears.items() if not _odd(m)}
    logger.info("fp8: %d of the blocks' %d linear layers take 8-bit products", len(found), num)
    return found


def _odd(linear: nn.Linear) -> bool:
    return any(side % UNIT for side in linear.weight.shape)  # of the whole, in any layout


def to_fp8(
    model: nn.Module,
    recipe: Recipe,
    *,
    provider: Provider = "auto",
    keep_blocks: int = 0,
    history: int = 16,
    parts: Sequence[nn.Module] | None = None,
) -> dict[str, nn.Module]:
    """Make the linear layers of the model's blocks take 8-bit products, in place.

    `history`: steps whose amaxes delayed scaling keeps. `parts`: this process's pieces of the
    model, under its names; without them, all of it is here. Returns the layers here by name.
    """
    names, parts = list(fp8_linears(model, keep_blocks)), parts or [model]
    part_of = {name: part for part in parts for name, _ in part.named_modules()}
    linears = {
        name: cast(nn.Linear, part_of[name].get_submodule(name))
        for name in names
        if name in part_of
    }
    if provider in ("torchao", "transformer_engine"):
        convert = torchao_linear if provider == "torchao" else transformer_engine_linear
        converted = {name: convert(linear, recipe) for name, linear in linears.items()}
        for name, layer in converted.items():
            parent, _, child = name.rpartition(".")
            setattr(part_of[name].get_submodule(parent), child, layer)
        return converted
    table = None
    if recipe == "delayed":
        # Of all layers, also where some are on other processes: amaxes meet in tables of one shape.
        table = DelayedScaling(names, history, next(parts[0].parameters()).device)
        for part in parts:
            setattr(part, _TABLE, table)
    for name, linear in linears.items():
        linear.__class__ = Fp8Linear
        slot = None if table is None else table.slot(names.index(name))
        cast(Fp8Linear, linear).scaling = Scaling(recipe, slot)
    return dict(linears)


def delayed_scaling(model: nn.Module) -> DelayedScaling | None:
    """The amaxes of a model whose layers are scaled by them, else none."""
    tables = (getattr(module, _TABLE, None) for module in model.modules())
    return next((table for table in tables if table is not None), None)


@contextmanager
def full_products(model: nn.Module) -> Iterator[None]:
    """Inside, converted layers multiply as they did before: in what autocast asks for."""
    layers = [m for m in model.modules() if getattr(m, "takes_fp8", False)]
    try:
        for layer in layers:
            layer.takes_fp8 = False  # type: ignore[assignment]
        yield
    finally:
        for layer in layers:
            layer.takes_fp8 = True  # type: ignore[assignment]
