"""Embedding stores: unit vectors of a data set by one checkpoint, as a Zarr v3 group.

Arrays: vectors (N, D) float32 or float16, rows (N,) of the split, and strings (ids; for texts also
languages and captions) as UTF-8 bytes with offsets, since Zarr v3 has no settled string type. The
attributes say which checkpoint and data the vectors are of, and hold a SHA-256 of every array: a
flipped bit or a lost chunk (which Zarr would read as zeros) is found before a vector is used.
Written into a temporary sibling folder and renamed, so a store is whole or absent. Left out:
approximate indexes and updates in place.
"""

import hashlib
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np

from carillon.engine.access import explained
from carillon.engine.config import UserError
from carillon.engine.data.publish import check_target, json_of, publish_folder

FORMAT = "carillon-embeddings"
VERSION = 1
CHUNK_ROWS = 2048  # a chunk is written whole: 4 MB at 512 dims, however small the set
DTYPES = ("float32", "float16")
_STRINGS = ("ids", "languages", "captions")
T = TypeVar("T")


class StoreDamaged(UserError):
    """A store is not what was written."""


class StoreBatch(NamedTuple):
    """Some rows of a store: unit vectors (B, D), the row of the split of each, strings."""

    vectors: np.ndarray
    rows: list[int]
    strings: Mapping[str, list[str]]


class EmbeddingStore:
    """A finished store, opened for reading."""

    def __init__(self, path: Path, group: Any) -> None:
        self.path = path
        self.attributes: dict[str, Any] = dict(group.attrs)
        self._group = group

    def __len__(self) -> int:
        return int(self.attributes["num_rows"])

    def blocks(self, num_rows: int = 8 * CHUNK_ROWS) -> Iterator[np.ndarray]:
        """Vectors in order as float32 (up to num_rows, D); use them once all have come.

        Raises: UserError after the last block when the bytes are not those written.
        """
        seen = hashlib.sha256()
        for start in range(0, len(self), num_rows):
            block = self._part("vectors", slice(start, start + num_rows))
            seen.update(block.data)
            yield block.astype(np.float32, copy=False)
        self._compare("vectors", seen.hexdigest())

    def rows(self) -> np.ndarray:
        """Row of the split of each vector, (N,) int64. Raises: UserError when damaged."""
        return self._checked("rows")

    def strings(self, name: str) -> list[str]:
        """`ids`, or a text store's `languages` or `captions`. Raises: UserError when damaged."""
        array = f"{name}_offsets"
        if array not in self.attributes["sha256"] and not (self.path / array).exists():
            kind = self.attributes.get("modality")
            raise ValueError(f"{self.path} is a store of {kind} vectors and holds no {name}")
        offsets = self._checked(array).tolist()
        data = self._checked(f"{name}_bytes").tobytes()
        return [data[a:b].decode() for a, b in pairwise(offsets)]

    def check(self) -> None:
        """Raises: StoreDamaged when the attributes are not of the vectors that are there."""
        size = (self.attributes.get("num_rows"), self.attributes.get("dims"))
        shape = self._read("vectors", lambda array: array.shape)
        if shape != size or not isinstance(self.attributes.get("sha256"), dict):
            raise self._damaged("zarr.json is not what was written")

    def _checked(self, name: str) -> np.ndarray:
        values = self._part(name, slice(None))
        self._compare(name, hashlib.sha256(values.data).hexdigest())
        return values

    def _part(self, name: str, part: slice) -> np.ndarray:
        return self._read(name, lambda array: np.ascontiguousarray(array[part]))

    def _read(self, name: str, read: Callable[[Any], T]) -> T:
        try:
            return read(self._group[name])
        # Zarr raises nearly anything for files that are not what it wrote.
        except Exception as error:
            raise self._damaged(f"{name} cannot be read ({_one_line(error)})") from None

    def _compare(self, name: str, digest: str) -> None:
        if digest != self.attributes["sha256"].get(name):
            raise self._damaged(f"{name} is not what was written")

    def _damaged(self, what: str) -> StoreDamaged:
        return _damaged(self.path, what)


def _damaged(path: Path, what: str) -> StoreDamaged:
    return StoreDamaged(
        f"the store {path} is damaged: {what}; "
        "remove the store and make it again with `carillon embed`"
    )


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def open_store(path: str | Path, expected: Mapping[str, Any] | None = None) -> EmbeddingStore:
    """Open a store, and check that its attributes have the `expected` values.

    Raises: UserError when there is no whole store, or it is of another checkpoint or data set.
    """
    import zarr

    path = Path(path)
    if not (path / "zarr.json").is_file():
        raise UserError(f"{path} is no embedding store; make one with `carillon embed`")
    try:
        store = EmbeddingStore(path, zarr.open_group(path, mode="r", zarr_format=3))
    except PermissionError as error:
        raise UserError(f"the store {path} cannot be opened: {explained(error)}") from None
    except Exception as error:  # as in EmbeddingStore._read
        raise _damaged(path, f"it cannot be opened ({_one_line(error)})") from None
    found = (store.attributes.get("format"), store.attributes.get("version"))
    if found != (FORMAT, VERSION):
        raise UserError(
            f"{path} is no embedding store of version {VERSION}: {found} found; "
            "make one with `carillon embed`"
        )
    store.check()
    for name, value in (expected or {}).items():
        if store.attributes.get(name) != value:
            raise UserError(
                f"the store {path} has {name} {store.attributes.get(name)!r}, "
                f"{value!r} is needed; make it again with `carillon embed`"
            )
    return store


