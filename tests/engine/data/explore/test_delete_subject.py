"""Erasure: a new version without the items, tombstones, a superseded parent, what was trained."""

import errno
import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import select

from carillon.engine.cli import main
from carillon.engine.data.explore import delete_subject, erase
from carillon.engine.data.explore.diff import diff
from carillon.engine.data.shard_writer import ShardWriter
from carillon.engine.data.shards import Dataset, open_dataset
from carillon.engine.data.tombstones import tombstones_of
from carillon.engine.registry.store import Registry, RunDataset
from carillon.engine.registry.tables import DataItemRow, DatasetRow

HASH = "ab12cd34" * 8
WHO = ("--reason", "request 17", "--requested-by", "Ada", "--registry", "r.sqlite")
ADA = ("delete-subject", "small", "--where", "author=Ada", "--out", "next", *WHO)


def erased_keys(before: Dataset, after: Path) -> list[str]:
    found = diff(before, open_dataset(after))
    assert found["unchanged"] == found["after"]["num_samples"]
    keys: list[str] = found["keys"]["removed"]
    return keys


def superseded(location: str = "r.sqlite") -> list[str]:
    with Registry.open(location).reading() as session:
        rows = session.scalars(select(DatasetRow).where(DatasetRow.superseded_at.is_not(None)))
        return [row.fingerprint for row in rows]


def test_a_dry_run_shows_and_does_nothing(
    dataset: Dataset, tmp_path: Path, run: Callable[..., str], run_json: Callable[..., Any]
) -> None:
    before = sorted(tmp_path.rglob("*"))
    said = run("delete-subject", "small", "--where", "author=Ada", "--dry-run", "--purge")
    for text in ("3 items of small", "picture1", "train-000000.tar", "nothing was done"):
        assert text in said
    found = run_json("delete-subject", "small", "--where", "author=Ada", "--dry-run")
    assert found["confirm"] in said
    assert sorted(tmp_path.rglob("*")) == before


def test_by_a_field(dataset: Dataset, tmp_path: Path, run: Callable[..., str]) -> None:
    run("register", "small", "--items", "--registry", "r.sqlite")
    said = run(*ADA)
    assert "3 items erased" in said
    assert "nothing in the registry was trained on it" in said
    assert erased_keys(dataset, tmp_path / "next") == ["picture1", "picture3", "sound1"]
    tombstones = tombstones_of([tmp_path / "next"])
    sample = dataset.splits["held_out"].read(0)
    assert tombstones.refusal_of("x", sample.members) is not None
    assert tombstones.refusal_of("picture1", {}) is not None
    assert tombstones.refusal_of("picture0", {}) is None
    assert superseded() == [dataset.fingerprint]
    with Registry.open("r.sqlite").reading() as session:
        uris = set(session.scalars(select(DataItemRow.uri)))
    assert len(uris) == 5
    assert not uris & {"train/picture1", "held_out/picture3", "train/sound1"}
    assert open_dataset(dataset.path).fingerprint == dataset.fingerprint  # until it is purged


def test_a_second_erasure_keeps_the_first_tombstones(
    dataset: Dataset, tmp_path: Path, run: Callable[..., str]
) -> None:
    run(*ADA)
    (tmp_path / "keys.txt").write_text("text0\n\n  sound0 \n")
    run("delete-subject", "next", "--keys-file", "keys.txt", "--out", "third", *WHO)
    tombstones = tombstones_of([tmp_path / "third"])
    assert len(tombstones) == 5
    for key in ("picture1", "sound1", "text0", "sound0"):
        assert tombstones.refusal(key, "") is not None
    said = run("lineage", "third", "--registry", "r.sqlite")
    assert dataset.fingerprint[:16] in said
    assert "delete-subject" in said


def test_a_text_needs_the_code_of_its_dry_run(
    dataset: Dataset, tmp_path: Path, run: Callable[..., str], run_json: Callable[..., Any]
) -> None:
    text = ("delete-subject", "small", "--text", "PATCH")
    assert "run with --dry-run first" in run(*text, "--out", "next", *WHO, code=2)
    assert "is not of these 4 items" in run(
        *text, "--out", "next", *WHO, "--confirm", "0000", code=2
    )
    assert not (tmp_path / "next").exists()
    code = run_json(*text, "--dry-run")["confirm"]
    run(*text, "--out", "next", *WHO, "--confirm", code)
    assert len(erased_keys(dataset, tmp_path / "next")) == 4


