"""Damage of every kind is named with its file, and with the item where it is one's."""

import hashlib
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings, strategies

from carillon.engine.config import UserError
from carillon.engine.data.explore.shard_check import MAX_LISTED, ShardReport
from carillon.engine.data.explore.verify import verify
from carillon.engine.data.items import items_bytes, read_items
from carillon.engine.data.manifest import manifest_bytes, read_manifest
from carillon.engine.data.shards import Dataset
from carillon.engine.data.tombstones import TOMBSTONES_NAME, Tombstones


def problems(dataset: Dataset, *, workers: int = 1) -> list[tuple[str, str | None, str]]:
    found = verify(str(dataset.path), workers=workers)
    assert found["num_problems"] == len(found["problems"])
    return [(one["file"], one["key"], one["what"]) for one in found["problems"]]


def flip(path: Path, place: int) -> None:
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)


def test_a_whole_set_is_whole(
    dataset: Dataset, run: Callable[..., str], run_json: Callable[..., Any]
) -> None:
    assert problems(dataset) == []
    assert "8 samples" in run("verify", "small", "--workers", "1")
    assert run_json("verify", "small", "--workers", "1")["samples_read"] == 8


def test_workers_find_the_same(dataset: Dataset) -> None:
    for shard in sorted(dataset.path.glob("*.tar")):
        flip(shard, 700)
    alone = problems(dataset)
    assert len(alone) >= 4
    assert problems(dataset, workers=2) == alone


def test_a_flipped_bit_in_a_sample_names_it(dataset: Dataset, run: Callable[..., str]) -> None:
    shard = dataset.path / "train-000000.tar"
    flip(shard, shard.read_bytes().index(b"a patch 1"))
    found = problems(dataset)
    assert [(file, key) for file, key, _ in found] == [(shard.name, None), (shard.name, "picture1")]
    assert "SHA-256" in found[0][2]
    said = run("verify", "small", "--workers", "1", code=2)
    assert "picture1" in said
    assert "2 problems" in said


@pytest.mark.parametrize("place", [0, 330, -3])
def test_flips_in_an_index(dataset: Dataset, place: int) -> None:
    index = dataset.path / "train-000000.index.npy"
    flip(index, place)
    found = problems(dataset)
    assert {file for file, _, _ in found} == {index.name}
    assert "does not match its checksum" in found[-1][2]


def test_flips_in_items_and_in_the_padding_of_a_tar(dataset: Dataset) -> None:
    items, shard = dataset.path / "train-000000.items.parquet", dataset.path / "train-000001.tar"
    flip(items, 40)
    flip(shard, -1)  # after the end mark: no sample has it
    found = problems(dataset)
    assert {file for file, _, _ in found} == {items.name, shard.name}


def test_missing_and_cut_files_are_all_named(dataset: Dataset) -> None:
    (dataset.path / "train-000000.tar").unlink()
    cut = dataset.path / "train-000001.tar"
    cut.write_bytes(cut.read_bytes()[:600])
    (dataset.path / "held_out-000000.index.npy").unlink()
    found = problems(dataset)
    assert {file for file, _, _ in found} == {
        "train-000000.tar",
        "train-000001.tar",
        "held_out-000000.index.npy",
    }
    assert any("No such file" in what for _, _, what in found)


def test_index_of_another_shard(dataset: Dataset) -> None:
    """It is whole in itself; none of its rows fits."""
    shutil.copy(dataset.path / "train-000001.index.npy", dataset.path / "train-000000.index.npy")
    found = problems(dataset)
    assert found[0][0] == "train-000000.index.npy"
    assert len(found) > 1


