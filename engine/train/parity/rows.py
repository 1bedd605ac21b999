"""The layouts that are held to one process: the rows of the parity table."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from carillon.engine.parallel.config import DistributedConfig
from carillon.engine.train.parity.columns import COLUMNS, DECODERS, DUAL_ENCODERS
from carillon.engine.train.parity.step import Variant

DUAL = frozenset(DUAL_ENCODERS)
DECODER = frozenset(DECODERS)
_PLAIN = Variant()
_CACHED = Variant(cached=True, recompute=True)
_RING = Variant(exchange="ring")
_COMPILED_COLUMNS = ("dual encoder, softmax", "MoE decoder, softmax router")
_COMPILED = Variant(compile=True)
_PLAIN_AND_COMPILED = (_PLAIN, _CACHED, _COMPILED)
_RECOMPUTE = Variant(recompute=True)
_SCHEDULES = {
    "1F1B": "1f1b",
    "interleaved": "interleaved1f1b",
    "ZB": "interleaved_zero_bubble",
    "ZBV": "zbv",
}


@dataclass(frozen=True)
class Row:
    """A layout: its name, its processes, its `distributed` settings, and which columns it has."""

    name: str
    size: int
    settings: Mapping[str, Any]
    columns: frozenset[str] = frozenset(COLUMNS)
    variants: tuple[Variant, ...] = field(default=(_PLAIN, _CACHED))
    depth: int = 2  # blocks of a model's towers: pipelines need one a stage, and two are quick
    num_tested: int = 1  # the first variants, which tests run; `make parity` runs all

    @property
    def cases(self) -> list[tuple[str, Variant]]:
        """Its columns, each in every variant that it has."""
        return [
            (column, variant)
            for column in COLUMNS
            if column in self.columns
            for variant in self.variants
            if column in DUAL or variant.exchange == "gather"  # the contrastive loss's
            if not variant.compile or column in _COMPILED_COLUMNS  # compiling takes long
        ]

    @property
    def tested(self) -> list[tuple[str, Variant]]:
        """The cases that tests run: of layouts of four and more processes, one column of dual
        encoders and one of decoders, others from row to row."""
        variants = self.variants[: self.num_tested]
        cases = [(column, variant) for column, variant in self.cases if variant in variants]
        if self.size < 4:
            return cases
        turn = sum(map(ord, self.name))
        kinds = ([c for c in COLUMNS if c in self.columns & kind] for kind in (DUAL, DECODER))
        chosen = [columns[turn % len(columns)] for columns in kinds if columns]
        return [(column, variant) for column, variant in cases if column in chosen]

    def layout(self, variant: Variant) -> DistributedConfig:
        return DistributedConfig(precision="fp32", **{**variant.settings(), **self.settings})


def _pipelines(
    name: str,
    size: int,
    settings: Mapping[str, Any],
    *,
    schedules: tuple[str, ...] = tuple(_SCHEDULES),
    columns: frozenset[str] = frozenset(COLUMNS),
    variants: tuple[Variant, ...] = (_PLAIN,),
) -> Iterator[Row]:
    """Rows of one layout by each schedule."""
    for schedule in schedules:
        given = {**settings, "pp_schedule": _SCHEDULES[schedule]}
        stages = given["pp"] * (1 if schedule == "1F1B" else 2)
        yield Row(f"{name} {schedule}", size, given, columns, variants, depth=max(4, stages))


ROWS = (
    Row("one process", 1, {}, variants=_PLAIN_AND_COMPILED, num_tested=2),
    Row("DP2", 2, {}, variants=(_CACHED, _RING, _PLAIN), num_tested=2),
    Row("FSDP2, zero_stage 2", 2, {"zero_stage": 2}),
    Row("FSDP2", 2, {"zero_stage": 3}, variants=(_CACHED, _COMPILED, _PLAIN), num_tested=2),
    Row("TP2", 2, {"tp": 2}, variants=(_PLAIN, _COMPILED, _CACHED), num_tested=2),
    Row("TP2+SP", 2, {"tp": 2, "sequence_parallel": True}, variants=_PLAIN_AND_COMPILED),
    Row("TP2, text tower whole", 2, {"tp": 2, "tp_whole_tower": "text"}, DUAL),
    Row("EP2", 2, {"ep": 2, "zero_stage": 3}, DECODER, (_CACHED, _PLAIN)),
    *(
        Row(f"CP2, {method}", 2, {"cp": 2, "cp_method": method}, DECODER)
        for method in ("ulysses", "ring", "all_gather")
    ),
    Row("DP4", 4, {}, variants=(*_PLAIN_AND_COMPILED, _RING)),
    Row("FSDP4", 4, {"zero_stage": 3}),
    Row(
        "HSDP 2x2",
        4,
        {"zero_stage": 3, "dp_replicate": 2, "dp_shard": 2},
        variants=_PLAIN_AND_COMPILED,
    ),
    Row("TP4", 4, {"tp": 4}),
    Row("TP4+SP", 4, {"tp": 4, "sequence_parallel": True}),
    Row("TP2xDP2", 4, {"tp": 2}),
    Row("TP2xFSDP2", 4, {"tp": 2, "zero_stage": 3}),
    Row("TP2+SPxFSDP2", 4, {"tp": 2, "sequence_parallel": True, "zero_stage": 3}),
    Row("EP4", 4, {"ep": 4, "zero_stage": 3}, DECODER),
    Row("EP2xFSDP2", 4, {"ep": 2, "zero_stage": 3}, DECODER, _PLAIN_AND_COMPILED),
    Row("EP2xTP2", 4, {"ep": 2, "tp": 2, "zero_stage": 3}, DECODER),
    Row("EP2xTP2+SP", 4, {"ep": 2, "tp": 2, "zero_stage": 3, "sequence_parallel": True}, DECODER),
    Row("CP4", 4, {"cp": 4}, DECODER),
    Row("CP2xTP2", 4, {"cp": 2, "tp": 2}, DECODER),
    Row("CP2xTP2+SP", 4, {"cp": 2, "tp": 2, "sequence_parallel": True}, DECODER),
    Row("CP2xFSDP2", 4, {"cp": 2, "zero_stage": 3}, DECODER, _PLAIN_AND_COMPILED),
    Row("CP2xEP2", 4, {"cp": 2, "ep": 2, "zero_stage": 3}, DECODER),
    *_pipelines("PP2", 2, {"pp": 2}, variants=(_PLAIN, _RECOMPUTE)),
    Row("PP2 GPipe", 2, {"pp": 2, "pp_schedule": "gpipe"}, variants=(_PLAIN,)),
    Row(
        "PP2 1F1B, split by hand",
        2,
        {"pp": 2, "pp_split": {"vision": (1, 3), "text": (3, 1)}},
        frozenset({"dual encoder, softmax"}),
        variants=(_COMPILED,),
        depth=4,
    ),
    *_pipelines("PP4", 4, {"pp": 4}, variants=(_RECOMPUTE,)),
    *_pipelines("PP2xTP2", 4, {"pp": 2, "tp": 2}),
    *_pipelines(
        "PP2xTP2+SP",
        4,
        {"pp": 2, "tp": 2, "sequence_parallel": True},
        schedules=("1F1B",),
        columns=frozenset({"pooled dual encoder, softmax", "dual encoder, sigmoid"}) | DECODER,
        variants=(_RECOMPUTE,),
    ),
    *_pipelines(
        "PP2xTP2+SP",
        4,
        {"pp": 2, "tp": 2, "sequence_parallel": True},
        schedules=("ZBV",),
        columns=DECODER,
    ),
    *_pipelines(
        "PP2xCP2",
        4,
        {"pp": 2, "cp": 2},
        schedules=("1F1B", "ZBV"),
        columns=DECODER,
        variants=(_PLAIN, _RECOMPUTE),
    ),
    *_pipelines(
        "PP2xCP2xEP2, ulysses",
        4,
        {"pp": 2, "cp": 2, "ep": 2, "zero_stage": 3, "cp_method": "ulysses"},
        schedules=("interleaved",),
        columns=frozenset({"MoE decoder, softmax router"}),
    ),
    *_pipelines(
        "PP2xEP2",
        4,
        {"pp": 2, "zero_stage": 3, "ep": 2},
        schedules=("1F1B", "ZBV"),
        columns=DECODER,
    ),
    *_pipelines("PP2xFSDP2", 4, {"pp": 2, "zero_stage": 3}, variants=(_RECOMPUTE,)),
    *_pipelines(
        "PP2xTP2xFSDP2",
        8,
        {"pp": 2, "tp": 2, "zero_stage": 3},
        schedules=("1F1B", "interleaved", "ZBV"),
        variants=(_RECOMPUTE,),
    ),
    *_pipelines(
        "PP2xCP2xTP2+SP",
        8,
        {"pp": 2, "cp": 2, "tp": 2, "sequence_parallel": True},
        schedules=("1F1B",),
        columns=frozenset({"MoE decoder, sigmoid router"}),
        variants=(_RECOMPUTE,),
    ),
)