def test_copies_of_the_media_go_along(tmp_path: Path, run_json: Callable[..., Any]) -> None:
    with ShardWriter(tmp_path / "small", name="s", source={}) as writer:
        for key, data in (("a", b"face"), ("b", b"face"), ("c", b"other")):
            writer.write(key, {"jpg": data}, {"captions": {"en": [key]}})
        writer.write("d", {}, {"captions": {"en": ["d"]}})
        writer.write("e", {}, {"captions": {"en": ["e"]}})
    chosen = ("delete-subject", "small", "--key", "b", "--key", "d")
    found = run_json(*chosen, "--dry-run")
    assert [one["key"] for one in found["items"]] == ["a", "b", "d"]
    run_json(*chosen, "--out", "next", *WHO)
    assert erased_keys(open_dataset("small"), tmp_path / "next") == ["a", "b", "d"]


def test_what_was_trained_on_it_is_listed(
    dataset: Dataset, tmp_path: Path, run_json: Callable[..., Any]
) -> None:
    registry = Registry.open(tmp_path / "r.sqlite")
    with ShardWriter(tmp_path / "child", name="child", source={}) as writer:
        sample = dataset.splits["train"].read(1)
        writer.write("renamed", sample.members, sample.meta)
    registry.record_derived(open_dataset("child"), [dataset], relation="curate", details={})
    folder = tmp_path / "runs" / "r"
    for place in (f"{HASH[:12]}-{'0' * 12}-train", f"{'0' * 12}-{dataset.fingerprint[:12]}-train"):
        (folder / "embeddings" / f"{place}.zarr").mkdir(parents=True)
    (folder / "embeddings" / f"{'0' * 12}-{'1' * 12}-train.zarr").mkdir()
    read = [RunDataset(dataset.fingerprint, "a", "train"), RunDataset("", "b", "x", 7)]
    read[1] = read[1]._replace(fingerprint=open_dataset("child").fingerprint)
    run = registry.start_run("r-1", config_hash="c", params={}, artifacts_uri=folder, datasets=read)
    registry.add_checkpoint(run, 5, uri=folder / "step-5", content_hash=HASH)
    registry.start_run("other", config_hash="c", params={}, artifacts_uri=tmp_path / "other")
    found = run_json(*ADA)
    assert [(one["dataset"], one["name"], one["in_mixture"]) for one in found["runs"]] == [
        ("small", "r-1", "a"),
        ("child", "r-1", "b"),
    ]
    assert [(one["dataset"], one["step"]) for one in found["checkpoints"]] == [
        ("small", 5),
        ("child", 5),
    ]
    assert {one["content_hash"] for one in found["checkpoints"]} == {HASH}
    assert len(found["indexes"]) == 2
    (holder,) = found["also_held_by"]
    assert (holder["name"], holder["num_items"], holder["note"]) == (
        "child",
        1,
        "holds them still",
    )


def test_purge_removes_the_old_files_and_what_killed_writers_left(
    dataset: Dataset, tmp_path: Path, run: Callable[..., str]
) -> None:
    (tmp_path / ".small.yaml").write_text("stays")
    for left in (".small.ingest", ".small.partial-x", ".next.partial-x"):
        (tmp_path / left).mkdir()
        (tmp_path / left / "items").write_text("left by a killed writer")
    said = run(*ADA, "--purge")
    assert "small/train-000000.tar" in said
    assert ".small.ingest/items" in said
    assert sorted(path.name for path in tmp_path.iterdir()) == [".small.yaml", "next", "r.sqlite"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((), "say which items by one of"),
        (("--key", "picture1", "--text", "x"), "say which items by one of"),
        (("--text", " "), "--text is empty"),
        (("--key", "absent"), "has no item 'absent'; nothing was done"),
        (("--where", "author=Nobody"), "no item of .* fits; nothing was done"),
        (("--key", "picture1", "--out", "small"), "must be another folder"),
        (("--key", "picture1", "--out", "small/next"), "must be another folder"),
        (("--key", "picture1", "--out", "."), "must be another folder"),
        (("--key", "picture1", "--out", "there"), "exists"),
        (("--key", "picture1", "--reason", ""), "give --reason, or --dry-run"),
        (("--keys-file", "small/train-000000.tar"), "no text of keys|has no item"),
        (("--keys-file", "absent.txt"), "No such file"),
    ],
)
def test_refusals_leave_nothing(
    dataset: Dataset, tmp_path: Path, run: Callable[..., str], words: tuple[str, ...], message: str
) -> None:
    (tmp_path / "there").mkdir()
    said = run("delete-subject", "small", "--out", "next", *WHO, *words, code=2)
    assert re.search(message, said), said
    assert not (tmp_path / "next").exists()
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []
    assert open_dataset("small").fingerprint == dataset.fingerprint


