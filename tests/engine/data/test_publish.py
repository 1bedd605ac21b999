"""--overwrite replaces a folder of its own kind and nothing else."""

import json
import os
import stat
from pathlib import Path

import pytest

from carillon.engine.config import UserError
from carillon.engine.data import publish
from carillon.engine.data.manifest import FORMAT
from carillon.engine.data.publish import check_target, publish_file, publish_folder
from carillon.engine.data.shard_writer import ShardWriter


def overwrite(out: Path) -> None:
    with ShardWriter(out, name="x", source={}, overwrite=True) as writer:
        writer.write("only", {"png": b"1"}, {})


def snapshot(root: Path) -> dict[str, bytes | None]:
    return {str(p): p.read_bytes() if p.is_file() else None for p in root.rglob("*")}


@pytest.mark.parametrize("content", [None, "", "{", "[]", '{"format": "another"}'])
def test_a_folder_that_is_no_data_set_stays(tmp_path: Path, content: str | None) -> None:
    out = tmp_path / "thesis"
    out.mkdir()
    (out / "chapter.tex").write_text("years of work")
    if content is not None:
        (out / "dataset.json").write_text(content)
    before = snapshot(tmp_path)
    with pytest.raises(UserError, match=r"a folder that is no data set .*Nothing was removed"):
        overwrite(out)
    assert snapshot(tmp_path) == before


def test_a_damaged_data_set_can_be_replaced(tmp_path: Path) -> None:
    out = tmp_path / "set"
    out.mkdir()
    (out / "dataset.json").write_text(json.dumps({"format": FORMAT}))
    overwrite(out)
    assert (out / "train-000000.tar").is_file()


def test_files_and_links_stay(tmp_path: Path) -> None:
    overwrite(tmp_path / "set")
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "link").symlink_to("set")
    (tmp_path / "dangling").symlink_to("nowhere")
    before = snapshot(tmp_path)
    for name, found in (("notes.txt", "a file"), ("link", "a symb"), ("dangling", "a symb")):
        with pytest.raises(UserError, match=f"is {found}"):
            overwrite(tmp_path / name)
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize(("out", "found"), [(".", "the current"), ("..", "a folder around")])
def test_the_current_folder_and_those_around_it_stay(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, out: str, found: str
) -> None:
    """Even when they hold a data set."""
    overwrite(tmp_path / "set")
    (tmp_path / "set" / "below").mkdir()
    monkeypatch.chdir(tmp_path / "set" if out == "." else tmp_path / "set" / "below")
    before = snapshot(tmp_path)
    with pytest.raises(UserError, match=f"is {found}"):
        overwrite(Path(out))
    assert snapshot(tmp_path) == before


def test_what_appears_during_the_work_stays(tmp_path: Path) -> None:
    def write() -> None:
        with ShardWriter(tmp_path / "set", name="x", source={}) as writer:
            writer.write("only", {"png": b"1"}, {})
            (tmp_path / "set").mkdir()
            (tmp_path / "set" / "mine").write_text("kept")

    with pytest.raises(UserError, match="exists"):
        write()
    assert [str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*")] == ["set", "set/mine"]


def test_an_existing_name_is_refused_without_overwrite(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="exists; give another place"):
        check_target(tmp_path, "thing", lambda _: True, overwrite=False)
    check_target(tmp_path / "free", "thing", lambda _: False, overwrite=False)


def test_what_stood_there_comes_back_when_the_rename_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("new", "out"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "which").write_text(name)
    rename = os.rename

    def failing(source: Path, target: Path) -> None:
        if source == tmp_path / "new":
            raise OSError(5, "Input/output error")
        rename(source, target)

    monkeypatch.setattr(publish.os, "rename", failing)
    with pytest.raises(OSError, match="Input/output"):
        publish_folder(tmp_path / "new", tmp_path / "out")
    assert (tmp_path / "out" / "which").read_text() == "out"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["new", "out"]


def test_a_file_is_replaced_whole_or_not_at_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "page.md"
    publish_file(file, b"old")
    publish_file(file, b"new")
    assert file.read_bytes() == b"new"

    def full(fd: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(UserError, match=r"page\.md cannot be written: No space left on device; ma"):
        publish_file(file, b"newer")
    assert file.read_bytes() == b"new"
    assert list(tmp_path.iterdir()) == [file]


def test_a_link_stays_and_its_file_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "file").write_text("old")
    (tmp_path / "link").symlink_to("deep/file")
    publish_file(tmp_path / "link", b"new")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "deep" / "file").read_bytes() == b"new"
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["deep", "file", "link"]


def test_a_file_never_takes_the_place_of_something_else(tmp_path: Path) -> None:
    """A rename over a device would remove it: root may write to /dev."""
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to("pipe")
    (tmp_path / "nowhere").symlink_to("absent")
    before = sorted(tmp_path.iterdir())
    kinds = {"folder": "a folder"} | dict.fromkeys(("pipe", "link", "nowhere"), "no ordinary file")
    for name, kind in kinds.items():
        with pytest.raises(UserError, match=f"{name} is {kind}; name a file"):
            publish_file(tmp_path / name, b"new")
    assert sorted(tmp_path.iterdir()) == before
    assert stat.S_ISFIFO(os.stat(tmp_path / "pipe").st_mode)


def test_a_folder_is_made_for_a_file_only_where_asked(tmp_path: Path) -> None:
    file = tmp_path / "new" / "deep" / "file"
    with pytest.raises(UserError, match="cannot be written: No such file or directory"):
        publish_file(file, b"")
    publish_file(file, b"content", parents=True)
    assert file.read_bytes() == b"content"
