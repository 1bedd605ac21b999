import hashlib
import json
import os
import pickle
import resource
import subprocess
import sys
import tarfile
import zlib
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pytest

from carillon.engine.config import UserError
from carillon.engine.data.items import item_row, read_items
from carillon.engine.data.manifest import _checksum
from carillon.engine.data.shard_index import index_header
from carillon.engine.data.shards import (
    Dataset,
    SampleError,
    ShardWriter,
    Split,
    open_dataset,
)


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def media_of(number: int) -> bytes:
    return bytes([number % 251]) * (number % 1500 + 1)


def build(out: Path, num_samples: int = 20, *, max_shard_bytes: int = 1 << 20) -> Dataset:
    with ShardWriter(out, name="tiny", source={"by": "test"}, max_shard_bytes=max_shard_bytes) as w:
        for number in range(num_samples):
            meta = {"captions": {"en": [f"number {number}"]}, "licence": "CC0-1.0", "n": number}
            w.write(f"k{number:04d}", {"png": media_of(number)}, meta)
        w.write("held", {"png": b"out"}, {"captions": {"fr": ["dehors", "loin"]}}, split="heldout")
    return open_dataset(out)


def resign(path: Path, change: dict[str, object]) -> None:
    content = json.loads(path.read_text())
    content.pop("checksum")
    content.update(change)
    content["checksum"] = _checksum(content)
    path.write_text(json.dumps(content))


def test_a_written_set_reads_back_over_several_shards(tmp_path: Path) -> None:
    dataset = build(tmp_path / "set", 200, max_shard_bytes=50_000)
    train = dataset.splits["train"]
    assert len(dataset.manifest.splits["train"].shards) > 3
    assert len(train) == 200
    for row in (0, 57, 199, 3):
        sample = train.read(row)
        assert sample.key == train.key(row) == f"k{row:04d}"
        assert sample.medium("image") == media_of(row)
        assert sample.meta["n"] == row
        assert sample.meta["captions"] == {"en": [f"number {row}"]}
    assert dataset.splits["heldout"].read(0).meta["captions"] == {"fr": ["dehors", "loin"]}
    with pytest.raises(IndexError):
        train.read(200)
    content = json.loads((tmp_path / "set" / "dataset.json").read_text())
    assert content["languages"] == {"en": 200, "fr": 2}
    assert content["licences"] == {"CC0-1.0": 200, "unstated": 1}


def test_other_tools_can_read_our_shards(tmp_path: Path) -> None:
    build(tmp_path / "set", 3)
    with tarfile.open(tmp_path / "set" / "train-000000.tar") as tar:
        names = tar.getnames()
        first = tar.extractfile("k0000.png")
        assert first is not None
        assert first.read() == media_of(0)
    assert names[:4] == ["k0000.png", "k0000.json", "k0001.png", "k0001.json"]


def test_the_same_samples_give_the_same_fingerprint_anywhere(tmp_path: Path) -> None:
    first, second = build(tmp_path / "a"), build(tmp_path / "b")
    assert first.fingerprint == second.fingerprint
    assert build(tmp_path / "c", 19).fingerprint != first.fingerprint


def _keys(split: Split) -> list[str]:
    return [split.read(row).key for row in range(len(split))]


def test_a_split_travels_to_other_processes(tmp_path: Path) -> None:
    train = build(tmp_path / "set").splits["train"]
    expected = _keys(train)  # opens files here first: a fork shares them, a pickle has none
    with ProcessPoolExecutor(1, mp_context=get_context("fork")) as pool:
        assert pool.submit(_keys, train).result() == expected
    code = "import pickle, sys; s = pickle.load(sys.stdin.buffer); print(s.read(19).key, len(s))"
    done = subprocess.run(
        [sys.executable, "-c", code], input=pickle.dumps(train), capture_output=True, check=True
    )
    assert done.stdout.split() == [b"k0019", b"20"]


