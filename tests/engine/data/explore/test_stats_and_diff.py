"""Counts by columns, and what differs between two versions."""

import tarfile
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest

from carillon.engine.config import UserError
from carillon.engine.data.explore.diff import diff
from carillon.engine.data.explore.stats import stats
from carillon.engine.data.shard_writer import ShardWriter
from carillon.engine.data.shards import Dataset, open_dataset


def test_counts_of_a_set(dataset: Dataset) -> None:
    found = stats(dataset)
    assert found["num_samples"] == 8
    assert found["splits"]["train"]["shards"] > 1
    assert found["modalities"] == {"text": 8, "image": 4, "audio": 2}
    assert found["languages"] == {"en": 6, "fr": 4, "ar": 1, "de": 1}
    assert found["licences"] == {"CC0-1.0": 4, "CC-BY-4.0": 2, "unstated": 2}
    assert found["width"] == {
        "items": 4,
        "min": 48.0,
        "median": 48.0,
        "p95": 48.0,
        "max": 48.0,
        "total": 192.0,
    }
    assert (found["duration_s"]["items"], found["duration_s"]["total"]) == (2, 1.0)
    captions = found["captions"]
    assert captions["samples_read"] == 8
    assert (captions["characters"]["en"]["items"], captions["characters"]["en"]["max"]) == (4, 9.0)
    assert captions["characters"]["ar"]["median"] == 5.0


def test_media_are_not_read(dataset: Dataset) -> None:
    """Their bytes are destroyed, but for headers and JSON; the counts stay."""
    before = stats(dataset)
    for shard in dataset.path.glob("*.tar"):
        content = bytearray(shard.read_bytes())
        with tarfile.open(shard) as tar:
            for member in tar:
                if not member.name.endswith(".json"):
                    end = member.offset_data + member.size
                    content[member.offset_data : end] = bytes(member.size)
        shard.write_bytes(content)
    assert stats(open_dataset(dataset.path)) == before


def test_captions_of_some_samples_alone(dataset: Dataset, run: Callable[..., str]) -> None:
    found = stats(dataset, caption_samples=2)["captions"]
    assert found["samples_read"] == 2
    assert stats(dataset, caption_samples=0)["captions"] == {"samples_read": 0, "characters": {}}
    assert "--caption-samples -1" in run("stats", "small", "--caption-samples", "-1", code=2)


def test_plain_tars_are_counted_by_reading(
    tmp_path: Path, run: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second sample's JSON is no JSON: it is counted as unreadable, not left out. The third's
    holds what is no text."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        for name, data in (
            ("a.jpg", b"x"),
            ("a.json", b'{"captions": {"en": ["one"]}, "licence": "MIT"}'),
            ("b.jpg", b"x"),
            ("b.json", b"{"),
            ("c.jpg", b"x"),
            ("c.json", b'{"licence": "\\ud800", "captions": {"\\ud800": ["y"]}}'),
        ):
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, BytesIO(data))
    found = stats(open_dataset(tmp_path / "x.tar"))
    assert (found["num_samples"], found["unreadable"]) == (3, 1)
    assert (found["licences"], found["languages"]) == ({"?": 1, "MIT": 1}, {"?": 1, "en": 1})
    for command in (["stats", "x.tar"], ["diff", "x.tar", "x.tar"]):
        run(*command)
        run(*command, "--json")
    run("show", "x.tar", "--out", "x.html")


def test_items_of_another_shard_are_refused(dataset: Dataset) -> None:
    first, second = sorted(dataset.path.glob("train-*.items.parquet"))[:2]
    first.write_bytes(second.read_bytes())
    with pytest.raises(UserError, match=r"items .*train-000000.* are not those of train-000000"):
        stats(dataset)


def test_terminal_shows_text_as_text(tmp_path: Path, run: Callable[..., str]) -> None:
    with ShardWriter(tmp_path / "odd", name="odd", source={}) as writer:
        writer.write("k", {}, {"captions": {"en": ["x"]}, "licence": "[red]\x1b[31m\u202ec-yb"})
    said = run("stats", "odd")
    assert "[red] [31mc-yb" in said
    assert "\x1b" not in said
    assert "\u202e" not in said


def test_every_change_is_named(tmp_path: Path, dataset: Dataset) -> None:
    with ShardWriter(tmp_path / "next", name="small", source={}) as writer:
        for split, part in dataset.splits.items():
            for row in range(len(part)):
                key, members, meta = part.read(row)
                meta = {name: value for name, value in meta.items() if value}
                if key == "text0":
                    continue
                if key == "picture0":
                    members = {"png": members["png"] + b"\0"}
                if key == "picture1":  # as long as before: only the checksum differs
                    meta = meta | {"captions": {"en": ["a batch 1"], "fr": ["une tache 1"]}}
                there = "held_out" if key == "picture2" else split
                writer.write(key, members, meta, split=there)
        writer.write("new", {}, {"captions": {"pt": ["novo"]}, "licence": "MIT"})
    found = diff(dataset, open_dataset(tmp_path / "next"))
    assert found["keys"] == {
        "added": ["new"],
        "removed": ["text0"],
        "media": ["picture0"],
        "text": ["picture1"],
        "split": ["picture2"],
    }
    assert found["unchanged"] == 4
    assert found["languages"]["ar"] == [1, 0]
    assert found["languages"]["pt"] == [0, 1]
    assert found["licences"]["CC0-1.0"] == [4, 3]


def test_diff_command(
    tmp_path: Path, dataset: Dataset, run: Callable[..., str], run_json: Callable[..., Any]
) -> None:
    found = run_json("diff", "small", "small")
    assert (found["unchanged"], set(found["counts"].values())) == (8, {0})
    assert "other media" in run("diff", "small", "small")
    assert "holds neither" in run("diff", "small", ".", code=2)
