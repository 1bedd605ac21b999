"""The command line itself: one grammar, help everywhere, one message and an exit code."""

import argparse
import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from carillon.engine.cli import COMMANDS, Command, main

CLI = [sys.executable, "-m", "carillon.engine.cli"]


def name(command: Command) -> str:
    return " ".join(command.words)


@pytest.mark.parametrize("command", COMMANDS, ids=name)
def test_every_command_has_help_with_examples(
    command: Command, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as end:
        main([*command.words, "--help"])
    assert end.value.code == 0
    help_text = capsys.readouterr().out
    assert f"usage: carillon {name(command)}" in help_text
    assert f"carillon {name(command)} " in help_text.partition("examples:")[2]


def test_help_lists_the_commands_without_loading_them() -> None:
    """`carillon --help` answers at once: neither torch nor numpy is imported for it."""
    code = (
        "import sys; from carillon.engine.cli import main\n"
        "try: main(['--help'])\n"
        "except SystemExit: pass\n"
        "assert not {'torch', 'numpy', 'PIL', 'sqlalchemy'} & set(sys.modules), 'heavy import'"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert ran.returncode == 0, ran.stderr
    for command in COMMANDS:
        assert command.words[0] in ran.stdout


@pytest.mark.parametrize("arguments", [[], ["trian", "x.yaml"], ["config"], ["train"]])
def test_a_wrong_command_is_refused_with_its_usage(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as end:
        main(arguments)
    assert end.value.code == 2
    error = capsys.readouterr().err
    assert "usage: carillon" in error
    assert "Traceback" not in error


def test_a_users_error_is_one_message_and_2(tmp_path: Path) -> None:
    """As a process, since that is what a script sees."""
    train = [*CLI, "train", str(tmp_path / "none.yaml")]
    ran = subprocess.run(train, capture_output=True, text=True, timeout=120)
    assert ran.returncode == 2
    assert ran.stderr.startswith("carillon: config ")
    assert len(ran.stderr.splitlines()) == 1
    assert ran.stdout == ""


def test_only_the_main_rank_tells(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RANK", "1")
        assert main(["train", str(tmp_path / "none.yaml")]) == 2
    assert capsys.readouterr().err == ""


def test_config_check_says_what_a_config_amounts_to(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("data: {path: nowhere}\noptimization: {steps: 5}\n")
    assert main(["config", "check", str(file)]) == 0
    shown = capsys.readouterr().out
    assert f"{file}: good" in shown
    assert "parameters" in shown
    assert main(["config", "check", str(file), "optimization.lr=fast"]) == 2
    assert "optimization.lr: expected a number, got 'fast' (str)" in capsys.readouterr().err


@pytest.mark.parametrize(
    "words",
    [
        ["x.yaml", "a=1", "--fresh", "b=2", "c=--x"],
        ["x.yaml", "--fresh", "a=1", "b=2", "c=--x"],
        ["--fresh", "x.yaml", "a=1", "b=2", "c=--x"],
        ["x.yaml", "a=1", "b=2", "c=--x", "--fresh"],
    ],
)
def test_overrides_may_stand_anywhere(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[argparse.Namespace] = []
    monkeypatch.setattr("carillon.engine.train.command.main", lambda given: seen.append(given) or 0)
    assert main(["train", *words]) == 0
    assert (seen[0].config, seen[0].fresh) == ("x.yaml", True)
    assert seen[0].overrides == ["a=1", "b=2", "c=--x"]


@pytest.mark.parametrize(
    ("words", "unknown"),
    [
        (["train", "x.yaml", "--fresh", "b=2", "--frehs"], "--frehs"),
        (["train", "x.yaml", "--fresh", "stray"], "stray"),
        (["train", "x.yaml", "--lr=3"], "--lr=3"),
        (["data", "emoji", "size=64"], "size=64"),
    ],
)
def test_other_words_left_over_are_refused(
    words: list[str], unknown: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as end:
        main(words)
    assert end.value.code == 2
    assert capsys.readouterr().err.endswith(f"error: unrecognized arguments: {unknown}\n")


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG])
def test_a_full_disk_is_told_without_a_traceback(
    number: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(arguments: object) -> int:
        raise OSError(number, os.strerror(number), "runs/x/metrics.jsonl")

    monkeypatch.setattr("carillon.engine.train.command.main", full)
    assert main(["train", "x.yaml"]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"carillon: runs/x/metrics.jsonl: {os.strerror(number)}; make room")


def test_a_fault_of_ours_is_not_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(arguments: object) -> int:
        raise RuntimeError("a bug")

    monkeypatch.setattr("carillon.engine.train.command.main", broken)
    with pytest.raises(RuntimeError, match="a bug"):
        main(["train", "x.yaml"])


def test_a_closed_pipe_is_no_error(tmp_path: Path) -> None:
    """`carillon ... | head` ends quietly, whoever writes last."""
    file = tmp_path / "run.yaml"
    file.write_text("data: {path: nowhere}\noptimization: {steps: 5}\n")
    reader, writer = os.pipe()
    os.close(reader)
    command = [*CLI, "config", "check", str(file), "--resolved"]
    ran = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, text=True, timeout=120)
    os.close(writer)
    assert ran.stderr == ""