def test_items_that_say_something_else(dataset: Dataset) -> None:
    """All sums are right, but a row gives a sample another licence."""
    manifest = read_manifest(dataset.path / "dataset.json")
    shard = manifest.splits["train"].shards[0]
    rows = read_items(dataset.path / str(shard.items)).to_pylist()
    rows[0]["licence"] = "MIT"
    content = items_bytes(rows)
    (dataset.path / str(shard.items)).write_bytes(content)
    changed = replace(shard, items_sha256=hashlib.sha256(content).hexdigest())
    train = manifest.splits["train"]
    splits = {**manifest.splits, "train": replace(train, shards=(changed, *train.shards[1:]))}
    (dataset.path / "dataset.json").write_bytes(manifest_bytes(replace(manifest, splits=splits)))
    ((file, key, what),) = problems(dataset)
    assert (file, key) == (shard.items, "picture0")
    assert what == "it says other licence than the sample"


def test_counts_of_the_manifest(dataset: Dataset) -> None:
    manifest = read_manifest(dataset.path / "dataset.json")
    train = replace(manifest.splits["train"], licences={"CC0-1.0": 7})
    changed = replace(manifest, splits={**manifest.splits, "train": train})
    (dataset.path / "dataset.json").write_bytes(manifest_bytes(changed))
    ((file, _, what),) = problems(dataset)
    assert file == "dataset.json"
    assert "licences of train are not the set's: CC0-1.0: 7 said, 4 found" in what


def test_an_erased_item_that_is_back(dataset: Dataset) -> None:
    sha256 = read_items(dataset.path / "held_out-000000.items.parquet")["sha256"][0].as_py()
    tombstones = Tombstones().with_erasure(
        dataset="old",
        fingerprint="f",
        erased_at="2026-01-02T03:04:05+00:00",
        reason="r",
        requested_by="q",
        items=[("another", sha256)],
    )
    (dataset.path / TOMBSTONES_NAME).write_bytes(tombstones.content())
    ((_, key, what),) = problems(dataset)
    assert key == "picture3"
    assert what == "it was erased from old on 2026-01-02 and must not come back"


def test_what_is_no_set(dataset: Dataset, tmp_path: Path, run: Callable[..., str]) -> None:
    (tmp_path / "empty").mkdir()
    assert "holds neither dataset.json nor a .tar" in run("verify", "empty", code=2)
    manifest = dataset.path / "dataset.json"
    flip(manifest, manifest.read_bytes().index(b"CC0-1.0"))
    assert "does not match its checksum" in run("verify", "small", code=2)
    assert "--workers 0" in run("verify", "small", "--workers", "0", code=2)


def test_many_problems_are_counted_and_some_listed() -> None:
    report = ShardReport()
    for number in range(MAX_LISTED + 5):
        report.add("f", "w", str(number))
    assert (report.num_problems, len(report.problems)) == (MAX_LISTED + 5, MAX_LISTED)


def test_plain_tars(tmp_path: Path, dataset: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    shard = tmp_path / "plain.tar"
    shutil.copy(dataset.path / "train-000000.tar", shard)
    assert verify(str(shard))["num_problems"] == 0
    times = shard.stat()
    flip(shard, shard.read_bytes().index(b"a patch 1"))
    os.utime(shard, ns=(times.st_atime_ns, times.st_mtime_ns))  # else it is indexed anew
    found = verify(str(shard))
    assert [one["key"] for one in found["problems"]] == [None, "picture1"]


@settings(
    deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=strategies.data())
def test_any_flipped_bit_is_found(dataset: Dataset, data: strategies.DataObject) -> None:
    path = data.draw(strategies.sampled_from(sorted(dataset.path.iterdir())))
    content = path.read_bytes()
    place = data.draw(strategies.integers(0, len(content) - 1))
    changed = bytearray(content)
    changed[place] ^= 1 << data.draw(strategies.integers(0, 7))
    path.write_bytes(changed)
    try:
        named = {file for file, _, _ in problems(dataset)}
    except UserError as error:  # the manifest's own damage
        named = {"dataset.json"} if str(dataset.path / "dataset.json") in str(error) else set()
    finally:
        path.write_bytes(content)
    assert path.name in named
