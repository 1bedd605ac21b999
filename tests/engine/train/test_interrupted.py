"""Signals and kills of the real command: the state is saved, and the same command resumes it."""

import os
import runpy
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from carillon.engine.index.encoder import Encoder

Setup = Any  # conftest's
PROCESS_TREE = Path(__file__).parents[3] / "benchmarks" / "process_tree.py"
kill_all = runpy.run_path(str(PROCESS_TREE))["kill_all"]
Capture = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def trained(make_setup: Any) -> Setup:
    setup = make_setup()
    assert setup.train() == 0
    return setup


def wait_for(condition: Any, what: str, timeout_s: float = 120.0) -> None:
    end = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < end, f"no {what} within {timeout_s} s"
        time.sleep(0.02)


def steps_done(setup: Setup) -> int:
    files = list(setup.output.glob("*/sample_keys.jsonl"))
    return len(files[0].read_text().splitlines()) if files else 0


TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")
SLOW = ("optimization.steps=200", "logging.checkpoint_interval_steps=1000")


def check_stopped(setup: Setup, error: str) -> None:
    """Saved at the step that was reached, told once, every file at that step."""
    (step,) = setup.steps()
    assert 3 < step < 200
    assert error.count(f"stopped at step {step}, saved; the same command resumes it") == 1
    assert setup.lines("sample_keys.jsonl")[-1]["step"] == step
    assert setup.lines("metrics.jsonl")[-1]["step"] == step


def check_resumes(setup: Setup, trained: Setup) -> None:
    assert setup.train(*SLOW) == 0
    keys = setup.lines("sample_keys.jsonl")
    assert [line["step"] for line in keys] == list(range(1, 201))
    assert keys[:10] == trained.lines("sample_keys.jsonl")


def test_sigterm_saves_and_the_same_command_resumes(
    setup: Setup, trained: Setup, capsys: Capture
) -> None:
    """And while it trains, a second launch of the run is refused by its lock."""
    process = setup.start(*SLOW)
    try:
        wait_for(lambda: steps_done(setup) > 3, "step")
        assert setup.train(*SLOW) == 2
        assert "is being trained by another process" in capsys.readouterr().err
        asked = time.monotonic()
        process.send_signal(signal.SIGTERM)
        _, error = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 75
    assert time.monotonic() - asked < 30
    assert "Traceback" not in error
    check_stopped(setup, error)
    check_resumes(setup, trained)


def test_a_signal_during_an_evaluation_is_not_kept_waiting(
    setup: Setup, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The evaluation is left at its next batch of pictures, and the state saved after one step."""
    batches: list[int] = []
    encode = Encoder._forward_pictures

    def encode_then_signal(encoder: Encoder, pixels: Any) -> Any:
        batches.append(len(pixels))
        if len(batches) == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return encode(encoder, pixels)

    monkeypatch.setattr(Encoder, "_forward_pictures", encode_then_signal)
    evaluation = (
        "data.validation_every=2",
        "evaluation.batch_size=5",
        "evaluation.in_training.every=3",
    )
    assert setup.train(*evaluation) == 75
    assert batches == [5, 5]  # of 30 pictures; the second batch is not encoded any more
    assert "the evaluation at step 3 is left: a signal asked to stop" in capsys.readouterr().err
    assert setup.steps() == [4]
    assert not any("retrieval/mean_r@10" in line for line in setup.lines("metrics.jsonl"))
    monkeypatch.undo()
    assert setup.train(*evaluation) == 0


def test_sigterm_to_torchrun_saves_and_the_same_command_resumes(
    setup: Setup, trained: Setup
) -> None:
    """torchrun passes the signal on and waits 30 s for its processes, then always exits with 1 and
    a traceback of its own: a scheduler that goes by exit code 75 has to start one process per task
    itself (RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT), as srun does."""
    process = setup.start(*SLOW, launcher=TORCHRUN)
    try:
        wait_for(lambda: steps_done(setup) > 3, "step")
        asked = time.monotonic()
        process.send_signal(signal.SIGTERM)
        _, error = process.communicate(timeout=60)
    finally:
        process.kill()
    assert time.monotonic() - asked < 30
    assert process.returncode == 1
    assert error.count("Traceback") == 1  # torchrun's
    check_stopped(setup, error)
    check_resumes(setup, trained)


def test_a_killed_run_can_be_started_again_at_once(setup: Setup, trained: Setup) -> None:
    """As the kernel does when memory runs out: the loader workers live on for some seconds."""
    workers = (*SLOW, "data.num_workers=2")
    process = setup.start(*workers)
    wait_for(lambda: steps_done(setup) > 3, "step")
    process.kill()
    process.wait()
    assert setup.steps() == []
    check_resumes(setup, trained)
    process.communicate()  # returns once the workers too have ended


def test_two_killed_processes_go_on_as_one(setup: Setup, trained: Setup) -> None:
    """SIGKILL for torchrun, its ranks and their workers; benchmarks/prove_kill.py does it often."""
    often = "logging.checkpoint_interval_steps=4"
    process = setup.start(*SLOW, often, "data.num_workers=1", launcher=TORCHRUN)
    wait_for(lambda: steps_done(setup) > 9, "step")
    kill_all(process)
    process.communicate()
    for checkpoint in setup.checkpoints():
        checkpoint.verify()
    assert 0 < setup.steps()[-1] < 200
    check_resumes(setup, trained)
