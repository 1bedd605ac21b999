"""What an unfinished ingest keeps: what it refuses, what it tells, and what it goes on with."""

import argparse
import contextlib
import errno
import hashlib
import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from sqlalchemy import select

from carillon.engine.config import UserError
from carillon.engine.data import ingest as command
from carillon.engine.data import ingest_command, shard_writer
from carillon.engine.data.ingest import ingest
from carillon.engine.data.ingest_options import IngestOptions
from carillon.engine.data.ingest_order import Pace
from carillon.engine.data.shards import Dataset, ShardWriter, open_dataset
from carillon.engine.registry.store import Registry
from carillon.engine.registry.tables import DataItemRow, DatasetRow

STEADY = IngestOptions(
    save_every_s=0.0, max_shard_bytes=6_000, validation_share=0.3, pace=Pace(window_items=3)
)


def photos(root: Path, num: int = 20) -> Path:
    root.mkdir(parents=True, exist_ok=True)
    for number in range(num):
        Image.new("RGB", (8, 8), (number, 0, 0)).save(root / f"{number:02d}.png")
        (root / f"{number:02d}.txt").write_text(f"number {number}")
    return root


def content(out: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(out.iterdir())}


class Stopped(Exception):
    """Stands for whatever ends an ingest."""


def stop_after(monkeypatch: pytest.MonkeyPatch, num: int) -> None:
    """Make the ingest end in the middle of the item after so many."""
    store, left = command._store, [num]

    def stopping(*arguments: Any) -> str | None:
        left[0] -= 1
        if left[0] < 0:
            raise Stopped
        return store(*arguments)

    monkeypatch.setattr(command, "_store", stopping)


