"""What the loop does beside stepping: options that must not change a result, and bad steps."""

import math
import multiprocessing
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from carillon.engine.eval.suite import evaluate_in_training
from carillon.engine.losses.contrastive import ContrastiveObjective
from carillon.engine.train.run import find_checkpoint, load_run
from carillon.engine.train.trainer import Trainer

Setup = Any  # conftest's


@pytest.fixture(scope="module")
def plain(make_setup: Any) -> Setup:
    setup = make_setup()
    assert setup.train() == 0
    return setup


def test_cached_gradients_train_the_same_curve(plain: Setup, setup: Setup) -> None:
    """Rounding differs (sums over parts), and ten steps carry it on: 1e-4 of losses near 2."""
    assert setup.train("data.micro_batch_size=3") == 0
    assert setup.losses() == pytest.approx(plain.losses(), rel=1e-4)
    assert setup.losses() != plain.losses()  # it was really computed in parts


def test_recompute_gives_identical_losses(plain: Setup, setup: Setup) -> None:
    assert setup.train("distributed.grad_checkpointing=true") == 0
    assert setup.metrics() == plain.metrics()


def test_bf16_trains_close_to_fp32(plain: Setup, setup: Setup) -> None:
    """bf16 keeps 8 bits: products are good to 4e-3, losses of ten steps to a few of those."""
    assert setup.train("distributed.precision=bf16") == 0
    assert setup.losses() == pytest.approx(plain.losses(), rel=0.05)
    assert setup.losses() != plain.losses()
    assert {tensor.dtype for tensor in setup.content(10).values()} == {torch.float32}


def test_sigmoid_loss_trains_its_bias(setup: Setup) -> None:
    assert setup.train("loss.itc.kind=sigmoid") == 0
    bias = setup.content(10)["model.logit_bias"]
    assert bias.shape == (1,)
    assert bias.item() != setup.content(5)["model.logit_bias"].item()
    assert setup.losses()[-1] < setup.losses()[0]


def test_smoothing_and_pairs_of_one_field_change_the_loss(plain: Setup, make_setup: Any) -> None:
    for setting in ("loss.itc.label_smoothing=0.1", "loss.itc.same_field=word"):
        setup = make_setup()
        assert setup.train(setting) == 0
        assert setup.losses()[0] != plain.losses()[0]
        assert setup.losses()[0] == pytest.approx(plain.losses()[0], rel=0.2)


def test_two_processes_around_a_ring_train_the_curve_of_one(
    make_setup: Any, tmp_path: Path, ranks: Any
) -> None:
    """Ids and smoothed targets too, in parts; rounding as above. Two of its steps are profiled."""
    one, two = make_setup(), make_setup()
    asked = ("loss.itc.same_field=word", "loss.itc.label_smoothing=0.1")
    assert one.train(*asked) == 0
    ring = (*asked, "loss.itc.exchange=ring", "data.micro_batch_size=3")
    ring += ("logging.communication_interval_steps=4",)
    (result,) = ranks(tmp_path / "ranks", {"two": (2, two.argv(*ring))}).values()
    assert result["codes"] == [0, 0], result
    assert two.losses() == pytest.approx(one.losses(), rel=1e-4)
    assert two.losses() != one.losses()
    lines = two.lines("metrics.jsonl")
    assert [line["step"] for line in lines if "communication_share" in line] == [4, 8]
    names = ("data_share", "communication_share", "compute_share")
    for line in (lines[3], lines[7], one.lines("metrics.jsonl")[0]):
        assert sum(line[name] for name in names) == pytest.approx(1)
    assert all(0 < lines[step][name] < 1 for step in (3, 7) for name in names[1:])
    assert all(1 <= line["imbalance"] < 2 for line in lines)
    assert any(line["imbalance"] > 1 for line in lines)
    assert {line["imbalance"] for line in one.lines("metrics.jsonl")} == {1}
    # Of the same batch: what is counted by lengths is the same for any number of processes.
    for line, other in zip(lines, one.lines("metrics.jsonl"), strict=True):
        per_image = line["tokens_per_s"] / line["images_per_s"]
        assert per_image == pytest.approx(other["tokens_per_s"] / other["images_per_s"])
        work = 2 * line["tflops"] / line["images_per_s"]
        assert work == pytest.approx(other["tflops"] / other["images_per_s"])


def test_a_field_that_no_sample_has_is_refused(
    setup: Setup, capsys: pytest.CaptureFixture[str]
) -> None:
    assert setup.train("loss.itc.same_field=wrod") == 2
    error = " ".join(capsys.readouterr().err.split())
    assert "loss.itc.same_field: none of 60 samples has 'wrod'; they have" in error
    assert "word" in error
    assert not setup.output.exists()


