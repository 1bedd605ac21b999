"""Training by 8-bit products: near bfloat16's, resumed to the bit, watched, and refused where it
cannot run."""

import hashlib
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from carillon.engine.config import UserError
from carillon.engine.nn import fp8_layers
from carillon.engine.parallel.config import Fp8ShadowConfig
from carillon.engine.train.fp8_shadow import Fp8Shadow
from carillon.engine.train.guard import TrainingStopped
from carillon.engine.train.run import load_run
from carillon.engine.train.run_config import load_config

Setup = Any  # conftest's
FP8 = "distributed.precision=fp8"
DELAYED = (FP8, "distributed.fp8_recipe=delayed", "distributed.fp8_history=3")


@pytest.fixture(scope="module")
def bf16(make_setup: Any) -> Setup:
    setup = make_setup()
    assert setup.train("distributed.precision=bf16", "optimization.steps=6") == 0
    return setup


@pytest.fixture(scope="module")
def delayed(make_setup: Any) -> Setup:
    """Ten steps of one process; checkpoints at 5 and 10."""
    setup = make_setup()
    assert setup.train(*DELAYED) == 0
    return setup


@pytest.mark.parametrize("recipe", ["tensorwise", "rowwise", "blockwise", "delayed"])
def test_fp8_trains_as_bf16_does(bf16: Setup, setup: Setup, recipe: str) -> None:
    """And its checkpoint is a model of plain weights like any other. A value of 4 bits is within
    1/16: its mean over a tiny model's few sums and six batches is within 5% of the loss."""
    assert setup.train(FP8, f"distributed.fp8_recipe={recipe}", "optimization.steps=6") == 0
    assert sum(setup.losses()) == pytest.approx(sum(bf16.losses()), rel=0.05)
    assert setup.losses() != bf16.losses()
    if recipe == "tensorwise":
        assert setup.losses() == pytest.approx(bf16.losses(), rel=0.05)
    assert {value.dtype for value in setup.content(6).values()} == {torch.float32}
    load_run(setup.run)


def test_a_resumed_run_has_the_history_of_the_unbroken_one(delayed: Setup, tmp_path: Path) -> None:
    resumed = delayed.killed_after(5, tmp_path / "runs")
    assert resumed.train(*DELAYED) == 0
    before, after = delayed.content(10), resumed.content(10)
    scales = {name for name in before if name.startswith("fp8.")}
    assert "fp8.text.transformer.blocks.0.mlp.fc1.forward.amaxes" in scales
    assert all((before[name] != 0).any() for name in scales)
    assert before.keys() == after.keys()
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert resumed.metrics() == delayed.metrics()


DEEP = (
    *(*DELAYED, "model.vision.depth=2", "model.text.depth=2", "data.micro_batch_size=4"),
    *("optimization.steps=4", "logging.checkpoint_interval_steps=2", "distributed.watchdog_s=0"),
)


def test_stages_go_on_with_the_history_of_one_process(
    make_setup: Any, tmp_path: Path, ranks: Any
) -> None:
    """And save it: each has the scales of all layers. From the start with half of each weight, too:
    the amaxes of a step meet there before there are scales. Stages compute the same bits as
    without them, but for the norm of all gradients, a sum in another order."""
    one, split, both = make_setup(), make_setup(), make_setup()
    assert one.train(*DEEP) == 0
    staged = one.killed_after(2, tmp_path / "runs")
    cases = {
        "pp2": (2, staged.argv(*DEEP, "distributed.pp=2")),
        "tp2": (2, split.argv(*DEEP, "distributed.tp=2")),
        "pp2 tp2": (4, both.argv(*DEEP, "distributed.pp=2", "distributed.tp=2")),
    }
    for name, result in ranks(tmp_path / "ranks", cases).items():
        assert set(result["codes"]) == {0}, (name, result)
    for whole, stages in ((one, staged), (split, both)):
        assert stages.losses() == pytest.approx(whole.losses(), rel=1e-4)
        before, after = whole.content(4), stages.content(4)
        assert after.keys() == before.keys()
        scales = [name for name in before if name.startswith("fp8.")]
        assert len(scales) == 64
        for name in scales:  # of codes that may be a rounding apart
            torch.testing.assert_close(after[name], before[name], rtol=2.0**-3, atol=0.0)
    assert all((before[name] != 0).any() for name in scales)


def test_a_run_moves_to_another_layout_with_its_history(
    delayed: Setup, tmp_path: Path, ranks: Any
) -> None:
    """Two processes with half of each weight, looked at as they go: the losses of one process but
    for roundings, and the gaps too."""
    moved = delayed.killed_after(5, tmp_path / "runs")
    settings = ("distributed.tp=2", "distributed.fp8_shadow.every=2", "distributed.watchdog_s=0")
    argv = moved.argv(*DELAYED, *settings)
    (result,) = ranks(tmp_path / "ranks", {"tp2": (2, argv)}).values()
    assert result["codes"] == [0, 0], result
    assert moved.losses() == pytest.approx(delayed.losses(), rel=0.02)
    gaps = {line["step"]: line["fp8_gap"] for line in moved.metrics() if "fp8_gap" in line}
    assert list(gaps) == [6, 8, 10]
    assert all(0 < gap < 0.05 for gap in gaps.values())


