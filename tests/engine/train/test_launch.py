"""Faults through the real command: one message, the right exit code, nothing half-written."""

import hashlib
import importlib.util
import json
import os
import resource
import runpy
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from carillon.engine.cli import main
from carillon.engine.config import UserError
from carillon.engine.train.guard import StepGuard
from carillon.engine.train.launch import check_layout
from carillon.engine.train.run import load_run
from carillon.engine.train.run_config import load_config

Setup = Any  # conftest's
PROCESS_TREE = Path(__file__).parents[3] / "benchmarks" / "process_tree.py"
kill_all = runpy.run_path(str(PROCESS_TREE))["kill_all"]
Capture = pytest.CaptureFixture[str]


def complaint(capsys: Capture) -> str:
    """The one message of a refused command."""
    error = capsys.readouterr().err
    assert error.count("carillon: ") == 1, error
    assert "Traceback" not in error
    return error[error.index("carillon: ") :]


# Configs and layouts


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("dta: {path: x}", "dta: unknown key; did you mean data?"),
        ("data: {path: x, batch_size: many}", "data.batch_size: expected a whole number, got"),
        ("data: [x]", "data: expected a section (key: value), got"),
        ("data: {path: x, batch_size: 1}", "data.batch_size: 1 (int) given, at least 2 is allowed"),
        ("data: {path: *x}", "line 1"),
        ("optimization: {steps: 1}", "data.path: give either path or shards"),
    ],
)
def test_a_config_that_cannot_be_used(
    text: str, message: str, setup: Setup, capsys: Capture
) -> None:
    setup.config.write_text(text)
    assert setup.train() == 2
    assert message in complaint(capsys)
    assert not setup.output.exists()


def test_a_config_that_is_not_there(setup: Setup, capsys: Capture) -> None:
    setup.config.unlink()
    assert setup.train() == 2
    assert "tiny.yaml cannot be read: No such file or directory" in complaint(capsys)


def test_a_batch_that_the_processes_do_not_divide(setup: Setup) -> None:
    config = load_config(setup.config, [])
    check_layout(config, 4)
    with pytest.raises(
        UserError, match=r"batch_size: 8 do not .* over 3 .* use 1, 2, 4 .* 6 or 9$"
    ):
        check_layout(config, 3)
    with pytest.raises(UserError, match=r"dp_shard: 2 given, but zero_stage=0 shards nothing"):
        load_config(setup.config, ["distributed.dp_shard=2"])
    odd = load_config(setup.config, ["distributed.dp_shard=2", "distributed.zero_stage=3"])
    with pytest.raises(UserError, match=r"dp_shard: 2 does not divide 3 .* use 1 or 3"):
        check_layout(odd, 3)


def test_a_tensor_parallel_degree_that_does_not_divide(setup: Setup) -> None:
    """2 heads in 4 shares: refused with the degrees that fit, before anything starts."""
    with pytest.raises(UserError, match=r"tp: 4 does not divide model.vision's num_heads \(2\)"):
        load_config(setup.config, ["distributed.tp=4"])
    config = load_config(setup.config, ["distributed.tp=2"])
    check_layout(config, 4)
    with pytest.raises(UserError, match=r"3 processes do not divide by pp x cp x tp = 2"):
        check_layout(config, 3)


def test_a_fault_is_one_message_from_several_processes(
    setup: Setup, tmp_path: Path, ranks: Any
) -> None:
    """A batch that does not divide, a missing set, weights that overflow: no rank is left waiting,
    and the main one alone tells."""
    missing = setup.argv(f"data.path={tmp_path / 'nowhere'}")
    overflow = setup.argv("optimization.lr=1e30", "optimization.guard.max_skipped=2")
    cases = {"divide": (3, setup.argv()), "missing": (2, missing), "overflow": (2, overflow)}
    results = ranks(tmp_path / "ranks", cases)
    for name, codes in (("divide", [2, 2, 2]), ("missing", [2, 2]), ("overflow", [3, 3])):
        assert results[name]["codes"] == codes, results[name]
        error = "".join(results[name]["stderr"])
        assert error.count("carillon: ") + error.count("stopped: ") == 1, error
        assert "Traceback" not in error
    skipped, keys = setup.lines("skipped_steps.jsonl"), setup.lines("sample_keys.jsonl")
    assert len(skipped) == 3
    assert [line["keys"] for line in skipped] == [line["keys"] for line in keys[-3:]]
    assert {len(line["keys"]) for line in skipped} == {8}  # of both ranks