def test_training_learns_the_set(setup: Setup) -> None:
    """Sixty pictures by heart: chance is log 8 = 2.08 a batch."""
    easy = ("data.filters.lang_allow=[en]", "data.augment.image.min_scale=0.9")
    assert setup.train("optimization.steps=150", "optimization.lr=0.002", *easy) == 0
    last = setup.losses()[-10:]
    assert sum(last) / 10 < 0.5 * math.log(8)


def test_the_average_is_kept_evaluated_and_loaded(setup: Setup) -> None:
    assert setup.train("optimization.ema_decay=0.5") == 0
    tensors = setup.content(10)
    name = "text_projection.weight"
    assert not torch.equal(tensors[f"average.{name}"], tensors[f"model.{name}"])
    loaded = load_run(setup.run)
    assert torch.equal(dict(loaded.model.named_parameters())[name], tensors[f"average.{name}"])


def test_the_average_is_the_sum_it_should_be(setup: Setup, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Tensor] = []
    step = Trainer._train_step

    def watch(self: Trainer, batch: Any) -> Any:
        weight = self.model.text_projection.weight
        if not seen:
            seen.append(weight.detach().clone())
        result = step(self, batch)
        seen.append(weight.detach().clone())
        return result

    monkeypatch.setattr(Trainer, "_train_step", watch)
    assert setup.train("optimization.ema_decay=0.75", "optimization.steps=5") == 0
    expected = seen[0]
    for weight in seen[1:]:
        expected = 0.75 * expected + 0.25 * weight
    kept = setup.content(5)["average.text_projection.weight"]
    # One fp32 rounding per step of entries around 0.1.
    torch.testing.assert_close(kept, expected, rtol=1e-5, atol=1e-7)


def test_evaluation_in_training_writes_metrics_and_keeps_the_best(
    setup: Setup, monkeypatch: pytest.MonkeyPatch
) -> None:
    scores = iter([0.9, 0.1, 0.5, 0.4])

    def scored(*args: Any, **options: Any) -> dict[str, float]:
        metrics = dict(evaluate_in_training(*args, **options))
        assert 0 <= metrics["retrieval/mean_r@10"] <= 1
        return metrics | {"retrieval/mean_r@10": next(scores)}

    monkeypatch.setattr("carillon.engine.train.dual_encoder_task.evaluate_in_training", scored)
    assert (
        setup.train(
            "data.validation_every=5",
            "optimization.steps=8",
            "evaluation.in_training.every=2",
            "logging.checkpoint_interval_steps=2",
            "logging.keep_last=1",
            "logging.keep_best=2",
        )
        == 0
    )
    assert setup.steps() == [2, 6, 8]
    by_step = {line["step"]: line for line in setup.lines("metrics.jsonl") if "loss" not in line}
    assert sorted(by_step) == [2, 4, 6, 8]
    assert any(name.startswith("retrieval/") for name in by_step[2])
    assert [c.state["metric"] for c in setup.checkpoints()] == [0.9, 0.5, 0.4]
    assert find_checkpoint(setup.run, "best").step == 2


def test_a_metric_belongs_to_the_step_that_was_evaluated(setup: Setup) -> None:
    assert (
        setup.train(
            "data.validation_every=5",
            "optimization.steps=7",
            "evaluation.in_training.every=3",
            "logging.checkpoint_interval_steps=2",
        )
        == 0
    )
    metrics = {c.step: c.state["metric"] for c in setup.checkpoints()}
    assert {step for step, metric in metrics.items() if metric is not None} == {6, 7}


