"""Training through a pipeline by the real command: the curve, files and refusals of one process."""

from pathlib import Path
from typing import Any

import pytest

from carillon.engine.config import UserError
from carillon.engine.train.launch import check_layout
from carillon.engine.train.run_config import load_config

Setup = Any  # conftest's
RUN = (
    "optimization.ema_decay=0.5",
    "model.vision.depth=4",
    "model.text.depth=4",
    "loss.itc.kind=sigmoid",
    "data.validation_every=5",
    "evaluation.in_training.every=5",
)
FSDP = ("distributed.zero_stage=3", "distributed.pp_schedule=interleaved1f1b")


def test_a_pipeline_trains_the_run_of_one_process(
    make_setup: Any, tmp_path: Path, ranks: Any
) -> None:
    """Whole, after one process and before it: the same keys and scores, weights to rounding."""
    one, pipeline = make_setup(), make_setup()
    assert one.train(*RUN) == 0
    after_one = one.killed_after(5, tmp_path / "after_one")
    cases = {
        "pipeline": (2, pipeline.argv(*RUN, "distributed.pp=2")),
        "after one": (4, after_one.argv(*RUN, "distributed.pp=2", *FSDP)),
    }
    for name, result in ranks(tmp_path / "ranks", cases).items():
        assert set(result["codes"]) == {0}, (name, result)
    after_pipeline = pipeline.killed_after(5, tmp_path / "after_pipeline")
    assert after_pipeline.train(*RUN) == 0
    expected = one.content(10)
    for setup in (pipeline, after_one, after_pipeline):
        assert setup.lines("sample_keys.jsonl") == one.lines("sample_keys.jsonl")
        assert setup.losses() == pytest.approx(one.losses(), rel=1e-4)
        found = setup.content(10)
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            # Adam divides by the root of small second moments, which carries rounding on.
            assert (found[name] - value).norm() <= 1e-3 * max(value.norm(), 1e-3), name
        for line, reference in zip(setup.metrics(), one.metrics(), strict=True):
            assert line.keys() == reference.keys()
            norms = [each["grad_norm"] for each in (line, reference) if "grad_norm" in each]
            assert norms == pytest.approx(norms[:1] * len(norms), rel=1e-3)


def test_a_stage_that_fails_ends_every_process(make_setup: Any, tmp_path: Path, ranks: Any) -> None:
    """The other one waits for what the failed stage would send, and must not wait for long."""
    setup = make_setup()
    argv = setup.argv(*RUN, "distributed.pp=2")
    result = ranks(tmp_path / "ranks", {"fails": (2, argv)}, fault=1)["fails"]
    assert all(result["codes"]), result
    assert "a stage fails for a test" in result["stderr"][1]
    assert setup.steps() == []


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (("pp=8",), r"distributed.pp: 8 makes 8 stages, but model.vision has 4 .* at most pp=4"),
        (
            ("pp=4", "pp_schedule=zbv"),
            r"distributed.pp: 4 makes 8 stages, .* at most pp=2 fits \(or pp_schedule=1f1b",
        ),
        (
            ("pp=2", "pp_split={vision: [1, 2]}"),
            r"pp_split.vision: \[1, 2\] given; it takes 2 numbers .* 4 blocks, such as \[2, 2\]",
        ),
        (("pp=2", "pp_split={audio: [1, 3]}"), r"pp_split.audio: no such tower; allowed: text"),
        (("pp_schedule=zbv",), r"pp_schedule: given, but pp=1 has no pipeline"),
        (("pp=2", "pp_stages_per_rank=4"), r"pp_stages_per_rank: 4 given, but pp_schedule is 1f1b"),
        (("pp=2", "pp_schedule=zbv", "compile=true"), r"compile: true does not go with .*zbv"),
    ],
)
def test_a_pipeline_that_cannot_be_cut_is_refused_at_load(
    given: tuple[str, ...], message: str, setup: Setup
) -> None:
    with pytest.raises(UserError, match=message):
        load_config(setup.config, [*RUN, *(f"distributed.{setting}" for setting in given)])


def test_microbatches_that_a_schedule_cannot_run_are_refused(setup: Setup) -> None:
    """Of 8 pairs; nothing given takes twice as many microbatches as processes, where that fits."""

    def check(*given: str, processes: int = 2) -> None:
        config = load_config(setup.config, [*RUN, "distributed.pp=2", *given])
        check_layout(config, processes)

    check()
    check("data.micro_batch_size=4")
    with pytest.raises(UserError, match=r"micro_batch_size: 8 given; .* 2 equal .* to 1, 2, 4"):
        check("data.micro_batch_size=8")
    with pytest.raises(UserError, match=r"micro_batch_size: 3 given; .* set .* to 1, 2, 4"):
        check("data.micro_batch_size=3")
    with pytest.raises(UserError, match=r"none given; of a process's 1 samples, .* no size"):
        check(processes=16)