def test_not_all_items(dataset: Dataset, tmp_path: Path, run: Callable[..., str]) -> None:
    words = ("delete-subject", "small", "--where", "modality!=x", "--out", "next", *WHO)
    assert "all 8 items" in run(*words, code=2)
    assert not (tmp_path / "next").exists()


def damage(dataset: Dataset) -> None:
    """A flipped bit in picture0's caption, which only its checksum shows."""
    shard = dataset.path / "train-000000.tar"
    content = bytearray(shard.read_bytes())
    content[content.index(b"a patch 0") + 2] ^= 1
    shard.write_bytes(content)


def test_a_damaged_sample_is_not_passed_on(
    dataset: Dataset, tmp_path: Path, run: Callable[..., str]
) -> None:
    damage(dataset)
    assert "--drop-damaged" in run(*ADA, code=2)
    assert not (tmp_path / "next").exists()
    assert superseded() == []
    run(*ADA, "--drop-damaged")
    keys = {open_dataset("next").splits["train"].key(row) for row in range(4)}
    assert keys == {"picture2", "sound0", "text0", "text1"}


@pytest.mark.parametrize("moment", ["copy", "publish", "registry", "purge"])
def test_cut_short_at_any_moment_it_goes_on(
    dataset: Dataset,
    tmp_path: Path,
    run: Callable[..., str],
    monkeypatch: pytest.MonkeyPatch,
    moment: str,
) -> None:
    """Until the new version is whole there is none; then the same command does the rest."""

    def cut(*args: Any, **more: Any) -> None:
        raise KeyboardInterrupt

    places: dict[str, tuple[Any, str]] = {
        "copy": (erase, "_copy"),
        "publish": (ShardWriter, "_publish"),
        "registry": (delete_subject, "supersede"),
        "purge": (erase.shutil, "rmtree"),
    }
    with monkeypatch.context() as patch:
        if moment == "purge":
            patch.setattr(delete_subject, "purge", lambda folder: _half_purged(folder))
        else:
            patch.setattr(*places[moment], cut)
        assert main(["data", *ADA, "--purge"]) == 130
    there = (tmp_path / "next").exists()
    assert there == (moment in ("registry", "purge"))
    assert (tmp_path / "small").exists() == (moment != "purge")
    run(*ADA, "--purge")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["next", "r.sqlite"]
    assert len(open_dataset("next").splits["train"]) == 5
    assert superseded() == [dataset.fingerprint]


def _half_purged(folder: Path) -> None:
    folder.rename(erase.aside(folder))
    next(erase.aside(folder).iterdir()).unlink()
    raise KeyboardInterrupt


def test_a_full_disk_leaves_nothing(
    dataset: Dataset, tmp_path: Path, run: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr("carillon.engine.data.shard_writer.os.fsync", full)
        said = run(*ADA, "--purge", code=2)
    assert "No space left" in said
    assert open_dataset("small").fingerprint == dataset.fingerprint
    assert superseded() == []
    assert {path.name for path in tmp_path.iterdir()} - {"r.sqlite-wal", "r.sqlite-shm"} == {
        "small",
        "r.sqlite",
    }


def test_json_is_all_that_is_printed(dataset: Dataset, run: Callable[..., str]) -> None:
    found = json.loads(run(*ADA, "--json", "--purge"))
    assert found["num_erased"] == 3
    assert "small/dataset.json" in found["purged"]