def test_compiled_blocks_train_close_to_plain_ones(
    plain: Setup, setup: Setup, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Traced, differentiated and guarded as in use; only the C++ of the last stage, which takes
    most of a minute to build, is left out."""
    compile_module, compiled = torch.nn.Module.compile, []

    def traced(self: torch.nn.Module, **options: Any) -> None:
        compiled.append(self)
        compile_module(self, backend="aot_eager", **options)

    monkeypatch.setattr(torch.nn.Module, "compile", traced)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's own, from its compiler
        assert setup.train("distributed.compile=true") == 0
    assert len(compiled) == 2  # one block in each tower
    assert setup.losses() == pytest.approx(plain.losses(), rel=1e-3)


def test_pictures_without_an_allowed_caption_are_passed_over_and_counted(
    make_setup: Any, make_pictures: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    setup = make_setup(make_pictures(tmp_path / "pictures", only_german=frozenset(range(54))))
    assert setup.train("data.filters.lang_allow=[en]", "data.max_bad_share=0") == 0
    assert "bad sample" not in capsys.readouterr().err
    keys = {key for line in setup.lines("sample_keys.jsonl") for key in line["keys"]}
    assert keys == {f"picture{i:03d}" for i in range(54, 60)}
    last = setup.lines("metrics.jsonl")[-1]
    assert last["bad_samples"] == 0
    assert last["filtered_samples"] > 200  # 9 for each of 80 samples
    state = setup.checkpoints()[-1].state["loader"]
    assert state["num_filtered"] == last["filtered_samples"]


# Bad steps


def poison(monkeypatch: pytest.MonkeyPatch, calls: set[int], value: float = math.nan) -> None:
    """Multiply the loss by `value` at the given calls (from 0)."""
    counted: list[int] = []
    real = ContrastiveObjective.__call__

    def poisoned(self: ContrastiveObjective, *args: Any) -> Tensor:
        counted.append(1)
        factor = value if len(counted) - 1 in calls else 1.0
        return real(self, *args) * factor

    monkeypatch.setattr(ContrastiveObjective, "__call__", poisoned)


def test_a_nan_loss_skips_its_step_and_names_the_keys(
    setup: Setup, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    poison(monkeypatch, {3, 4})
    assert setup.train("logging.checkpoint_interval_steps=1") == 0
    skipped = setup.lines("skipped_steps.jsonl")
    assert [(line["step"], line["reason"]) for line in skipped] == [
        (4, "loss is nan"),
        (5, "loss is nan"),
    ]
    keys = {line["step"]: line["keys"] for line in setup.lines("sample_keys.jsonl")}
    assert [line["keys"] for line in skipped] == [keys[4], keys[5]]
    error = capsys.readouterr().err
    assert f"step 4 skipped: loss is nan; its samples: {', '.join(keys[4])}" in error
    assert not {4, 5} & set(setup.steps())  # nothing is saved while steps are skipped
    before, after = setup.content(3), setup.content(6)
    name = "text_projection.weight"
    updates = after[f"optimizer.{name}.step"] - before[f"optimizer.{name}.step"]
    assert updates == 1  # of steps 4, 5 and 6 only the last changed anything
    assert not torch.equal(before[f"model.{name}"], after[f"model.{name}"])
    assert all(tensor.isfinite().all() for tensor in setup.content(10).values())
    assert [line["skipped"] for line in setup.lines("metrics.jsonl")][2:6] == [0, 1, 1, 0]


def test_too_many_bad_steps_stop_with_3_and_a_good_checkpoint(
    setup: Setup, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    poison(monkeypatch, set(range(6, 100)))
    limit = "optimization.guard.max_skipped=2"
    assert setup.train(limit) == 3
    error = capsys.readouterr().err
    assert error.count("stopped:") == 1
    assert "3 steps in a row were skipped (optimization.guard.max_skipped=2)" in error
    assert "Traceback" not in error
    assert setup.steps() == [5]
    assert all(tensor.isfinite().all() for tensor in setup.content(5).values())
    monkeypatch.undo()
    assert setup.train(limit) == 0
    assert setup.lines("skipped_steps.jsonl") == []  # made again, and good this time


def test_a_save_in_flight_is_finished_when_the_guard_gives_up(
    setup: Setup, monkeypatch: pytest.MonkeyPatch
) -> None:
    poison(monkeypatch, set(range(1, 100)))
    limit = ("optimization.guard.max_skipped=1", "logging.checkpoint_interval_steps=1")
    assert setup.train(*limit) == 3
    assert setup.steps() == [1]  # not of step 2, which was skipped
    assert not list(setup.run.glob("checkpoints/*.tmp"))


def test_a_flipped_gradient_bit_skips_its_step(
    setup: Setup, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The highest bit of the exponent of one entry: 2^128 times as large."""
    clip, calls = Trainer._clip, []

    def flipped(self: Trainer) -> float:
        calls.append(1)
        if len(calls) == 24:
            grad = self.model.text_projection.weight.grad
            assert grad is not None
            bits = grad.view(torch.int32)
            bits[0, 0] ^= 1 << 30
        return clip(self)

    monkeypatch.setattr(Trainer, "_clip", flipped)
    steps = ("optimization.steps=26", "logging.checkpoint_interval_steps=1")
    assert setup.train(*steps) == 0
    (skipped,) = setup.lines("skipped_steps.jsonl")
    assert skipped["step"] == 24
    assert "gradient norm" in skipped["reason"]
    assert 24 not in setup.steps()
    before, after = setup.content(23), setup.content(25)
    step = "optimizer.text_projection.weight.step"
    assert after[step] - before[step] == 1  # step 24 changed nothing


def test_an_unforeseen_error_leaves_no_worker_behind(
    setup: Setup, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A worker that outlived it would never hear of the process's exit, and would hang it."""

    def fail(*args: Any, **kwargs: Any) -> Tensor:
        assert len(multiprocessing.active_children()) == 1
        raise RuntimeError("unforeseen")

    monkeypatch.setattr("carillon.engine.train.dual_encoder_task.forward_backward", fail)
    with pytest.raises(RuntimeError, match="unforeseen") as caught:
        setup.train("data.num_workers=1")
    assert caught.tb is not None  # its frames are alive, as at the end of a crashed process
    assert multiprocessing.active_children() == []
