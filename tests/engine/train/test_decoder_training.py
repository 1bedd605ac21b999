"""Training a decoder by the real command: what it writes, and the same run in every layout."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from carillon.engine.config import UserError
from carillon.engine.train.launch import check_layout
from carillon.engine.train.run import load_run
from carillon.engine.train.run_config import load_config

Setup = Any  # conftest's
BIAS = "model.blocks.1.mlp.router.bias"


@pytest.fixture(scope="module")
def trained(make_setup: Any) -> Setup:
    setup = make_setup(decoder=True)
    assert setup.train("optimization.ema_decay=0.5") == 0
    return setup


def test_what_a_run_of_a_decoder_writes(trained: Setup) -> None:
    lines = trained.lines("metrics.jsonl")
    steps = [line for line in lines if "loss" in line]
    assert len(steps) == 10
    vocabulary = 300
    assert steps[0]["loss"] == pytest.approx(math.log(vocabulary), rel=0.05)
    assert steps[-1]["loss"] < steps[0]["loss"] - 0.1
    for line in steps:
        # 8 rows of 64 tokens, 2 of 4 experts each.
        assert line["moe/mean_tokens_per_expert"] == 8 * 64 * 2 / 4
        assert 0 <= line["moe/min_load"] <= 1 <= line["moe/max_load"] <= 2
        assert line["moe/dropped_share"] == 0
        assert line["tokens_per_s"] <= 64 * line["rows_per_s"]
    scores = [line for line in lines if "validation/loss" in line]
    assert [line["step"] for line in scores] == [5, 10]
    assert scores[1]["validation/loss"] < scores[0]["validation/loss"] < math.log(vocabulary)
    assert scores[1]["validation/perplexity"] == math.exp(scores[1]["validation/loss"])
    assert (trained.run / "loss.png").stat().st_size > 10_000
    best = trained.checkpoints()[-1].state["metric"]
    assert best == -scores[1]["validation/loss"]


def test_a_resumed_run_repeats_the_unbroken_one(trained: Setup, tmp_path: Path) -> None:
    resumed = trained.killed_after(5, tmp_path / "resumed")
    assert resumed.train("optimization.ema_decay=0.5") == 0
    assert resumed.metrics() == trained.metrics()
    assert resumed.lines("sample_keys.jsonl") == trained.lines("sample_keys.jsonl")
    expected, found = trained.content(10), resumed.content(10)
    assert expected[BIAS].abs().max() > 0  # no parameter, and part of the state
    assert all(torch.equal(found[name], value) for name, value in expected.items())


LAYOUTS = {
    "EP2": (2, "ep=2 zero_stage=2"),
    "TP2": (2, "tp=2"),
    "CP2": (2, "cp=2"),
    "PP2": (2, "pp=2"),
    "EP2xTP2": (4, "ep=2 tp=2 zero_stage=3"),
    "PP2xCP2": (4, "pp=2 cp=2"),
}


def test_every_layout_goes_on_from_one_process(trained: Setup, tmp_path: Path, ranks: Any) -> None:
    run = ("optimization.ema_decay=0.5", "model.moe.bias_speed=0.01")
    copies = {name: trained.killed_after(5, tmp_path / name) for name in LAYOUTS}
    cases = {
        name: (size, copies[name].argv(*run, *(f"distributed.{one}" for one in given.split())))
        for name, (size, given) in LAYOUTS.items()
    }
    for name, result in ranks(tmp_path / "ranks", cases).items():
        assert set(result["codes"]) == {0}, (name, result)
    expected = trained.content(10)
    for name, copy in copies.items():
        assert copy.lines("sample_keys.jsonl") == trained.lines("sample_keys.jsonl")
        assert copy.losses() == pytest.approx(trained.losses(), rel=1e-4), name
        for line, reference in zip(copy.metrics(), trained.metrics(), strict=True):
            assert line.keys() == reference.keys(), name
            for key in ("moe/max_load", "validation/loss"):
                if key in reference:
                    assert line[key] == pytest.approx(reference[key], rel=1e-3), (name, key)
        found = copy.content(10)
        assert found.keys() == expected.keys()
        assert torch.equal(found[BIAS], expected[BIAS]), name


def test_eight_bits_and_their_shadow(make_setup: Any) -> None:
    setup = make_setup(decoder=True)
    fp8 = ("precision=fp8", "fp8_recipe=rowwise", "fp8_shadow.every=2")
    assert setup.train("optimization.steps=2", *(f"distributed.{one}" for one in fp8)) == 0
    assert 0 < setup.metrics()[1]["fp8_gap"] < 0.01


def test_steps_that_overflow_are_skipped_and_then_end_the_run(make_setup: Any) -> None:
    setup = make_setup(decoder=True)
    given = ("optimization.lr=1e38", "optimization.guard.max_skipped=2")
    assert setup.train(*given, "optimization.warmup_steps=0") == 3
    assert [line["step"] for line in setup.lines("skipped_steps.jsonl")] == [2, 3, 4]
    read = {line["step"]: line["keys"] for line in setup.lines("sample_keys.jsonl")}
    assert all(line["keys"] == read[line["step"]] for line in setup.lines("skipped_steps.jsonl"))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("model.type=decodr", r"model.type: 'decodr' .* did you mean decoder"),
        ("model.dims=8", r"model.dims: unknown key; model has context, depth"),
        ("loss.itc.kind=sigmoid", r"loss.itc: given, but a decoder does not use it"),
        ("distributed.ep=3", r"distributed.ep: 3 does not divide model.moe.num_experts \(4\)"),
        ("distributed.cp=5", r"rows of 64 tokens do not divide .* use rows of 60 or 70 .* cp=4"),
        (
            "distributed.precision=fp8 model.width=24 model.num_heads=3",
            r"model.width \(24\) is none",
        ),
        ("data.validation_every=0", r"in_training.every: a decoder is scored on held-out rows"),
        ("data.augment.text.max_len=65", r"max_len: 65 is more than model.context \(64\)"),
        ("evaluation.retrieval={a:{}}", r"evaluation.retrieval: given, but a decoder does not"),
    ],
)
def test_refused_at_load(given: str, message: str, make_setup: Any) -> None:
    with pytest.raises(UserError, match=message):
        load_config(make_setup(decoder=True).config, given.split())


def test_pairs_refuse_what_is_of_rows(setup: Setup) -> None:
    with pytest.raises(UserError, match=r"packing.window: given, but a dual encoder takes"):
        load_config(setup.config, ["data.packing.window=4"])


def test_microbatches_of_unequal_size_are_refused(make_setup: Any) -> None:
    config = load_config(make_setup(decoder=True).config, ["data.micro_batch_size=3"])
    with pytest.raises(UserError, match=r"micro_batch_size: 3 does not divide .* 8 rows.* 1, 2, 4"):
        check_layout(config, 1)


def test_a_set_too_small_to_hold_out_rows_is_refused(
    make_setup: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    setup = make_setup(decoder=True)
    assert setup.train("data.validation_every=61") == 2
    assert "validation_every: 61 holds out none of 60 rows" in capsys.readouterr().err
    assert not list(setup.output.glob("*/config.yaml"))


def test_a_decoder_embeds_nothing(trained: Setup) -> None:
    with pytest.raises(UserError, match=r"trained a decoder, which embeds nothing"):
        load_run(trained.run)
