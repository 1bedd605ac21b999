"""A run that was stopped and resumed is the unbroken run: keys, numbers, weights, moments."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from carillon.engine.data.tokenizer import Tokenizer
from carillon.engine.train.run import load_run

EMA = "optimization.ema_decay=0.9"
Setup = Any  # conftest's


def assert_same(one: dict[str, Tensor], two: dict[str, Tensor]) -> None:
    assert one.keys() == two.keys()
    different = [name for name in one if not torch.equal(one[name], two[name])]
    assert not different, different


def assert_close(one: dict[str, Tensor], two: dict[str, Tensor]) -> None:
    """Weights after ten steps of two layouts.

    AdamW divides a gradient by its own size, so one that is zero in exact arithmetic (a key bias)
    moves by up to lr either way in any step: an entry may differ by twice the sum of the rates
    (2e-2 covers 10 steps of at most 1e-3), and nearly all agree to the rounding of the sums.
    """
    assert one.keys() == two.keys()
    names = [name for name in one if name.startswith("model.")]
    gaps = torch.cat([(one[name] - two[name]).abs().flatten() for name in names])
    assert gaps.max() < 2e-2
    assert (gaps > 1e-5).float().mean() < 0.02


@pytest.fixture(scope="module")
def unbroken(make_setup: Any) -> Setup:
    """Ten steps of one process with an average; checkpoints at 5 and 10."""
    setup = make_setup()
    assert setup.train(EMA) == 0
    return setup


def test_the_same_yaml_gives_the_same_hash_and_weights(unbroken: Setup, setup: Setup) -> None:
    assert setup.train(EMA) == 0
    assert setup.run.name == unbroken.run.name
    assert_same(setup.content(10), unbroken.content(10))
    assert setup.metrics() == unbroken.metrics()


def test_a_changed_value_gives_another_hash_and_other_weights(
    unbroken: Setup, setup: Setup
) -> None:
    assert setup.train(EMA, "experiment.seed=2") == 0
    assert setup.run.name != unbroken.run.name
    weights, before = setup.content(10), unbroken.content(10)
    assert not torch.equal(
        weights["model.text_projection.weight"], before["model.text_projection.weight"]
    )


def test_a_resumed_run_is_the_unbroken_one_bit_for_bit(unbroken: Setup, tmp_path: Path) -> None:
    resumed = unbroken.killed_after(5, tmp_path / "runs")
    with (resumed.run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 11, "loss"')  # cut by the kill
    assert resumed.train(EMA) == 0
    before, after = unbroken.content(10), resumed.content(10)
    kinds = {name.split(".")[0] for name in before}
    assert kinds == {"model", "optimizer", "average"}
    assert_same(before, after)
    assert resumed.metrics() == unbroken.metrics()
    assert resumed.lines("sample_keys.jsonl") == unbroken.lines("sample_keys.jsonl")
    assert resumed.checkpoints()[-1].state == unbroken.checkpoints()[-1].state


def test_a_run_killed_before_its_first_checkpoint_starts_over(
    unbroken: Setup, tmp_path: Path
) -> None:
    again = unbroken.killed_after(0, tmp_path / "runs")
    (again.run / "skipped_steps.jsonl").write_text('{"step": 2, "reason": "", "keys": []}\n')
    assert again.train(EMA) == 0
    assert again.lines("sample_keys.jsonl") == unbroken.lines("sample_keys.jsonl")
    assert again.lines("skipped_steps.jsonl") == []
    assert_same(unbroken.content(10), again.content(10))


def test_loader_processes_do_not_change_a_resumed_run(unbroken: Setup, tmp_path: Path) -> None:
    resumed = unbroken.killed_after(5, tmp_path / "runs")
    assert resumed.train(EMA, "data.num_workers=2") == 0
    assert_same(unbroken.content(10), resumed.content(10))


def test_a_finished_run_says_so(unbroken: Setup, capsys: pytest.CaptureFixture[str]) -> None:
    before = unbroken.checkpoints()[-1].content_hash
    assert unbroken.train(EMA) == 0
    assert "is finished; train it anew with --fresh" in capsys.readouterr().err
    assert unbroken.checkpoints()[-1].content_hash == before


def test_fresh_starts_anew_and_keeps_the_old_run(unbroken: Setup, tmp_path: Path) -> None:
    again = unbroken.killed_after(5, tmp_path / "runs")
    (again.run / "notes.txt").write_text("mine")
    assert again.train(EMA, "--fresh") == 0
    (old,) = again.output.glob("*.old")
    assert (old / "notes.txt").read_text() == "mine"
    assert (old / "checkpoints" / "step-00000005" / "manifest.json").is_file()
    assert not (again.run / "notes.txt").exists()
    assert_same(unbroken.content(10), again.content(10))


def test_processes_may_change_between_stop_and_resume(
    unbroken: Setup, make_setup: Any, tmp_path: Path, ranks: Any
) -> None:
    """One after two, two after one, sharded and split: the same keys, weights to rounding."""
    two, sharded, split = make_setup(), make_setup(), make_setup()
    after_one = unbroken.killed_after(5, tmp_path / "after_one")
    split_after_one = unbroken.killed_after(5, tmp_path / "split_after_one")
    results = ranks(
        tmp_path / "ranks",
        {
            "two": (2, two.argv(EMA)),
            "two after one": (2, after_one.argv(EMA)),
            "sharded": (2, sharded.argv(EMA, "distributed.zero_stage=3")),
            "split": (2, split.argv(EMA, "distributed.tp=2")),
            "split after one": (
                4,
                split_after_one.argv(EMA, "distributed.tp=2", "distributed.zero_stage=3"),
            ),
        },
    )
    for name, result in results.items():
        assert set(result["codes"]) == {0}, (name, result)
    after_two = two.killed_after(5, tmp_path / "after_two")
    after_sharded = sharded.killed_after(5, tmp_path / "after_sharded")
    after_split = split.killed_after(5, tmp_path / "after_split")
    for setup in (after_two, after_sharded, after_split):
        assert setup.train(EMA) == 0
    given = (two, after_one, sharded, split, split_after_one)
    for setup in (*given, after_two, after_sharded, after_split):
        assert setup.lines("sample_keys.jsonl") == unbroken.lines("sample_keys.jsonl")
        assert_close(setup.content(10), unbroken.content(10))
    # Not to the bit: a norm that clips is summed shard by shard.
    assert_close(two.content(5), sharded.content(5))
    loaded, stored = load_run(sharded.run), sharded.content(10)
    for name, weight in loaded.model.named_parameters():
        assert torch.equal(weight, stored[f"average.{name}"])


def test_another_data_set_under_a_run_is_refused(
    make_pictures: Any, make_setup: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = make_pictures(tmp_path / "pictures")
    setup = make_setup(data)
    assert setup.train("optimization.steps=2") == 0
    shutil.rmtree(data)
    make_pictures(data, first=1000)
    before = setup.content(2)
    assert setup.train("optimization.steps=2") == 2
    message = capsys.readouterr().err.splitlines()[-1]
    assert message.startswith("carillon: run ")
    assert "was trained with another data set" in message
    assert "--fresh" in message
    assert_same(setup.content(2), before)
    assert setup.train("optimization.steps=2", "--fresh") == 0


def test_another_tokenizer_under_a_run_is_refused(
    unbroken: Setup, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    again = unbroken.killed_after(5, tmp_path / "runs")
    Tokenizer.train(["another text"], vocab_size=300).save(again.run / "tokenizer.json")
    assert again.train(EMA) == 2
    assert "another tokenizer" in capsys.readouterr().err