@pytest.fixture
def unfinished(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An ingest of photos/ to set/ that was stopped after twelve items."""
    root = photos(tmp_path / "photos")
    with monkeypatch.context() as patched:
        stop_after(patched, 12)
        with pytest.raises(Stopped):
            ingest([str(root)], tmp_path / "set", options=STEADY)
    return tmp_path


def go_on(folder: Path, **changes: Any) -> Dataset:
    options = replace(STEADY, **changes)
    return ingest([str(folder / "photos")], folder / "set", options=options)[0]


def test_it_goes_on_to_the_same_bytes(unfinished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, _ = ingest([str(unfinished / "photos")], unfinished / "whole" / "set", options=STEADY)
    loaded = []
    store = command._store

    def counting(*arguments: Any) -> str | None:
        loaded.append(arguments[1].name)
        return store(*arguments)

    monkeypatch.setattr(command, "_store", counting)
    dataset = go_on(unfinished)
    assert loaded == [f"{number:02d}.png" for number in range(12, 20)]
    assert content(dataset.path) == content(whole.path)
    assert not (unfinished / ".set.ingest").exists()


@pytest.mark.parametrize("when", ["taken", "to come", "removed"])
def test_sources_that_changed_are_told(unfinished: Path, when: str) -> None:
    root = unfinished / "photos"
    if when == "taken":
        shutil.copy(root / "05.png", root / "05a.png")
        shutil.copy(root / "05.txt", root / "05a.txt")
    elif when == "removed":
        for number in range(9, 20):
            (root / f"{number:02d}.png").unlink()
    else:
        shutil.copy(root / "19.png", root / "20.png")
        shutil.copy(root / "19.txt", root / "20.txt")
        assert sum(len(split) for split in go_on(unfinished).splits.values()) == 21
        return
    with pytest.raises(UserError, match=r"the sources changed since .* first 12 items.*--restart"):
        go_on(unfinished)
    dataset = go_on(unfinished, restart=True)
    assert sum(len(s) for s in dataset.splits.values()) == (21 if when == "taken" else 9)


def test_options_that_the_bytes_follow_from_are_told_and_others_are_not(unfinished: Path) -> None:
    with pytest.raises(
        UserError, match=r"begun otherwise: --licence was None, now MIT; --max-size was None, now 9"
    ):
        go_on(unfinished, licence="MIT", max_size=9)
    assert go_on(unfinished, max_bad_share=0.5, workers=1).name == "set"


@pytest.mark.parametrize("damage", ["cut", "gone", "state"])
def test_kept_shards_that_were_damaged_are_told(unfinished: Path, damage: str) -> None:
    work = unfinished / ".set.ingest"
    tar = max((work / "set").glob("train-*.tar"))
    if damage == "state":
        (work / "state.json").write_text("{")
        assert sum(len(s) for s in go_on(unfinished).splits.values()) == 20, "it begins anew"
        return
    tar.unlink() if damage == "gone" else tar.write_bytes(tar.read_bytes()[:-1000])
    with pytest.raises(UserError, match=r"the unfinished shards .* are damaged.*--restart"):
        go_on(unfinished)


def test_too_many_bad_items_are_kept_and_taken_with_a_larger_share(tmp_path: Path) -> None:
    root = photos(tmp_path / "photos")
    for number in range(5):
        (root / f"{number:02d}.txt").write_text(" ")
    with pytest.raises(UserError, match=r"5 of 20 items are bad.* a larger --max-bad-share goes"):
        go_on(tmp_path)
    dataset = go_on(tmp_path, max_bad_share=0.5)
    assert sum(len(split) for split in dataset.splits.values()) == 15
    assert (dataset.path / "rejected.jsonl").read_text().count("\n") == 5


def test_the_bad_share_is_judged_on_the_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(command, "MIN_JUDGED", 8)
    root = photos(tmp_path / "photos")
    for number in range(4):
        (root / f"{number:02d}.txt").write_text(" ")
    with pytest.raises(UserError, match="4 of 8 items are bad"):
        go_on(tmp_path)


def write(writer: ShardWriter, numbers: range) -> None:
    for number in numbers:
        meta = {"captions": {"en": [f"number {number}"]}, "licence": "MIT"}
        split = "train" if number % 3 else "validation"
        writer.write(f"k{number}", {"png": bytes([number]) * 700}, meta, split=split)


@pytest.mark.parametrize("saved_at", [1, 7, 12, 20])
@pytest.mark.parametrize("stopped_at", [20, 30])
def test_a_writer_goes_on_from_any_save(tmp_path: Path, saved_at: int, stopped_at: int) -> None:
    """Whatever was written and closed since is cut off, and the bytes are those of one go."""
    settings: dict[str, Any] = {"name": "x", "source": {}, "max_shard_bytes": 5000}
    with ShardWriter(tmp_path / "whole", **settings) as writer:
        write(writer, range(30))
    work = tmp_path / "work" / "set"
    work.parent.mkdir()
    saved: dict[str, Any] = {}
    with contextlib.suppress(Stopped), ShardWriter(tmp_path / "set", **settings, work=work) as made:
        write(made, range(saved_at // 2))
        made.save()
        write(made, range(saved_at // 2, saved_at))
        saved = made.save()
        write(made, range(saved_at, stopped_at))
        raise Stopped
    (work / "stray.tar").write_bytes(b"written later")
    with ShardWriter(tmp_path / "set", **settings, work=work, saved=saved) as writer:
        write(writer, range(saved_at, 30))
    assert content(tmp_path / "set") == content(tmp_path / "whole")
    assert len(open_dataset(tmp_path / "set").splits["train"]) == 20


def test_it_goes_on_from_what_was_finished_but_not_published(
    unfinished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, _ = ingest([str(unfinished / "photos")], unfinished / "whole" / "set", options=STEADY)

    def stopping(*_: object) -> None:
        raise Stopped

    with monkeypatch.context() as patched:
        patched.setattr(shard_writer, "publish_folder", stopping)
        with pytest.raises(Stopped):
            go_on(unfinished)
    assert (unfinished / ".set.ingest" / "set" / "dataset.json").exists()
    assert not (unfinished / "set").exists()
    assert content(go_on(unfinished).path) == content(whole.path)


def test_a_disk_that_fills_up_costs_nothing_that_was_done(
    unfinished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, _ = ingest([str(unfinished / "photos")], unfinished / "whole" / "set", options=STEADY)
    with monkeypatch.context() as patched:
        left = [9]

        def full(descriptor: int) -> None:
            left[0] -= 1
            if left[0] < 0:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        patched.setattr(os, "fsync", full)
        with pytest.raises(UserError, match=r"cannot be written: No space left on device.* kept"):
            go_on(unfinished)
    assert content(go_on(unfinished).path) == content(whole.path)


def test_rows_of_the_registry(tmp_path: Path) -> None:
    root = photos(tmp_path / "photos", 4)
    location = tmp_path / "registry.sqlite"
    parser = argparse.ArgumentParser()
    ingest_command.add_arguments(parser)
    given = [str(root), "--out", str(tmp_path / "set"), "--workers", "1", "--licence", "MIT"]
    given += ["--language", "en", "--registry", str(location)]
    assert ingest_command.main(parser.parse_args(given)) == 0
    dataset = open_dataset(tmp_path / "set")
    with Registry.open(location).reading() as session:
        row = session.scalars(select(DatasetRow)).one()
        assert (row.fingerprint, row.source_uri) == (dataset.fingerprint, str(dataset.path))
        items = session.scalars(select(DataItemRow)).all()
        assert {item.modality for item in items} == {"image-text"}
        assert {item.checksum for item in items} == {
            hashlib.sha256((root / f"{number:02d}.png").read_bytes()).hexdigest()
            for number in range(4)
        }
        assert {item.meta["licence"] for item in items} == {"MIT"}
