"""Deterministic mode: two runs of one layout have the same bits, weights and lines."""

import os
from pathlib import Path
from typing import Any

import pytest
import torch

from carillon.engine.config import UserError
from carillon.engine.parallel.determinism import fixed_order

# Those that claim it; docs/architecture.md names them. A layout that joins the claim joins here.
LAYOUTS: dict[str, tuple[int, tuple[str, ...]]] = {
    "one process": (1, ()),
    "DP2": (2, ()),
    "FSDP2": (2, ("distributed.zero_stage=3",)),
    "TP2": (2, ("distributed.tp=2",)),
    "TP2, fp8 delayed": (
        2,
        ("distributed.tp=2", "distributed.precision=fp8", "distributed.fp8_recipe=delayed"),
    ),
    "TP2xFSDP2": (4, ("distributed.tp=2", "distributed.zero_stage=3")),
}
MODE = (
    "distributed.deterministic=true",
    "distributed.precision=bf16",
    "distributed.watchdog_s=0",  # nothing to watch for in a few steps
    "optimization.steps=3",
    "logging.checkpoint_interval_steps=3",
)


@pytest.mark.parametrize("sizes", [(1, 2), (4,)])  # one launch each
def test_two_runs_of_a_layout_have_the_same_bits(
    make_setup: Any, tmp_path: Path, ranks: Any, sizes: tuple[int, ...]
) -> None:
    layouts = {name: layout for name, layout in LAYOUTS.items() if layout[0] in sizes}
    setups = {name: (make_setup(), make_setup()) for name in layouts}
    cases = {
        f"{name}, run {run}": (size, setups[name][run].argv(*MODE, *settings))
        for run in (0, 1)  # the first runs of all, then the second ones
        for name, (size, settings) in layouts.items()
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
    assert len(layouts) == 1 or len(losses) > 2  # layouts round otherwise: they were really others


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