def write_store(
    out: Path,
    batches: Iterable[StoreBatch],
    attributes: Mapping[str, Any],
    *,
    dims: int,
    dtype: str = "float32",
    overwrite: bool = False,
) -> EmbeddingStore:
    """Write all batches and publish the store at `out`.

    Raises: UserError when `out` exists (unless it is a store and `overwrite`), nothing came, or
    the disk fails.
    """
    if dtype not in DTYPES:
        raise UserError(f"dtype {dtype!r} given, allowed: {', '.join(DTYPES)}")
    out = out.absolute()
    check_target(out, "embedding store", _is_store, overwrite=overwrite)
    folder: Path | None = None
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(prefix=f".{out.name}.partial-", dir=out.parent))
        folder.chmod(0o755)
        _Writer(folder, dims, dtype).write(batches, attributes)
        _sync_files(folder)
        check_target(out, "embedding store", _is_store, overwrite=overwrite)
        publish_folder(folder, out)
    except OSError as error:
        raise UserError(f"the store {out} cannot be written: {explained(error)}") from None
    finally:
        if folder is not None:
            shutil.rmtree(folder, ignore_errors=True)
    return open_store(out)


def _is_store(folder: Path) -> bool:
    """Whether it is a store of ours, whole or damaged."""
    attributes = json_of(folder / "zarr.json").get("attributes")
    return isinstance(attributes, dict) and attributes.get("format") == FORMAT


class _Writer:
    """Fills the arrays of a new group, whole chunks at a time, and hashes what it writes."""

    def __init__(self, folder: Path, dims: int, dtype: str) -> None:
        import zarr

        self._group = zarr.create_group(folder, zarr_format=3)
        self._vectors = self._group.create_array(
            "vectors", shape=(0, dims), chunks=(CHUNK_ROWS, dims), dtype=dtype, compressors=None
        )
        self._dtype = np.dtype(dtype)
        self._pending: list[np.ndarray] = []
        self._hash = hashlib.sha256()
        self._digests: dict[str, str] = {}

    def write(self, batches: Iterable[StoreBatch], attributes: Mapping[str, Any]) -> None:
        rows: list[int] = []
        strings: dict[str, list[str]] = {}
        for batch in batches:
            if not np.isfinite(batch.vectors).all():
                raise UserError("the model gives vectors with NaN or infinity: it cannot be used")
            self._pending.append(np.asarray(batch.vectors, dtype=self._dtype))
            rows += batch.rows
            for name, values in batch.strings.items():
                strings.setdefault(name, []).extend(values)
            if sum(map(len, self._pending)) >= CHUNK_ROWS:
                self._flush(whole_chunks=True)
        self._flush(whole_chunks=False)
        if not rows:
            raise UserError("there is nothing to embed: no sample could be read")
        self._digests["vectors"] = self._hash.hexdigest()
        self._array("rows", np.array(rows, dtype=np.int64))
        for name in _STRINGS:
            if name in strings:
                self._string_array(name, strings[name])
        about: dict[str, Any] = {"format": FORMAT, "version": VERSION, **attributes}
        about |= {"num_rows": len(rows), "dims": self._vectors.shape[1]}
        about |= {"dtype": str(self._dtype), "normalised": True, "sha256": self._digests}
        self._group.attrs.update(about)

    def _flush(self, *, whole_chunks: bool) -> None:
        if not self._pending:
            return
        block = np.concatenate(self._pending)
        cut = len(block) // CHUNK_ROWS * CHUNK_ROWS if whole_chunks else len(block)
        done = self._vectors.shape[0]
        self._vectors.resize((done + cut, block.shape[1]))
        self._vectors[done:] = block[:cut]
        self._hash.update(np.ascontiguousarray(block[:cut]).data)
        self._pending = [block[cut:]]

    def _string_array(self, name: str, values: list[str]) -> None:
        encoded = [value.encode() for value in values]
        ends = np.cumsum([0, *map(len, encoded)], dtype=np.int64)
        self._array(f"{name}_offsets", ends)
        self._array(f"{name}_bytes", np.frombuffer(b"".join(encoded) or b"\0", dtype=np.uint8))

    def _array(self, name: str, values: np.ndarray) -> None:
        chunks = (min(len(values), 1 << 20),)
        array = self._group.create_array(
            name, shape=values.shape, chunks=chunks, dtype=values.dtype, compressors=None
        )
        array[:] = values
        self._digests[name] = hashlib.sha256(np.ascontiguousarray(values).data).hexdigest()


def _sync_files(folder: Path) -> None:
    for path in folder.rglob("*"):
        fd = os.open(path, os.O_RDONLY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)