def test_the_shadow_changes_nothing_and_is_logged(delayed: Setup, setup: Setup) -> None:
    looked = ("distributed.fp8_shadow.every=3", "logging.interval_steps=5")
    assert setup.train(*DELAYED, *looked, "data.micro_batch_size=8") == 0
    gaps = {line["step"]: line["fp8_gap"] for line in setup.metrics() if "fp8_gap" in line}
    assert list(gaps) == [3, 6, 9]
    assert all(0 < gap < 0.05 for gap in gaps.values())
    one, two = delayed.content(10), setup.content(10)
    assert all(torch.equal(two[name], value) for name, value in one.items())


def test_a_run_stops_when_the_gap_stays_too_large(
    setup: Setup, capsys: pytest.CaptureFixture[str]
) -> None:
    shadow = "distributed.fp8_shadow"
    bound = (f"{shadow}.every=2", f"{shadow}.bound=0.000001", f"{shadow}.patience=2")
    assert setup.train(FP8, *bound) == 3
    error = " ".join(capsys.readouterr().err.split())
    assert "more than 1e-06 of it (distributed.fp8_shadow.bound) in 2 looks in a row" in error
    gaps = [line["fp8_gap"] for line in setup.metrics() if "fp8_gap" in line]
    assert len(setup.losses()) == 4
    assert len(gaps) == 2
    assert min(gaps) > 1e-6  # the look that ended the run is there, too


def test_looks_count_in_a_row_and_go_on_from_their_state() -> None:
    config = Fp8ShadowConfig(every=1, bound=0.1, patience=2)
    shadow = Fp8Shadow(config)
    for fp8, bf16 in ((1.2, 1.0), (1.05, 1.0), (0.8, 1.0), (3.0, math.nan)):
        shadow.judge(fp8, bf16)
        shadow.check()  # a loss that is not finite is no look
    assert shadow.judge(1.05, 1.0) == pytest.approx(0.05)
    shadow.judge(math.nan, 1.0)
    shadow.check()
    resumed = Fp8Shadow(config)
    resumed.load_state_dict(shadow.state_dict())
    resumed.judge(math.inf, 1.0)
    with pytest.raises(TrainingStopped, match="in 2 looks in a row, last by inf"):
        resumed.check()


WIDE = ("model.vision.width=96", "model.text.width=96", "model.vision.num_heads=4")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["distributed.fp8_recipe=rowwise"], "fp8_recipe: rowwise given, but precision is fp32"),
        ([FP8, "distributed.pp=2", "distributed.fp8_shadow.every=2"], "second look does not run"),
        (
            [
                *(FP8, "distributed.pp=2", "distributed.pp_schedule=zbv"),
                "distributed.fp8_provider=torchao",
            ],
            "torchao does not go with pp_schedule=zbv",
        ),
        (
            [FP8, "model.vision.width=40", "model.text.width=20"],
            r"multiples of 16, and model.vision's width \(40\) and model.text's width \(20\)",
        ),
        (["distributed.fp8_keep_blocks=1"], "fp8_keep_blocks: 1 given, but precision is fp32"),
        (["distributed.fp8_shadow.every=2"], "fp8_shadow: given, but precision is fp32"),
        ([FP8, "distributed.fp8_shadow.bound=0.5"], "bound: 0.5 given, but every is 0"),
        ([FP8, "distributed.fp8_history=4"], "fp8_history: 4 given, but fp8_recipe is tensorwise"),
        ([FP8, "distributed.fp8_keep_blocks=1"], "1 at either end leave none .* use at most 0"),
        (
            [FP8, *WIDE, "model.text.num_heads=4", "distributed.tp=4"],
            r"tp: 4 leaves a share of model.vision's width \(96\) .* use one of 1, 2, 3",
        ),
        ([*DELAYED, "distributed.compile=true"], "delayed is not compiled yet"),
        ([FP8, "distributed.tp=2", "distributed.compile=true"], "with tp=2 is not compiled yet"),
        (
            [FP8, "distributed.fp8_provider=torchao", "distributed.tp=2"],
            "torchao does not multiply shares",
        ),
        (
            [FP8, "distributed.fp8_provider=transformer_engine"],
            "transformer_engine given, and the package is not installed: pip install",
        ),
        (["distributed.deterministic=true", "distributed.compile=true"], "chosen by timing"),
    ],
)
def test_settings_that_do_nothing_or_do_not_fit(
    setup: Setup, overrides: list[str], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fp8_layers, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=message):
        load_config(setup.config, overrides)


def test_a_run_by_another_package_is_read_without_it(
    setup: Setup, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert setup.train(FP8, "optimization.steps=2") == 0
    text = (setup.run / "config.yaml").read_text()
    assert "fp8_provider: auto" in text

    (setup.run / "config.yaml").write_text(
        text.replace("fp8_provider: auto", "fp8_provider: torchao")
    )
    facts = json.loads((setup.run / "run.json").read_text())
    content = (setup.run / "config.yaml").read_bytes()
    facts["config_sha256"] = hashlib.sha256(content).hexdigest()
    (setup.run / "run.json").write_text(json.dumps(facts))
    monkeypatch.setattr(fp8_layers, "find_spec", lambda name: None)
    assert load_run(setup.run).step == 2
