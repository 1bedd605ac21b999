"""The layouts that are held to one process: the rows of the parity table."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from carillon.engine.parallel.mesh import DistributedConfig
from carillon.engine.train.parity.columns import Variant

DUAL = frozenset({"dual encoder, softmax", "dual encoder, sigmoid", "pooled dual encoder, softmax"})
_PLAIN = Variant()
_CACHED = Variant(cached=True, recompute=True)
_RING = Variant(exchange="ring")
_COMPILED = Variant(compile=True)


@dataclass(frozen=True)
class Row:
    """A layout: its name, its processes, its `distributed` settings, and which columns it has."""

    name: str
    size: int
    settings: Mapping[str, Any]
    columns: frozenset[str] = DUAL
    variants: tuple[Variant, ...] = field(default=(_PLAIN, _CACHED))

    def layout(self, variant: Variant) -> DistributedConfig:
        return DistributedConfig(precision="fp32", **{**variant.settings(), **self.settings})


ROWS = (
    Row("one process", 1, {}, variants=(_PLAIN, _CACHED, _COMPILED)),
    Row("DP2", 2, {}, variants=(_PLAIN, _CACHED, _RING)),
    Row("FSDP2, zero_stage 2", 2, {"zero_stage": 2}),
    Row("FSDP2", 2, {"zero_stage": 3}, variants=(_PLAIN, _CACHED, _COMPILED)),
    Row("TP2", 2, {"tp": 2}, variants=(_PLAIN, _CACHED, _COMPILED)),
    Row("DP4", 4, {}, variants=(_PLAIN, _CACHED, _RING)),
    Row("FSDP4", 4, {"zero_stage": 3}),
    Row("HSDP 2x2", 4, {"zero_stage": 3, "dp_replicate": 2, "dp_shard": 2}),
    Row("TP4", 4, {"tp": 4}),
    Row("TP2xDP2", 4, {"tp": 2}),
    Row("TP2xFSDP2", 4, {"tp": 2, "zero_stage": 3}),
)
