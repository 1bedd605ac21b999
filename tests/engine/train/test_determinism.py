"""Deterministic mode: two runs of one layout have the same bits, weights and lines."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from carillon.engine.config import UserError
from carillon.engine.parallel.determinism import fixed_order

# Those that claim it: processes, blocks of each tower, and what `distributed` sets;
# docs/architecture.md names them. A layout that joins the claim joins here. Two summands have one
# sum in either order, so some layouts have sums of four.
LAYOUTS: dict[str, tuple[int, int, tuple[str, ...]]] = {
    "one process": (1, 1, ()),
    "DP2": (2, 1, ()),
    "TP2": (2, 1, ("tp=2",)),
    "TP2+SP": (2, 2, ("tp=2", "sequence_parallel=true")),
    "TP2, fp8 delayed": (2, 1, ("tp=2", "precision=fp8", "fp8_recipe=delayed")),
    "PP2": (2, 2, ("pp=2",)),
    "PP2, zero bubble": (2, 4, ("pp=2", "pp_schedule=interleaved_zero_bubble")),
    "FSDP4": (4, 1, ("zero_stage=3",)),
    "HSDP2x2": (4, 1, ("zero_stage=3", "dp_replicate=2", "dp_shard=2")),
    "TP2xFSDP2": (4, 1, ("tp=2", "zero_stage=3")),
    "PP2xFSDP2": (4, 2, ("pp=2", "zero_stage=3")),
    "PP2xTP2": (4, 2, ("pp=2", "tp=2")),
}
DECODER_LAYOUTS: dict[str, tuple[int, tuple[str, ...]]] = {
    "decoder, EP2": (2, ("ep=2", "zero_stage=3")),
    "decoder, CP2": (2, ("cp=2",)),
}
MODE = (
    "distributed.deterministic=true",
    "distributed.precision=bf16",
    "distributed.watchdog_s=0",  # nothing to watch for in a few steps
    "optimization.steps=3",
    "logging.checkpoint_interval_steps=3",
)


def given(*distributed: str, depth: int | None = None) -> list[str]:
    """Settings of the command; `depth` is that of both towers of a dual encoder."""
    towers = () if depth is None else ("vision", "text")
    depths = [f"model.{tower}.depth={depth}" for tower in towers]
    return [*MODE, *depths, *(f"distributed.{setting}" for setting in distributed)]


@pytest.mark.parametrize("sizes", [(1, 2), (4,)])  # one launch each
def test_two_runs_of_a_layout_have_the_same_bits(
    make_setup: Any, tmp_path: Path, ranks: Any, sizes: tuple[int, ...]
) -> None:
    layouts = {
        name: (size, False, given(*distributed, depth=depth))
        for name, (size, depth, distributed) in LAYOUTS.items()
        if size in sizes
    }
    layouts |= {
        name: (size, True, given(*distributed))
        for name, (size, distributed) in DECODER_LAYOUTS.items()
        if size in sizes
    }
    setups = {
        name: [make_setup(decoder=is_decoder) for _ in range(2)]
        for name, (_, is_decoder, _) in layouts.items()
    }
    cases = {
        f"{name}, run {run}": (size, setups[name][run].argv(*settings))
        for run in (0, 1)  # the first runs of all, then the second ones
        for name, (size, _, settings) in layouts.items()
    }
    for case, result in ranks(tmp_path / "ranks", cases).items():
        assert set(result["codes"]) == {0}, (case, result)
    losses = set()
    for name, (first, second) in setups.items():
        assert len(first.losses()) == 3
        assert first.metrics() == second.metrics(), name
        one, two = first.content(3), second.content(3)
        assert one.keys() == two.keys()
        different = [tensor for tensor in one if not torch.equal(one[tensor], two[tensor])]
        assert not different, (name, different)
        losses.add(tuple(first.losses()))
    assert len(losses) > len(layouts) // 2  # layouts round otherwise: they were really others


def test_two_steps_of_a_decoder_have_the_same_bits(tmp_path: Path) -> None:
    """Loss and gradients, where experts or rows are split."""
    worker, out = Path(__file__).with_name("repeated_step_worker.py"), tmp_path / "results.json"
    ran = subprocess.run(
        [sys.executable, str(worker), str(out)],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert ran.returncode == 0, ran.stderr[-4000:]
    first, second = json.loads(out.read_text())
    assert len(first) == 18
    assert first == second
    # Layouts round otherwise: they were really others.
    assert len({tuple(step.values()) for step in first.values()}) == len(first)


def test_the_mode_ends_with_the_run() -> None:
    with fixed_order(True):
        assert torch.are_deterministic_algorithms_enabled()
        assert torch.backends.cudnn.deterministic
        assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
        with pytest.raises(RuntimeError, match="deterministic"):
            torch.zeros(2).put_(torch.tensor([0]), torch.tensor([1.0]), accumulate=False)
    assert not torch.are_deterministic_algorithms_enabled()
    with fixed_order(False):
        assert not torch.are_deterministic_algorithms_enabled()


def test_what_the_environment_forbids_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":0:0")
    with pytest.raises(UserError, match=r"CUBLAS_WORKSPACE_CONFIG=:0:0 is set"), fixed_order(True):
        pass
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":16:8")
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    with pytest.raises(UserError, match="CUDA has already started"), fixed_order(True):
        pass
