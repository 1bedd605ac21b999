"""Pipelines: the step of one process, to 1e-5 in fp32, with a share of the weights each."""

import json
import subprocess
import sys
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest

from carillon.engine.parallel.mesh import DistributedConfig
from carillon.engine.parallel.parity import TOLERANCE_FP32
from carillon.engine.parallel.pipeline_split import (
    balanced_split,
    microbatch_size,
    rank_of_last_stage,
    stages_of,
)

WORKER = Path(__file__).with_name("pipeline_worker.py")


@pytest.mark.parametrize(("world_size", "num_cases"), [(2, 11), (4, 21), (8, 3)])
def test_pipelined_layouts_give_the_step_of_one_process(
    tmp_path: Path, world_size: int, num_cases: int
) -> None:
    out = tmp_path / "errors.json"
    launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={world_size}"]
    ran = subprocess.run(
        [sys.executable, *launch, str(WORKER), str(out)],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert ran.returncode == 0, ran.stderr[-4000:]
    results: list[dict[str, Any]] = json.loads(out.read_text())
    assert len(results) == num_cases
    errors = ("gradient_error", "loss_error", "norm_error")
    worse = [r for r in results if max(r[error] for error in errors) > TOLERANCE_FP32]
    assert not worse, worse
    assert max(r["gradient_error"] for r in results) > 0  # rounding differs: it was really cut
    for result in results:
        names = result["case"].split()
        split = 4 if "pp4" in names else 2 * (2 if "tp2" in names else 1)
        split *= 2 if "fsdp2" in names else 1
        assert result["share"] < 1 / split + 0.12, result


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


def test_microbatches_of_a_share() -> None:
    pipeline = DistributedConfig(pp=4)
    assert microbatch_size(DistributedConfig(), None, 64) == 64
    assert microbatch_size(pipeline, None, 64) == 8
    assert microbatch_size(pipeline, None, 12) == 1  # 12 microbatches: 8 do not divide 12
    assert microbatch_size(pipeline, None, 4) == 1
    assert microbatch_size(pipeline, 16, 64) == 16