def test_open_files_stay_bounded(tmp_path: Path) -> None:
    dataset = build(tmp_path / "set", 300, max_shard_bytes=1)
    assert len(dataset.manifest.splits["train"].shards) == 300
    before = len(os.listdir("/proc/self/fd"))
    keys = _keys(dataset.splits["train"])
    assert len(keys) == 300
    assert len(os.listdir("/proc/self/fd")) - before <= 2 * 128 + 4


def test_every_flipped_bit_of_a_sample_is_found_before_use(tmp_path: Path) -> None:
    train = build(tmp_path / "set", 2).splits["train"]
    shard = tmp_path / "set" / "train-000000.tar"
    intact = shard.read_bytes()
    with tarfile.open(shard) as tar:
        members = {m.name: m for m in tar.getmembers()}
    for name in ("k0001.png", "k0001.json"):
        for offset in (0, members[name].size - 1):
            damaged = bytearray(intact)
            damaged[members[name].offset_data + offset] ^= 1
            shard.write_bytes(damaged)
            assert train.read(0).key == "k0000"
            with pytest.raises(SampleError, match=r"'k0001': its bytes in train-000000.tar"):
                train.read(1)


def test_a_truncated_shard_is_named_at_opening(tmp_path: Path) -> None:
    build(tmp_path / "set")
    shard = tmp_path / "set" / "train-000000.tar"
    os.truncate(shard, 3000)
    with pytest.raises(UserError, match=r"train-000000\.tar is truncated or altered: 3,000 bytes"):
        open_dataset(tmp_path / "set")
    shard.unlink()
    with pytest.raises(UserError, match=r"train-000000\.tar is missing"):
        open_dataset(tmp_path / "set")


@pytest.mark.parametrize("damage", ["truncate", "lengthen", "empty", "remove"])
def test_an_altered_index_is_refused_at_its_first_touch(tmp_path: Path, damage: str) -> None:
    dataset = build(tmp_path / "set")
    index = tmp_path / "set" / "train-000000.index.npy"
    size = index.stat().st_size
    if damage == "remove":
        index.unlink()
    else:
        os.truncate(index, {"truncate": size - 20, "lengthen": size + 20, "empty": 0}[damage])
    with pytest.raises(
        UserError, match=r"the index .*0\.index\.npy (is|does not match|cannot be read: No)"
    ):
        dataset.splits["train"].key(0)


def test_every_flipped_bit_of_an_index_is_found_before_use(tmp_path: Path) -> None:
    """In the header at the first touch, in a row when that row is read; the other rows are fine."""
    build(tmp_path / "set", 3)
    index = tmp_path / "set" / "train-000000.index.npy"
    intact = index.read_bytes()
    row_bytes = len(np.load(index)[0].tobytes())
    header_bytes = len(intact) - 3 * row_bytes
    refused = r"the index .*train-000000\.index\.npy does not match its checksum"
    for position in range(len(intact)):
        for bit in range(8):
            damaged = bytearray(intact)
            damaged[position] ^= 1 << bit
            index.write_bytes(damaged)
            split = open_dataset(tmp_path / "set").splits["train"]
            hit = (position - header_bytes) // row_bytes
            for row in range(3):
                if hit < 0 or row == hit:
                    with pytest.raises(UserError, match=refused):
                        split.read(row)
                else:
                    assert split.key(row) == f"k{row:04d}"


def test_an_index_cut_or_damaged_while_it_is_open_is_noticed(tmp_path: Path) -> None:
    split = build(tmp_path / "set").splits["train"]
    assert split.key(19) == "k0019"
    index = tmp_path / "set" / "train-000000.index.npy"
    os.truncate(index, index.stat().st_size - 1)
    assert split.key(18) == "k0018"
    with pytest.raises(UserError, match=r"index\.npy does not match its checksum at row 19\. Copy"):
        split.key(19)


