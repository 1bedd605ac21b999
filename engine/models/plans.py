"""Tensor-parallel plans of the models, and the sizes that decide which degrees fit.

The plan is Megatron's: in each block one sum after attention and one after the MLP. Source: Shoeybi
et al. 2019 (Megatron-LM), section 3. Rows of `qkv` are head-major, so a share is whole heads.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence

from carillon.engine.choices import divisors, either, listed, nearest
from carillon.engine.models.catalog import text_config, vision_config
from carillon.engine.models.towers.decoder import Decoder
from carillon.engine.models.towers.decoder_config import DecoderConfig
from carillon.engine.models.towers.dual_encoder import DualEncoder, DualEncoderConfig
from carillon.engine.nn.fp8 import UNIT
from carillon.engine.parallel.config import DistributedConfig
from carillon.engine.parallel.pipeline_split import split_problems
from carillon.engine.parallel.plan import Plan, Split
from carillon.engine.parallel.zigzag import row_length_errors

_BLOCK = {
    "attention.qkv": Split.COLUMNS,
    "attention.q_norm": Split.HEADS,
    "attention.k_norm": Split.HEADS,
    "attention.out": Split.ROWS,
    "mlp.fc1": Split.COLUMNS,
    "mlp.fc2": Split.ROWS,
}
TOWERS = ("vision", "text")
DUAL_ENCODER: Plan = {
    **{
        f"{tower}.transformer.blocks.*.{name}": split
        for tower in TOWERS
        for name, split in _BLOCK.items()
    },
    **{f"{tower}.transformer": Split.STREAM for tower in TOWERS},
    "text.token": Split.VOCABULARY,
    "vision.pool.q": Split.COLUMNS,
    "vision.pool.kv": Split.COLUMNS,
    "vision.pool.out": Split.ROWS,
    "vision.pool.mlp.fc1": Split.COLUMNS,
    "vision.pool.mlp.fc2": Split.ROWS,
}
DECODER: Plan = {
    "token": Split.VOCABULARY,
    "blocks.*.attention.qkv": Split.COLUMNS,
    "blocks.*.attention.q_norm": Split.ROW_HEADS,
    "blocks.*.attention.k_norm": Split.ROW_HEADS,
    "blocks.*.attention.out": Split.ROWS,
    # A dense MLP, or the shared experts of a mixture; engine/parallel/expert.py splits the others.
    "blocks.*.mlp.gate_up": Split.COLUMNS,
    "blocks.*.mlp.down": Split.ROWS,
    "blocks.*.mlp.shared.gate_up": Split.COLUMNS,
    "blocks.*.mlp.shared.down": Split.ROWS,
    "head": Split.COLUMNS,
    "": Split.STREAM,
}


def plan_of(model: DualEncoder | Decoder, whole_tower: str | None = None) -> Plan:
    """The model's plan, without a tower that is to stay whole on every process."""
    if isinstance(model, Decoder):
        return DECODER
    return {
        name: split for name, split in DUAL_ENCODER.items() if name.split(".")[0] != whole_tower
    }


