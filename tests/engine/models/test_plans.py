"""Layouts that a decoder cannot have are refused with what is near."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from carillon.engine.config import UserError, build
from carillon.engine.models.plans import decoder_problems
from carillon.engine.models.towers.decoder_config import DecoderConfig, MoeConfig
from carillon.engine.parallel.config import DistributedConfig
from carillon.engine.parallel.expert import shard_of
from carillon.engine.parallel.mesh import degrees_of
from carillon.engine.train.run_config import RunConfig

MIXED = DecoderConfig(
    num_heads=8, num_kv_heads=2, moe=MoeConfig(num_experts=6, expert_width=96, shared_experts=1)
)


@pytest.mark.parametrize(
    ("config", "layout", "messages"),
    [
        (MIXED, DistributedConfig(ep=3, tp=2, zero_stage=3), []),
        (MIXED, DistributedConfig(pp=2, cp=2, tp=2, sequence_parallel=True), []),
        (
            MIXED,
            DistributedConfig(ep=4),
            ["ep: 4 does not divide model.moe.num_experts (6); use one of 1, 2, 3, 6, or 8"],
        ),
        (
            MIXED,
            DistributedConfig(tp=4),
            ["tp: 4 does not divide model's num_kv_heads (2); use one of 1, 2"],
        ),
        (
            replace(MIXED, num_kv_heads=8, mlp_width=36, moe=replace(MIXED.moe, expert_width=12)),
            DistributedConfig(tp=8),
            ["divide model.mlp_width (36), model.moe.expert_width (12); use one of 1, 2, 4"],
        ),
        (MIXED, DistributedConfig(pp=2, tp=2, precision="fp8", zero_stage=3), []),
        (
            replace(MIXED, mlp_width=40, moe=replace(MIXED.moe, expert_width=24, dense_blocks=1)),
            DistributedConfig(tp=2, precision="fp8", fp8_keep_blocks=4),
            [
                "4 at either end leave none of up to 8 blocks in 8 bits; use at most 3",
                "share of model.mlp_width (40) that is no multiple of 16",
                "share of model.moe.shared_experts x expert_width (24)",
            ],
        ),
        (
            MIXED,
            DistributedConfig(tp=2, tp_whole_tower="text"),
            ["tp_whole_tower: text given, but a decoder has no towers"],
        ),
        (
            replace(MIXED, context=18),
            DistributedConfig(tp=2, cp=2, sequence_parallel=True),
            ["tp 2 x cp 2 does not divide model.context (18)", "cp: 2 given"],
        ),
        (replace(MIXED, moe=MoeConfig()), DistributedConfig(ep=2), ["the model has no experts"]),
        (
            replace(MIXED, moe=replace(MIXED.moe, capacity_factor=1.5)),
            DistributedConfig(cp=2),
            ["cp: 2 given, but model.moe.capacity_factor drops slots"],
        ),
    ],
)
def test_what_does_not_divide_is_named(
    config: DecoderConfig, layout: DistributedConfig, messages: list[str]
) -> None:
    problems = list(decoder_problems(config, layout))
    assert len(problems) == len(messages)
    for problem, message in zip(problems, messages, strict=True):
        assert message in problem


def test_dual_encoder_degrees_are_those_that_divide_all_sizes() -> None:
    """The heads allow 1, 2, 4, the MLPs far more: one line, and what it names is not refused."""
    tower = {"width": 64, "num_heads": 4, "mlp_width": 128}
    model, steps = {"vision": tower, "text": tower}, {"steps": 1}
    values: dict[str, Any] = {"data": {"path": "x"}, "model": model, "optimization": steps}

    def load(tp: int) -> RunConfig:
        return build(RunConfig, values | {"distributed": {"tp": tp}})

    with pytest.raises(UserError) as refused:
        load(3)
    (line,) = [line for line in str(refused.value).splitlines() if "distributed.tp" in line]
    assert line.endswith("; use one of 1, 2, 4")
    for part in ("vision's num_heads (4)", "text's num_heads (4)", "text's mlp_width (128)"):
        assert part in line
    for tp in (1, 2, 4):
        load(tp)


@pytest.mark.parametrize(
    ("given", "size", "message"),
    [
        (
            {"tp": 3},
            8,
            "distributed.tp=3: 8 processes .* = 3; start 6 or 9 processes, or use .* is 2 or 4",
        ),
        (
            {"pp": 2, "tp": 3},
            4,
            "distributed.pp=2 x distributed.tp=3: 4 processes .* = 6; start 6 processes, .* is 4",
        ),
        (
            {"dp_replicate": 1},
            2,
            "dp_replicate: 1 given, but .* all 2 .* are replicas. Drop .*zero_stage=1, 2 or 3",
        ),
        ({"dp_replicate": 2}, 8, "all 8 data-parallel processes are replicas"),
        ({"dp_replicate": 3}, 8, "over more processes, with dp_replicate 2 or 4"),
        (
            {"dp_replicate": 3, "zero_stage": 3},
            8,
            "distributed.dp_replicate: 3 does not divide 8 data-parallel processes; use 2 or 4",
        ),
        ({"dp_shard": 16, "zero_stage": 1}, 8, "dp_shard: 16 does not divide 8 .*; use 8"),
        (
            {"dp_replicate": 3, "dp_shard": 2, "zero_stage": 3},
            8,
            "dp_replicate=3 x distributed.dp_shard=2: they make 6 .* the 8 .* use 4 x 2",
        ),
    ],
)
def test_impossible_degrees_name_the_settings_and_the_nearest(
    given: dict[str, Any], size: int, message: str
) -> None:
    with pytest.raises(UserError, match=message) as refused:
        degrees_of(DistributedConfig(**given), size)
    assert "None" not in str(refused.value)


def test_degrees_that_are_left_open() -> None:
    def data(size: int, **given: Any) -> tuple[int, int]:
        degrees = degrees_of(DistributedConfig(**given), size)
        return degrees.dp_replicate, degrees.dp_shard

    assert data(8) == data(8, dp_replicate=8) == (8, 1)
    assert data(8, zero_stage=3) == data(8, zero_stage=3, dp_replicate=1) == (1, 8)
    assert data(8, zero_stage=2, dp_replicate=2) == data(8, zero_stage=2, dp_shard=4) == (2, 4)
    assert data(8, tp=2, dp_replicate=4) == (4, 1)


def test_experts_are_split_over_processes_that_shard_a_replica() -> None:
    with pytest.raises(UserError, match="dp_shard x cp = 4; use one of 1, 2, 4"):
        degrees_of(DistributedConfig(ep=3, zero_stage=3), 4)
    with pytest.raises(UserError, match="dp_shard x cp = 1; use one of 1, or shard over more"):
        degrees_of(DistributedConfig(ep=2), 4)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"ep": 2, "zero_stage": 3}, "a dual encoder has no experts; use ep=1"),
        ({"dispatcher": "all_to_all"}, "all_to_all given, but ep is 1"),
        ({"dispatcher": "deepep", "ep": 2}, "the package deep_ep is not installed; build it from"),
        ({"dispatcher": "deepep", "ep": 2, "precision": "fp32"}, "sends bfloat16 only"),
    ],
)
def test_settings_that_cannot_work_are_refused_at_load(
    values: dict[str, object], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        build(RunConfig, {"distributed": values, "data": {"path": "x"}})


def test_expert_weights_are_sharded_by_what_divides() -> None:
    weight = nn.Parameter(torch.empty(6, 32, 20))
    assert [shard_of(weight, degree).dim for degree in (1, 3, 4, 5)] == [0, 0, 1, 2]
    with pytest.raises(UserError, match=r"7 processes cannot shard.*6 x 32 x 20"):
        shard_of(weight, 7)