@pytest.mark.parametrize("name", ["wandb", "mlflow"])
def test_a_sink_that_is_not_installed(
    name: str, setup: Setup, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda n, *rest: None if n == name else find(n, *rest)
    )
    key = {"wandb": "project", "mlflow": "experiment"}[name]
    assert setup.train(f"logging.{name}.{key}=demo") == 2
    message = complaint(capsys)
    assert f"logging.{name}: it is not installed; pip install {name}, or set" in message
    assert not setup.output.exists()


# Data


def test_a_data_folder_that_is_not_there(setup: Setup, tmp_path: Path, capsys: Capture) -> None:
    assert setup.train(f"data.path={tmp_path / 'nowhere'}") == 2
    assert str(tmp_path / "nowhere") in complaint(capsys)


def test_a_truncated_shard(
    make_setup: Any, make_pictures: Any, tmp_path: Path, capsys: Any
) -> None:
    data = make_pictures(tmp_path / "pictures")
    (shard,) = data.glob("*.tar")
    os.truncate(shard, shard.stat().st_size // 2)
    assert make_setup(data).train() == 2
    assert shard.name in complaint(capsys)


def test_a_truncated_plain_tar(
    setup: Setup, make_pictures: Any, tmp_path: Path, capsys: Any, monkeypatch: Any
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    data = make_pictures(tmp_path / "pictures")
    (shard,) = data.glob("*.tar")
    plain = tmp_path / "plain.tar"
    plain.write_bytes(shard.read_bytes()[: shard.stat().st_size // 2])
    assert setup.train(f"data.path={plain}") == 2
    assert "plain.tar" in complaint(capsys)


def test_corrupt_pictures_within_the_share_are_named_and_replaced(
    make_setup: Any, make_pictures: Any, tmp_path: Path, capsys: Capture
) -> None:
    setup = make_setup(make_pictures(tmp_path / "pictures", bad=frozenset({7, 30})))
    assert setup.train("data.max_bad_share=0.2") == 0
    error = capsys.readouterr().err
    assert "bad sample picture007 replaced: " in error
    assert "bad sample picture030 replaced: " in error
    keys = {key for line in setup.lines("sample_keys.jsonl") for key in line["keys"]}
    assert not keys & {"picture007", "picture030"}
    assert setup.lines("metrics.jsonl")[-1]["bad_samples"] == 2


def test_corrupt_pictures_past_the_share_stop_the_run(
    make_setup: Any, make_pictures: Any, tmp_path: Path, capsys: Capture
) -> None:
    setup = make_setup(make_pictures(tmp_path / "pictures", bad=frozenset(range(0, 60, 5))))
    assert setup.train("optimization.steps=60", "data.max_bad_share=0.1") == 2
    message = complaint(capsys)
    assert "samples read are bad, more than data.max_bad_share=0.1" in message
    assert setup.steps()[-1] == 20  # judged from 200 reads on, in step 25
    load_run(setup.run)


def test_a_fault_that_only_another_rank_meets_is_told(
    make_setup: Any, make_pictures: Any, tmp_path: Path, ranks: Any
) -> None:
    """One shard of many is damaged; the first to read from it is not the main rank."""
    data = make_pictures(tmp_path / "pictures", max_shard_bytes=1)
    whole = make_setup(data)
    assert whole.train() == 0
    key = whole.lines("sample_keys.jsonl")[0]["keys"][-1]
    index = data / f"train-{int(key.removeprefix('picture')):06d}.index.npy"
    index.write_bytes(index.read_bytes()[:-1] + b"x")
    setup = whole.killed_after(0, tmp_path / "runs")  # keeps the tokenizer, made from all shards
    result = ranks(tmp_path / "ranks", {"one": (2, setup.argv())})["one"]
    assert result["codes"][1] == 2
    assert result["codes"][0] != 0
    assert result["stderr"][1].count(f"[rank 1] the index {index}") == 1, result["stderr"]
    assert setup.steps() == []


# The run folder and its checkpoints


@pytest.fixture(scope="module")
def trained(make_setup: Any) -> Setup:
    setup = make_setup()
    assert setup.train() == 0
    return setup


def test_a_damaged_checkpoint_is_named_with_the_way_out(
    trained: Setup, tmp_path: Path, capsys: Capture
) -> None:
    setup = trained.killed_after(5, tmp_path / "runs")
    (checkpoint,) = setup.checkpoints()
    file = checkpoint.path / "__0_0.distcp"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    assert setup.train() == 2
    message = complaint(capsys)
    assert f"checkpoint {checkpoint.path} is damaged: __0_0.distcp is not what was" in message
    assert "Move that folder away" in message
    checkpoint.path.rename(tmp_path / "moved")
    assert setup.train() == 0
    assert setup.lines("sample_keys.jsonl") == trained.lines("sample_keys.jsonl")


def test_a_checkpoint_of_another_model_is_refused(
    trained: Setup, make_setup: Any, tmp_path: Path, capsys: Capture
) -> None:
    other = make_setup()
    assert other.train("model.vision.depth=2") == 0
    setup = trained.killed_after(0, tmp_path / "runs")
    other.checkpoints()[-1].path.rename(setup.run / "checkpoints" / "step-00000007")
    assert setup.train() == 2
    assert "is of another model: tensors" in complaint(capsys)


def test_a_checkpoint_of_other_settings_is_refused(
    trained: Setup, make_setup: Any, tmp_path: Path, capsys: Capture
) -> None:
    """The shapes fit, so only the config's hash tells."""
    other = make_setup()
    assert other.train("optimization.lr=0.5") == 0
    setup = trained.killed_after(0, tmp_path / "runs")
    other.checkpoints()[-1].path.rename(setup.run / "checkpoints" / "step-00000007")
    assert setup.train() == 2
    assert "is of a run with other settings" in complaint(capsys)


def test_a_checkpoint_from_elsewhere_is_refused(
    trained: Setup, tmp_path: Path, capsys: Capture
) -> None:
    """Its tensors fit; that it is no state of a training is said, not found by a missing key."""
    setup = trained.killed_after(5, tmp_path / "runs")
    (checkpoint,) = setup.checkpoints()
    (checkpoint.path / "state.json").write_text('{"step": 5}')
    name, manifest = "state.json", checkpoint.path / "manifest.json"
    listed = json.loads(manifest.read_text())
    content = (checkpoint.path / name).read_bytes()
    digest = hashlib.sha256(content).hexdigest()
    listed["files"][name] = {"sha256": digest, "size_bytes": len(content)}
    manifest.write_text(json.dumps(listed))
    assert setup.train() == 2
    assert "no state of a training (best, config_hash" in complaint(capsys)


@pytest.mark.parametrize("name", ["config.yaml", "tokenizer.json"])
def test_a_file_of_a_run_that_changed_is_named(name: str, trained: Setup, tmp_path: Path) -> None:
    setup = trained.killed_after(10, tmp_path / "runs")
    load_run(setup.run)
    file = setup.run / name
    old, new = ("lr: 0.001", "lr: 0.002") if name == "config.yaml" else ('"<pad>"', '"[PAD]"')
    text = file.read_text()
    assert old in text
    file.write_text(text.replace(old, new))
    with pytest.raises(UserError, match=f"{name} is not the file that the run was trained with"):
        load_run(setup.run)


def test_fresh_moves_nothing_aside_when_the_data_is_missing(
    make_setup: Any, make_pictures: Any, tmp_path: Path, capsys: Capture
) -> None:
    data = make_pictures(tmp_path / "pictures")
    setup = make_setup(data)
    assert setup.train() == 0
    data.rename(tmp_path / "elsewhere")
    assert main(["train", str(setup.config), f"logging.output={setup.output}", "--fresh"]) == 2
    assert str(data) in complaint(capsys)
    assert setup.steps() == [5, 10]
    assert not list(setup.output.glob("*.old"))


def test_a_run_that_ends_without_a_loss_is_given_up(setup: Setup, capsys: Capture) -> None:
    """The first step overshoots; the last one, skipped for its NaN, is no end to save."""
    assert setup.train("optimization.lr=1e30", "optimization.steps=2") == 3
    assert "stopped: the last step was skipped, its loss is nan" in capsys.readouterr().err
    assert setup.steps() == []
    assert setup.lines("metrics.jsonl")[-1]["loss"] is None  # JSON has no NaN


def test_a_signal_while_steps_are_skipped_saves_nothing(
    setup: Setup, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    judge = StepGuard.judge

    def skip_and_signal(guard: StepGuard, loss: float, norm: float) -> Any:
        verdict = judge(guard, float("nan") if guard._seen == 6 else loss, norm)
        if verdict.skip:
            os.kill(os.getpid(), signal.SIGTERM)
        return verdict

    monkeypatch.setattr(StepGuard, "judge", skip_and_signal)
    assert setup.train() == 75
    assert "while steps were being skipped, which is not saved" in capsys.readouterr().err
    assert setup.steps() == [5]
    monkeypatch.undo()
    assert setup.train() == 0


def test_a_warm_up_longer_than_the_epochs_is_refused(setup: Setup, capsys: Capture) -> None:
    overrides = ("optimization.steps=null", "optimization.epochs=1", "optimization.warmup_steps=99")
    assert setup.train(*overrides) == 2
    assert "warmup_steps: 99 is more than the 8 steps that optimization.epochs" in complaint(capsys)


def test_a_tokenizer_that_changed_under_its_path_is_refused(
    trained: Setup, setup: Setup, tmp_path: Path, capsys: Capture
) -> None:
    """A run keeps its own copy; a file that is gone is no matter, another file is."""
    file = tmp_path / "tokenizer.json"
    given = f"data.tokenizer.path={file}", "data.tokenizer.vocab_size=8000"
    file.write_bytes((trained.run / "tokenizer.json").read_bytes())
    assert setup.train(*given) == 0
    file.write_text(file.read_text().replace('"<pad>"', '"[PAD]"'))
    capsys.readouterr()
    assert setup.train(*given) == 2
    message = complaint(capsys)
    assert "data.tokenizer.path: the file is not the one that run" in message
    assert "start anew with --fresh" in message
    file.unlink()
    assert setup.train(*given) == 0


@contextmanager
def largest_file(size_bytes: int) -> Iterator[None]:
    """Writes past the limit fail as on a full disk, with another number."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_disk_that_fills_up_while_saving(trained: Setup, tmp_path: Path, capsys: Capture) -> None:
    setup = trained.killed_after(5, tmp_path / "runs")
    before = setup.content(5)
    with largest_file(100_000):
        assert setup.train() == 2
    assert "was not written: [Errno 27] File too large" in complaint(capsys)
    assert setup.steps() == [5]
    assert not list(setup.run.glob("checkpoints/*.tmp"))
    after = setup.content(5)
    assert all((after[name] == before[name]).all() for name in before)
    assert setup.train() == 0
    assert setup.metrics() == trained.metrics()


def test_a_disk_that_is_full_before_the_first_line(setup: Setup, capsys: Capture) -> None:
    with largest_file(0):
        assert setup.train() == 2
    assert "File too large" in complaint(capsys)
    assert setup.train() == 0


@pytest.mark.parametrize("output", ["file", "file/below", "/proc/carillon"])
def test_a_run_folder_that_cannot_be_made(
    output: str, setup: Setup, tmp_path: Path, capsys: Capture
) -> None:
    (tmp_path / "file").write_text("not a folder")
    assert setup.train(f"logging.output={tmp_path / output}") == 2
    message = complaint(capsys)
    assert "set logging.output to a folder that you can write" in message