def test_nothing_grows_with_the_rows_of_an_index(tmp_path: Path) -> None:
    """A billion rows, 38 GB: all but the last are a hole in the file, which no row is."""
    build(tmp_path / "set", 1)
    path = tmp_path / "set" / "dataset.json"
    splits = json.loads(path.read_text())["splits"]
    index = tmp_path / "set" / "train-000000.index.npy"
    row = np.load(index).tobytes()
    num_rows = 1_000_000_000
    index.write_bytes(index_header(len("k0000"), num_rows))
    with index.open("r+b") as file:
        file.seek((num_rows - 1) * len(row), os.SEEK_END)
        file.write(row)
    splits["train"]["shards"][0]["num_samples"] = num_rows
    resign(path, {"splits": splits})
    train = open_dataset(tmp_path / "set").splits["train"]
    assert train.read(num_rows - 1).medium("image") == media_of(0)
    with pytest.raises(UserError, match="does not match its checksum at row 123,456,789"):
        train.read(123_456_789)


def test_numpy_reads_an_index(tmp_path: Path) -> None:
    build(tmp_path / "set", 200)
    rows = np.load(tmp_path / "set" / "train-000000.index.npy", allow_pickle=False)
    assert rows["key"].tolist() == [f"k{number:04d}".encode() for number in range(200)]
    tar = (tmp_path / "set" / "train-000000.tar").read_bytes()
    for row in rows[:3]:
        span = tar[row["offset"] : row["offset"] + row["size"]]
        assert span.startswith(row["key"] + b".png\0")
        assert span.endswith(b"}")
        assert row["crc32"] == zlib.crc32(span)
    for row in rows[:3]:
        data = row.tobytes()
        assert row["row_crc32"] == zlib.crc32(data[:-4]) == int.from_bytes(data[-4:], "little")


@pytest.mark.parametrize("position", [30, 200, -30])
def test_a_damaged_manifest_is_refused(tmp_path: Path, position: int) -> None:
    build(tmp_path / "set")
    path = tmp_path / "set" / "dataset.json"
    data = bytearray(path.read_bytes())
    data[position] ^= 1
    path.write_bytes(data)
    with pytest.raises(UserError, match=r"dataset\.json"):
        open_dataset(tmp_path / "set")
    path.write_bytes(bytes(data)[:100])
    with pytest.raises(UserError, match=r"dataset\.json is damaged"):
        open_dataset(tmp_path / "set")


class Bomb:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, ("touch unpickled",)


def test_a_pickled_index_is_never_unpickled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    build(tmp_path / "set")
    path = tmp_path / "set" / "dataset.json"
    splits = json.loads(path.read_text())["splits"]
    index = tmp_path / "set" / "train-000000.index.npy"
    size = index.stat().st_size
    np.save(index, np.array([Bomb()], dtype=object), allow_pickle=True)
    os.truncate(index, size)
    splits["train"]["shards"][0]["index_sha256"] = hashlib.sha256(index.read_bytes()).hexdigest()
    resign(path, {"splits": splits})
    with pytest.raises(UserError, match=r"index .* does not match its checksum: its header"):
        open_dataset(tmp_path / "set").splits["train"].read(0)
    assert not (tmp_path / "unpickled").exists()


@pytest.mark.parametrize("field", ["offset", "size"])
def test_a_row_that_points_outside_its_shard_is_refused(tmp_path: Path, field: str) -> None:
    split = build(tmp_path / "set").splits["train"]
    index = tmp_path / "set" / "train-000000.index.npy"
    rows = np.load(index)
    header = index.read_bytes()[: -rows.nbytes]
    rows[field][3] = 2**32 - 1
    rows["row_crc32"][3] = zlib.crc32(rows[3].tobytes()[:-4])  # forged, not damaged
    index.write_bytes(header + rows.tobytes())
    assert split.read(2).key == "k0002"
    with pytest.raises(UserError, match="points past the end of its shard at row 3"):
        split.read(3)


def test_a_shard_that_is_opened_again_is_checked_again(tmp_path: Path) -> None:
    split = build(tmp_path / "set", 40, max_shard_bytes=4096).splits["train"]
    first = [split.read(row) for row in range(40)]
    split._open.clear()  # as when more shards than may stay open were read in between
    assert [split.read(row) for row in range(40)] == first
    split._open.clear()
    os.truncate(tmp_path / "set" / "train-000000.index.npy", 128)
    with pytest.raises(UserError, match=r"train-000000\.index\.npy is truncated or altered"):
        split.read(0)


