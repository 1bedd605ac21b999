"""Stores come back as written, are whole or absent, and say when they are damaged."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import zarr

from carillon.engine.config import UserError
from carillon.engine.index import store as store_module
from carillon.engine.index.store import EmbeddingStore, StoreBatch, open_store, write_store

ABOUT = {"checkpoint_hash": "c1", "data_fingerprint": "d1", "modality": "image", "split": "train"}


def _vectors(count: int) -> np.ndarray:
    values = np.random.default_rng(0).normal(size=(count, 6)).astype(np.float32)
    return values / np.linalg.norm(values, axis=1, keepdims=True)


def _batches(count: int, size: int = 7) -> Iterator[StoreBatch]:
    values = _vectors(count)
    for start in range(0, count, size):
        rows = list(range(start, min(start + size, count)))
        yield StoreBatch(values[rows], rows, {"ids": [f"é{row}" for row in rows]})


def _write(out: Path, count: int = 50, **options: object) -> EmbeddingStore:
    return write_store(out, _batches(count), ABOUT, dims=6, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("count", [1, 7, 16, 50])
def test_what_is_written_is_read(
    tmp_path: Path, count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store_module, "CHUNK_ROWS", 16)
    _write(tmp_path / "s.zarr", count)
    store = open_store(tmp_path / "s.zarr", ABOUT)
    np.testing.assert_array_equal(np.concatenate(list(store.blocks(13))), _vectors(count))
    assert store.strings("ids") == [f"é{row}" for row in range(count)]
    assert store.rows().tolist() == list(range(count))
    assert len(store) == count
    # Any Zarr v3 reader can open it.
    group = zarr.open_group(tmp_path / "s.zarr", mode="r", zarr_format=3)
    assert group["vectors"].shape == (count, 6)
    assert [path.name for path in tmp_path.iterdir()] == ["s.zarr"]


def test_half_precision_halves_the_vectors(tmp_path: Path) -> None:
    store = _write(tmp_path / "s.zarr", dtype="float16")
    (block,) = store.blocks()
    assert block.dtype == np.float32
    np.testing.assert_array_equal(block, _vectors(50).astype(np.float16))
    assert store.attributes["dtype"] == "float16"


@pytest.mark.parametrize(
    ("file", "old", "new"),
    [
        ("zarr.json", '"num_rows"', '"num_rovs"'),
        ("zarr.json", '"sha256"', '"sha25v"'),
        ("zarr.json", '"ids_offsets"', '"idr_offsets"'),
        ("zarr.json", '"num_rows": 50', '"num_rows": -0'),
        ("zarr.json", '"dims": 6', '"dims": 7'),
        ("zarr.json", '"group"', '"grouq"'),
        ("vectors/zarr.json", "    6\n  ],", "    7\n  ],"),
        ("ids_offsets/zarr.json", '"shape"', '"shapf"'),
        ("vectors/zarr.json", '"float32"', '"floaf32"'),
    ],
)
def test_metadata_that_changed_is_one_message(
    tmp_path: Path, file: str, old: str, new: str
) -> None:
    _write(tmp_path / "s.zarr")
    text = (tmp_path / "s.zarr" / file).read_text()
    assert old in text
    (tmp_path / "s.zarr" / file).write_text(text.replace(old, new))
    with pytest.raises(UserError, match=r"is damaged.*make it again with `carillon embed`"):
        (list((s := open_store(tmp_path / "s.zarr")).blocks()), s.rows(), s.strings("ids"))


def test_a_chunk_that_is_cut_short_is_one_message(tmp_path: Path) -> None:
    _write(tmp_path / "s.zarr")
    chunk = tmp_path / "s.zarr" / "vectors/c/0/0"
    chunk.write_bytes(chunk.read_bytes()[:100])
    with pytest.raises(UserError, match="is damaged"):
        list(open_store(tmp_path / "s.zarr").blocks())


@pytest.mark.parametrize("where", ["vectors/c/0/0", "rows/c/0", "ids_bytes/c/0"])
@pytest.mark.parametrize("lost", [False, True])
def test_flipped_bits_and_lost_chunks_are_found(tmp_path: Path, where: str, lost: bool) -> None:
    _write(tmp_path / "s.zarr")
    chunk = tmp_path / "s.zarr" / where
    data = bytearray(chunk.read_bytes())
    data[100] ^= 4
    if lost:
        chunk.unlink()
    else:
        chunk.write_bytes(data)
    store = open_store(tmp_path / "s.zarr")
    with pytest.raises(UserError, match="is damaged"):
        (list(store.blocks()), store.rows(), store.strings("ids"))


def test_a_failed_write_leaves_nothing(tmp_path: Path) -> None:
    def breaking() -> Iterator[StoreBatch]:
        yield from _batches(20)
        raise RuntimeError("power cut")

    with pytest.raises(RuntimeError, match="power cut"):
        write_store(tmp_path / "s.zarr", breaking(), ABOUT, dims=6)
    with pytest.raises(UserError, match="nothing to embed"):
        write_store(tmp_path / "s.zarr", [], ABOUT, dims=6)
    bad = StoreBatch(np.full((1, 6), np.nan, np.float32), [0], {"ids": ["a"]})
    with pytest.raises(UserError, match="NaN"):
        write_store(tmp_path / "s.zarr", [bad], ABOUT, dims=6)
    assert not list(tmp_path.iterdir())


def test_an_existing_store_stays_unless_told(tmp_path: Path) -> None:
    _write(tmp_path / "s.zarr", 5)
    with pytest.raises(UserError, match="exists"):
        _write(tmp_path / "s.zarr", 6)
    assert len(open_store(tmp_path / "s.zarr")) == 5
    assert len(_write(tmp_path / "s.zarr", 6, overwrite=True)) == 6
    assert [path.name for path in tmp_path.iterdir()] == ["s.zarr"]


def test_only_a_store_is_overwritten(tmp_path: Path) -> None:
    zarr.create_group(tmp_path / "other.zarr", zarr_format=3)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text("mine")
    for name in ("other.zarr", "run"):
        with pytest.raises(UserError, match=r"no embedding store made by .*Nothing was removed"):
            _write(tmp_path / name, overwrite=True)
    assert (tmp_path / "run" / "config.yaml").read_text() == "mine"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["other.zarr", "run"]


def test_a_store_of_another_checkpoint_is_refused(tmp_path: Path) -> None:
    _write(tmp_path / "s.zarr")
    with pytest.raises(UserError, match="has checkpoint_hash 'c1', 'c2' is needed"):
        open_store(tmp_path / "s.zarr", ABOUT | {"checkpoint_hash": "c2"})
    with pytest.raises(UserError, match="no embedding store"):
        open_store(tmp_path / "missing.zarr")
    zarr.create_group(tmp_path / "other.zarr", zarr_format=3)
    with pytest.raises(UserError, match="no embedding store of version 1"):
        open_store(tmp_path / "other.zarr")
    (tmp_path / "broken.zarr").mkdir()
    (tmp_path / "broken.zarr" / "zarr.json").write_text("{")
    with pytest.raises(UserError, match="cannot be opened"):
        open_store(tmp_path / "broken.zarr")
    with pytest.raises(UserError, match="dtype 'int8' given"):
        _write(tmp_path / "new.zarr", dtype="int8")
