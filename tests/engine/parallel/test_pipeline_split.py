"""How pipelines are cut and placed; that they compute the step is in the parity table."""

from itertools import combinations
from typing import Any

import pytest

from carillon.engine.models.plans import decoder_problems
from carillon.engine.models.towers.decoder_config import DecoderConfig
from carillon.engine.parallel.config import DistributedConfig
from carillon.engine.parallel.pipeline_split import (
    balanced_split,
    microbatch_size,
    rank_of_last_stage,
    stage_imbalance,
    stages_of,
)


@pytest.mark.parametrize("stages", range(1, 6))
def test_no_split_has_a_cheaper_dearest_stage(stages: int) -> None:
    costs = [7, 3, 1, 4, 1, 5, 9]  # an embedding, five blocks, a head
    blocks = costs[1:-1]

    def dearest(cuts: tuple[int, ...]) -> int:
        edges = [0, *cuts, len(blocks)]
        sums = [sum(blocks[edges[i] : edges[i + 1]]) for i in range(stages)]
        sums[0] += costs[0]
        sums[-1] += costs[-1]
        return max(sums)

    split = balanced_split(costs, stages)
    assert len(split) == stages
    assert min(split) >= 1
    assert sum(split) == len(blocks)
    cuts = tuple(sum(split[: i + 1]) for i in range(stages - 1))
    assert dearest(cuts) == min(map(dearest, combinations(range(1, len(blocks)), stages - 1)))


def test_more_stages_than_blocks_are_no_split() -> None:
    with pytest.raises(ValueError, match="2 blocks given for 3 stages"):
        balanced_split([0, 1, 1, 0], 3)


@pytest.mark.parametrize("schedule", ["gpipe", "1f1b", "interleaved1f1b", "zbv"])
def test_every_stage_has_one_process(schedule: Any) -> None:
    config = DistributedConfig(pp=4, pp_schedule=schedule)
    placed = [stages_of(config, rank) for rank in range(4)]
    stages = sorted(stage for some in placed for stage in some)
    assert stages == list(range(4 if schedule in ("gpipe", "1f1b") else 8))
    assert stages[-1] in placed[rank_of_last_stage(config)]


def test_the_busiest_process_over_an_even_share() -> None:
    costs = {"vision": [2, 4, 4, 4, 4, 2], "text": [0, 1, 1, 1, 1, 0]}
    assert stage_imbalance(DistributedConfig(), costs) == 1
    even = DistributedConfig(pp=2)
    assert stage_imbalance(even, costs) == 1
    ends = DistributedConfig(pp=2, pp_schedule="zbv")  # the first has embedding and head
    assert stage_imbalance(ends, costs) == pytest.approx((12 + 2) / (10 + 2))
    # Each tower's pipeline waits for its own busiest process, though both have 12 in all.
    crossed = DistributedConfig(pp=2, pp_split={"vision": (1, 3), "text": (3, 1)})
    assert stage_imbalance(crossed, costs) == pytest.approx((14 + 3) / (10 + 2))


def test_microbatches_of_a_share() -> None:
    pipeline = DistributedConfig(pp=4)
    assert microbatch_size(DistributedConfig(), None, 64) == 64
    assert microbatch_size(pipeline, None, 64) == 8
    assert microbatch_size(pipeline, None, 12) == 1  # 12 microbatches: 8 do not divide 12
    assert microbatch_size(pipeline, None, 4) == 1
    assert microbatch_size(pipeline, 16, 64) == 16
    assert microbatch_size(DistributedConfig(pp=2, pp_schedule="interleaved1f1b"), None, 6) == 1


def test_a_decoder_of_fewer_blocks_than_stages_is_refused() -> None:
    found = list(decoder_problems(DecoderConfig(depth=3), DistributedConfig(pp=4)))
    assert found == [
        "distributed.pp: 4 makes 4 stages, but model.decoder has 3 blocks; at most pp=3 fits"
    ]