def test_a_set_of_the_old_format_is_refused_with_what_to_do(tmp_path: Path) -> None:
    build(tmp_path / "set")
    resign(tmp_path / "set" / "dataset.json", {"version": 1})
    message = (
        r"carillon-shards version 1; this version reads .* version 3\. Build the set again, by"
    )
    with pytest.raises(UserError, match=message):
        open_dataset(tmp_path / "set")


def test_a_manifest_cannot_name_files_outside_its_folder(tmp_path: Path) -> None:
    build(tmp_path / "set")
    path = tmp_path / "set" / "dataset.json"
    for name in ("../secret.tar", "/etc/passwd"):
        splits = json.loads(path.read_text())["splits"]
        splits["train"]["shards"][0]["file"] = name
        resign(path, {"splits": splits})
        with pytest.raises(UserError, match="outside its folder"):
            open_dataset(tmp_path / "set")


@pytest.mark.parametrize("key", ["../x", "/x", "a/../b", "a.b", "", "a\0b", "a\\b", "k" * 201])
def test_the_writer_refuses_unsafe_keys(tmp_path: Path, key: str) -> None:
    with ShardWriter(tmp_path / "set", name="tiny", source={}) as writer:
        writer.write("good", {"png": b"1"}, {})
        with pytest.raises(SampleError, match="key must be"):
            writer.write(key, {"png": b"1"}, {})
    assert len(open_dataset(tmp_path / "set").splits["train"]) == 1


def test_the_writer_refuses_duplicates_and_leaves_nothing(tmp_path: Path) -> None:
    def write() -> None:
        with ShardWriter(tmp_path / "set", name="tiny", source={}) as writer:
            writer.write("twice", {"png": b"1"}, {})
            writer.write("twice", {"png": b"2"}, {}, split="validation")

    with pytest.raises(UserError, match="'twice' occurs twice"):
        write()
    assert list(tmp_path.iterdir()) == []


def test_overwriting_replaces_only_when_asked(tmp_path: Path) -> None:
    build(tmp_path / "set", 3)
    with (
        pytest.raises(UserError, match="exists"),
        ShardWriter(tmp_path / "set", name="x", source={}),
    ):
        pass
    assert len(open_dataset(tmp_path / "set").splits["train"]) == 3
    with ShardWriter(tmp_path / "set", name="x", source={}, overwrite=True) as writer:
        writer.write("only", {"png": b"1"}, {})
    assert len(open_dataset(tmp_path / "set").splits["train"]) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["set"]


def test_a_full_disk_is_one_message_and_leaves_nothing(tmp_path: Path) -> None:
    def write() -> None:
        with ShardWriter(tmp_path / "set", name="x", source={}) as writer:
            for number in range(40):
                writer.write(f"k{number}", {"png": bytes(100_000)}, {})

    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, limits[1]))
    try:
        with pytest.raises(UserError, match=r"written: File too large\. Nothing was left"):
            write()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert list(tmp_path.iterdir()) == []


def test_a_failing_sync_is_one_message_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(fd: int) -> None:
        raise OSError(28, "No space left on device")

    def write() -> None:
        with ShardWriter(tmp_path / "set", name="x", source={}) as writer:
            writer.write("k", {"png": b"1"}, {})
            monkeypatch.setattr(os, "fsync", full)

    with pytest.raises(UserError, match=r"No space left on device\. Nothing was left behind"):
        write()
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_written_is_one_message() -> None:
    with (
        pytest.raises(UserError, match=r"cannot be written: .* choose a folder"),
        ShardWriter(Path("/proc/carillon/set"), name="x", source={}),
    ):
        pass


