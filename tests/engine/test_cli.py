"""The command line itself: one grammar, help everywhere, one message and an exit code."""

import argparse
import errno
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from carillon.engine.cli import COMMANDS, NOUNS, Command, main

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


@pytest.mark.parametrize("noun", NOUNS)
def test_every_noun_has_help_with_the_examples_of_its_verbs(
    noun: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as end:
        main([noun, "--help"])
    assert end.value.code == 0
    described, _, examples = capsys.readouterr().out.partition("examples:")
    assert NOUNS[noun] in described
    for command in COMMANDS:
        if command.words[0] == noun:
            assert command.help in described
            assert f"  carillon {name(command)} " in examples


def test_help_lists_the_commands_without_loading_them() -> None:
    """`carillon --help` answers at once: neither torch nor numpy is imported for it."""
    code = (
        "import sys; from carillon.engine.cli import main\n"
        "try: main(['--help'])\n"
        "except SystemExit: pass\n"
        "assert not {'torch', 'numpy', 'PIL', 'sqlalchemy'} & set(sys.modules), 'heavy import'\n"
        "ours = {name for name in sys.modules if name.startswith('carillon.')}\n"
        "assert ours <= {'carillon.engine', 'carillon.engine.cli'}, ours"
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


def test_a_half_set_environment_is_told_by_whoever_has_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RANK", "1")
        with pytest.raises(SystemExit) as left:
            main(["train", str(tmp_path / "none.yaml")])
    assert left.value.code == 2
    assert "[rank 1] RANK is set and WORLD_SIZE" in capsys.readouterr().err


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


def failing(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make `carillon config settings` raise `error`."""

    def main(arguments: object) -> int:
        raise error

    monkeypatch.setattr("carillon.engine.train.settings_page.main", main)


@pytest.mark.parametrize(
    ("number", "advice"),
    [
        (errno.EACCES, "change its rights"),
        (errno.EPERM, "change its rights"),
        (errno.ENOENT, "check the path"),
        (errno.ENOTDIR, "a part of the path is a file"),
        (errno.EISDIR, "not a folder"),
        (errno.ENAMETOOLONG, "a shorter name"),
    ],
)
def test_a_path_that_the_system_refuses_is_one_line(
    number: int, advice: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    failing(OSError(number, os.strerror(number), "some/file"), monkeypatch)
    assert main(["config", "settings"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"carillon: some/file: {os.strerror(number)}; ")
    assert advice in line


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("a bug"),
        OSError(errno.EACCES, "of no path"),
        FileNotFoundError("of no number"),
        OSError(errno.EBADF, "of a descriptor", "some/file"),
        ConnectionRefusedError(errno.ECONNREFUSED, "of a server"),
    ],
    ids=str,
)
def test_a_fault_of_ours_is_not_hidden(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    failing(error, monkeypatch)
    with pytest.raises(type(error)) as raised:
        main(["config", "settings"])
    assert raised.value is error


LONG = "n" * 300  # longer than a file's name may be: refused to everybody, root included


@pytest.mark.parametrize(
    ("words", "path"),
    [
        ("embed RUN --out FILE/x.zarr", "FILE/x.zarr"),
        ("embed RUN --out /proc/x.zarr", "/proc/x.zarr"),
        ("embed RUN --data LONG", "LONG/dataset.json"),
        ("embed LONG", "LONG"),
        ("search RUN red --k 1 --out FILE/x.png", "FILE/x.png"),
        ("search RUN red --k 1 --out FOLDER", "FOLDER"),
        ("search RUN red --k 1 --out PIPE", "PIPE"),
        ("search RUN --image FILE/x.png", "FILE/x.png"),
        ("search FILE/x red", "FILE/x"),
        ("eval run LONG", "LONG"),
        ("eval run RUN --data LONG", "LONG/dataset.json"),
        ("tokenizer train SET --vocab-size 300 --out FILE/t.json", "FILE/t.json"),
        ("tokenizer train SET --vocab-size 300 --out PIPE", "PIPE"),
        ("tokenizer train LONG", "LONG/dataset.json"),
        ("tokenizer show LONG text", "LONG"),
        ("tokenizer show FOLDER text", "FOLDER/tokenizer.json"),
        ("config settings --out FOLDER/absent/page.md", "FOLDER/absent/page.md"),
        ("config settings --out FOLDER", "FOLDER"),
        ("config settings --out PIPE", "PIPE"),
        ("config check FILE/x.yaml", "FILE/x.yaml"),
        ("ingest LOOP --out FOLDER/new", "LOOP"),
        ("ingest LOOP/x --out FOLDER/new", "LOOP/x"),
        ("ingest FILE/x --out FOLDER/new", "FILE/x"),
        ("ingest SET --out LOOP/new", "LOOP/.new.ingest"),
        ("data emoji --out FILE/x", "FILE/x"),
        ("data emoji --out /proc/x", "/proc/x"),
        ("data emoji --out LONG", "LONG"),
        ("data register LONG", "LONG"),
        ("data register SET --registry LONG", "LONG"),
        ("runs --registry LONG", "LONG"),
        ("runs show x --registry FILE/r.sqlite", "FILE/r.sqlite"),
        ("train FOLDER", "FOLDER"),
    ],
)
def test_a_path_that_cannot_be_used_is_one_line_and_nothing_is_left(
    words: str,
    path: str,
    run_folder: Path,
    colours: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def fetch(*arguments: object) -> None:
        raise AssertionError("the packages were fetched before the place for the set was tried")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("carillon.engine.data.sets.emoji.locate_packages", fetch)
    Path("FILE").write_text("as it was")
    Path("FOLDER").mkdir()
    Path("LOOP").symlink_to("LOOP")
    os.mkfifo("PIPE")
    before = sorted(tmp_path.rglob("*"))
    stands_for = {"RUN": str(run_folder), "SET": str(colours), "LONG": LONG}
    given = []
    for word in words.split():
        first, slash, rest = word.partition("/")
        given.append(f"{stands_for.get(first, first)}{slash}{rest}")
    first, slash, rest = path.partition("/")
    assert main(given) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("carillon: ")
    assert f"{stands_for.get(first, first)}{slash}{rest}" in line
    assert sorted(tmp_path.rglob("*")) == before
    assert Path("FILE").read_text() == "as it was"
    assert stat.S_ISFIFO(os.lstat("PIPE").st_mode)


def test_a_run_that_cannot_be_written_is_not_scored(
    run_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("os.access", lambda path, mode: path != run_folder)
    assert main(["eval", "run", str(run_folder)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"carillon: the folder {run_folder} cannot be written")


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