def decoder_problems(config: DecoderConfig, layout: DistributedConfig) -> Iterator[str]:
    """Why a decoder cannot be laid out so."""
    moe, tp, ep = config.moe, layout.tp, layout.ep
    yield from split_problems(layout, {"decoder": config.depth})
    sizes = [("model's num_kv_heads", config.kv_heads), ("model.mlp_width", config.mlp_width)]
    if moe.num_experts is not None:
        sizes.append(("model.moe.expert_width", moe.expert_width))
    yield from tp_problems(tp, sizes)
    if ep > 1 and moe.num_experts is None:
        yield f"distributed.ep: {ep} given, but the model has no experts; use ep=1"
    elif ep > 1 and moe.num_experts is not None and moe.num_experts % ep:
        fits = listed(divisors(moe.num_experts))
        more = -(-moe.num_experts // ep) * ep
        yield (
            f"distributed.ep: {ep} does not divide model.moe.num_experts ({moe.num_experts}); use "
            f"one of {fits}, or {more} experts"
        )
    if layout.tp_whole_tower is not None:
        yield (
            f"distributed.tp_whole_tower: {layout.tp_whole_tower} given, but a decoder has no "
            "towers; drop it"
        )
    if layout.sequence_parallel and config.context % (tp * layout.cp):
        yield (
            f"distributed.sequence_parallel: tp {tp} x cp {layout.cp} does not divide "
            f"model.context ({config.context}); use a multiple of {tp * layout.cp}, or drop it"
        )
    yield from _context_problems(config, layout)
    if layout.precision == "fp8":
        width = ("model.width", config.width)
        sides = [("model.width", (config.width,)), *_decoder_sides(config)]
        yield from fp8_problems(layout, [width], sides, {"decoder": config.depth})


def _decoder_sides(config: DecoderConfig) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Of the layers with 8-bit products that tp splits, besides the width."""
    moe = config.moe
    attention = (config.num_heads + 2 * config.kv_heads) * (config.width // config.num_heads)
    yield "model's queries, keys and values", (attention,)
    yield "model.mlp_width", (config.mlp_width, 2 * config.mlp_width)
    if moe.num_experts is not None:
        shared = moe.shared_experts * moe.expert_width
        yield "model.moe.shared_experts x expert_width", (shared, 2 * shared)


def fp8_problems(
    layout: DistributedConfig,
    widths: Sequence[tuple[str, int]],
    sides: Sequence[tuple[str, tuple[int, ...]]],
    depth_of: Mapping[str, int],
) -> Iterator[str]:
    """Why 8-bit products cannot be laid out so.

    `widths`: of the towers, a side of every layer in one. `sides`: of the layers that tp splits.
    """
    tp, kept = layout.tp, layout.fp8_keep_blocks
    if all(width % UNIT for _, width in widths):
        given = " and ".join(f"{name} ({width})" for name, width in widths)
        yield (
            f"distributed.precision: fp8 multiplies sides that are multiples of {UNIT}, and "
            f"{given} {'are' if len(widths) > 1 else 'is'} none, so no layer would; change "
            f"{'one' if len(widths) > 1 else 'it'}, or use precision=bf16"
        )
    if all(2 * kept >= depth for depth in depth_of.values()):
        deepest = max(depth_of.values())
        yield (
            f"distributed.fp8_keep_blocks: {kept} at either end leave none of up to {deepest} "
            f"blocks in 8 bits; use at most {(deepest - 1) // 2}, or precision=bf16"
        )
    for name, sizes in sides:
        if not _are_whole_units(sizes, tp):
            fits = [n for n in divisors(sizes[0]) if n < tp and _are_whole_units(sizes, n)]
            yield (
                f"distributed.tp: {tp} leaves a share of {name} ({sizes[0]}) that is no multiple "
                f"of {UNIT}, as 8-bit products need; use one of {listed(fits)}, or "
                "precision=bf16"
            )


def _are_whole_units(sizes: tuple[int, ...], tp: int) -> bool:
    """Whether shares of the sides of layers that take 8 bits in one process can take them too."""
    return not any(size % UNIT == 0 and size // tp % UNIT for size in sizes)


def _context_problems(config: DecoderConfig, layout: DistributedConfig) -> Iterator[str]:
    if layout.cp == 1:
        return
    for error in row_length_errors(config.context, layout.cp):
        yield f"distributed.{error}; rows are model.context long"
    local = config.num_heads // layout.tp
    if layout.cp_method == "ulysses" and local % layout.cp:
        near = either(nearest(divisors(local), layout.cp))
        yield (
            f"distributed.cp: {layout.cp} given, but cp_method=ulysses shares {config.num_heads} "
            f"heads / tp {layout.tp} among cp; use cp={near}, or cp_method=ring or all_gather"
        )
    if config.moe.capacity_factor is not None:
        yield (
            f"distributed.cp: {layout.cp} given, but model.moe.capacity_factor drops slots by "
            "their order in a whole row; leave capacity_factor out, or use cp=1"
        )


def tp_problems(tp: int, sizes: Sequence[tuple[str, int]]) -> Iterator[str]:
    """One message for all named sizes that tp does not divide, with the degrees that divide all."""
    wrong = [f"{name} ({size})" for name, size in sizes if size % tp]
    if wrong:
        fits = listed(divisors(math.gcd(*(size for _, size in sizes))))
        yield f"distributed.tp: {tp} does not divide {', '.join(wrong)}; use one of {fits}"


def split_sizes(
    config: DualEncoderConfig, whole_tower: str | None, *names: str
) -> Iterator[tuple[str, int]]:
    """These sizes of the towers that tensor parallelism splits: their name and value."""
    vision = vision_config(config.vision_backbone, config.vision)
    text = text_config(config.text_backbone, config.text)
    for tower, sizes in (("vision", vision), ("text", text)):
        if tower != whole_tower:
            yield from ((f"model.{tower}'s {name}", getattr(sizes, name)) for name in names)


def depths(config: DualEncoderConfig) -> dict[str, int]:
    """Blocks of each tower."""
    vision = vision_config(config.vision_backbone, config.vision)
    return {"vision": vision.depth, "text": text_config(config.text_backbone, config.text).depth}