def test_a_sample_may_hold_several_media_or_none(tmp_path: Path) -> None:
    members = {"frames.jpg": b"strip", "mp4": b"v" * 700, "spoken-de.ogg": b"de", "flac": b"sound"}
    meta = {
        "captions": {"en": ["a bell"]},
        "transcripts": {"de": ["eine <b>Glocke</b>"]},
        "licence": "CC0-1.0",
        "licence_source": "README",
        "media": {"mp4": {"width": 64, "height": 48, "duration_s": 1.5}},
    }
    with ShardWriter(tmp_path / "set", name="tiny", source={}) as writer:
        writer.write("first", members, meta)
        writer.write("text", {}, {"captions": {"en": ["no picture"]}})
        writer.write("last", {"png": b""}, {})
    dataset = open_dataset(tmp_path / "set")
    split = dataset.splits["train"]
    first, text, last = (split.read(row) for row in range(3))
    assert first.members == members
    assert first.medium("video") == b"v" * 700
    assert first.medium("audio") == b"sound"  # that without a label, whatever the order
    assert first.medium("image") == b"strip"  # none without a label
    assert first.meta["transcripts"] == {"de": ["eine Glocke"]}
    assert text.members == {}
    assert text.meta["captions"] == {"en": ["no picture"]}
    with pytest.raises(SampleError, match="'text': it has no image; it holds text alone"):
        text.medium("image")
    with pytest.raises(SampleError, match="it has no audio; it holds png"):
        last.medium("audio")
    assert last.medium("image") == b""
    files = dataset.manifest.splits["train"]
    assert files.modalities == {"image": 2, "audio": 1, "video": 1, "text": 2}
    assert files.languages == {"en": 2, "de": 1}
    with tarfile.open(tmp_path / "set" / files.shards[0].file) as tar:
        assert tar.getnames()[:5] == [f"first.{name}" for name in (*members, "json")]


def test_the_items_of_a_shard_say_what_it_holds(tmp_path: Path) -> None:
    dataset = build(tmp_path / "set")
    shard = dataset.manifest.splits["train"].shards[0]
    assert shard.items is not None
    path = tmp_path / "set" / shard.items
    assert hashlib.sha256(path.read_bytes()).hexdigest() == shard.items_sha256
    items = read_items(path).to_pylist()
    assert [item["key"] for item in items] == [f"k{number:04d}" for number in range(20)]
    assert items[3]["sha256"] == hashlib.sha256(media_of(3)).hexdigest()
    assert items[3]["modalities"] == ["image", "text"]
    assert items[3]["languages"] == ["en"]
    assert items[3]["licence"] == "CC0-1.0"
    assert items[3]["width"] is None
    path.write_bytes(b"PAR1 no table")
    with pytest.raises(UserError, match=r"items .*train-000000\.items\.parquet cannot be read"):
        read_items(path)


def test_facts_of_the_main_medium_are_items(tmp_path: Path) -> None:
    facts = {
        "mp4": {"width": 64, "height": 48, "duration_s": 1.5},
        "a.jpg": {"width": 9, "height": 8},
        "ogg": {"duration_s": 3},
    }
    rows = [
        item_row("k", dict.fromkeys(members, b""), {"media": facts}, 0)
        for members in (["mp4", "ogg"], ["a.jpg", "ogg"], ["ogg"], [])
    ]
    found = [(row["width"], row["height"], row["duration_s"]) for row in rows]
    assert found == [(64, 48, 1.5), (9, 8, 3.0), (None, None, 3.0), (None, None, None)]
    odd = {"media": {"ogg": {"duration_s": "long"}, "jpg": {"width": -1, "height": 1e99}}}
    row = item_row("k", {"ogg": b"", "jpg": b""}, odd, 0)
    assert (row["width"], row["height"], row["duration_s"]) == (None, None, None)


@pytest.mark.parametrize("name", ["", "exe", "json", "txt", "a/b.jpg", "../x.jpg", "A.jpg", ".jpg"])
def test_the_writer_refuses_members_that_are_no_media(tmp_path: Path, name: str) -> None:
    with ShardWriter(tmp_path / "set", name="tiny", source={}) as writer:
        writer.write("good", {"png": b"1"}, {})
        with pytest.raises(SampleError, match=r"is no medium; .* jpg, jpeg, png"):
            writer.write("bad", {name: b"1"}, {})
