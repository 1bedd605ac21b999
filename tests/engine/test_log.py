import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from carillon.engine.config import UserError, build
from carillon.engine.log import (
    JsonlSink,
    LoggingConfig,
    Progress,
    configure_logging,
    cut_jsonl,
    logger,
    open_sinks,
)

SHOWN = {"loss": 1.5, "lr": 1e-3, "images_per_s": 12.0, "mfu": 0.1}


def steps(path: Path) -> list[int]:
    return [json.loads(line)["step"] for line in path.read_text().splitlines()]


def test_lines_are_readable_as_soon_as_they_are_written(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    sink = JsonlSink(path, 0)
    sink.write(1, {"loss": 2.5})
    assert json.loads(path.read_text()) == {"step": 1, "loss": 2.5}
    sink.close()


@pytest.mark.parametrize(
    "torn", ['{"step": 4', '{"step": 4, "loss": {}', "\x00\x00\x00", '{"step"']
)
def test_a_resumed_file_is_cut_to_its_step_and_to_whole_lines(tmp_path: Path, torn: str) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(f'{{"step": {step}}}\n' for step in (1, 2, 3)) + torn)
    JsonlSink(path, 2).close()
    assert steps(path) == [1, 2]
    JsonlSink(path, 100).close()
    assert steps(path) == [1, 2]
    assert [p.name for p in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_damage_within_a_file_does_not_stop_a_resume(tmp_path: Path) -> None:
    """A power cut can leave a block of zeros, also before the last line."""
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n\x00\x00\xff{"st}\n{"other": 2}\n[1]}\n{"step": 3}\n')
    cut_jsonl(path, 5)
    assert steps(path) == [1, 3]


def test_cutting_a_file_that_is_not_there_makes_none(tmp_path: Path) -> None:
    cut_jsonl(tmp_path / "metrics.jsonl", 5)
    assert not list(tmp_path.iterdir())


def test_tensorboard_holds_what_was_written(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    config = build(LoggingConfig, {})
    first, *_ = runs = [open_sinks(config, tmp_path, start, {}) for start in (0, 2)]
    for step in (1, 2, 3):
        for sink in first:
            sink.write(step, {"loss": 10.0 + step})
    for sink in runs[1]:
        sink.write(3, {"loss": 99.0})
    for sinks in runs:
        for sink in sinks:
            sink.close()
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(e.step, e.value) for e in events.Scalars("loss")][-1] == (3, 99.0)


@pytest.mark.parametrize(
    ("values", "name"),
    [({"wandb": {"project": "p"}}, "wandb"), ({"mlflow": {"experiment": "e"}}, "mlflow")],
)
def test_a_sink_that_is_missing_is_refused_at_the_start(
    values: dict[str, Any], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setattr("importlib.util.find_spec", lambda *_: None)
    with pytest.raises(UserError, match=f"{name}: it is not installed; pip install {name}"):
        build(LoggingConfig, values)


def test_wandb_gets_the_run_under_its_own_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against a stand-in with the calls of wandb 0.2x that are used."""
    calls: list[Any] = []
    run = SimpleNamespace(
        log=lambda values, step: calls.append((step, values)), finish=lambda: calls.append("end")
    )
    wandb = SimpleNamespace(init=lambda **options: calls.append(options) or run)
    monkeypatch.setitem(sys.modules, "wandb", wandb)  # type: ignore[arg-type]
    monkeypatch.setattr("importlib.util.find_spec", lambda *_: object())
    config = build(LoggingConfig, {"wandb": {"project": "p", "tags": ["a"]}, "tensorboard": False})
    sinks = open_sinks(config, tmp_path, 0, {"lr": 1})
    for sink in sinks:
        sink.write(4, {"loss": 2.0})
        sink.close()
    options = calls[0]
    assert (options["project"], options["tags"]) == ("p", ["a"])
    assert options["id"] == options["name"] == tmp_path.name
    assert calls[1:] == [(4, {"loss": 2.0}), "end"]


def test_mlflow_goes_on_in_the_run_that_it_began(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against a stand-in with the calls of mlflow 2 and 3 that are used."""
    runs: dict[str, list[Any]] = {}

    def start_run(run_id: str | None, run_name: str | None) -> SimpleNamespace:
        assert (run_id is None) == (run_name == tmp_path.name)
        if run_id is None:
            runs[run_id := f"id{len(runs)}"] = []
        elif run_id not in runs:
            raise LookupError(f"Run with id={run_id} not found")
        mlflow.current = runs[run_id]
        return SimpleNamespace(info=SimpleNamespace(run_id=run_id))

    mlflow = SimpleNamespace(
        set_experiment=lambda name: None,
        start_run=start_run,
        log_metrics=lambda values, step: mlflow.current.append((step, values)),
        end_run=lambda: None,
        exceptions=SimpleNamespace(MlflowException=LookupError),
    )
    monkeypatch.setitem(sys.modules, "mlflow", mlflow)  # type: ignore[arg-type]
    monkeypatch.setattr("importlib.util.find_spec", lambda *_: object())
    config = build(LoggingConfig, {"mlflow": {"experiment": "e"}, "tensorboard": False})
    for step in (1, 2):
        for sink in open_sinks(config, tmp_path, step - 1, {}):
            sink.write(step, {"loss": 2.0})
            sink.close()
    assert runs == {"id0": [(1, {"loss": 2.0}), (2, {"loss": 2.0})]}
    runs.clear()
    with pytest.raises(UserError, match=r"id=id0 not found.* remove .*mlflow_run_id"):
        open_sinks(config, tmp_path, 2, {})


def test_messages_of_other_ranks_are_warnings_with_their_rank(
    capsys: pytest.CaptureFixture[str],
) -> None:
    for rank in (0, 1):
        configure_logging(rank)
        logger.info("information")
        logger.warning("careful")
    assert capsys.readouterr().err == "information\ncareful\n[rank 1] careful\n"


def test_progress_without_a_terminal_is_a_line_per_update(
    capsys: pytest.CaptureFixture[str],
) -> None:
    configure_logging(0)
    progress = Progress(100, 0)
    progress.update(10, None, 90.0)
    progress.update(20, SHOWN, 120.0)
    progress.close()
    assert capsys.readouterr().err == (
        "step 20/100  loss 1.5000  lr 1.00e-03  12 images/s  MFU 10.0%  left 2.0 min\n"
    )
