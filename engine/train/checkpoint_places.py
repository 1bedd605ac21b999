"""Where the bytes of a tensor lie in the files of a form, and how a part of it is written there.

The place of every byte follows from the names, shapes and types alone. So one process makes the
files with their headers, and then each writes its own parts straight to where they belong: nothing
is gathered or joined afterwards, and the files are the same to the byte whatever layout wrote them.
Several machines must share a file system in which they may write to one file (Lustre, GPFS and one
local disk do; for others there is the form dcp, one file a process).

A safetensors file is a header and then all bytes. An array of zarr v3 is a folder with a file for
each chunk; uncompressed, a chunk of some rows is those rows' bytes, the last one filled up to size.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from carillon.engine.data.publish import json_of

INDEX = "model.safetensors.index.json"
GROUP = "tensors.zarr"
SHARD_BYTES = 5_000_000_000  # of a safetensors file, unless one tensor is larger
_CHUNK_BYTES = 64 << 20  # of a chunk of zarr, unless one row is larger
_LARGEST_BYTES = 1 << 62  # of a tensor: what offsets in a file can say

SAFETENSORS_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_ZARR_BITS = {  # what zarr has no type for
    torch.bfloat16: torch.uint16,
    torch.float8_e4m3fn: torch.uint8,
    torch.float8_e5m2: torch.uint8,
}


class Entry(NamedTuple):
    """What a tensor is."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def size_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class Place:
    """The files of one tensor: its bytes, row by row, begin at `start` of the first."""

    entry: Entry
    first: str
    last: str = ""  # the file of chunk i is first + str(i) + last
    start: int = 0
    chunk_bytes: int = 0  # bytes in each file; 0: all in `first`

    def spans(self, begin: int, size_bytes: int) -> Iterator[tuple[str, int, int]]:
        """File, offset in it and length of a run of the tensor's bytes."""
        if not self.chunk_bytes:
            yield self.first, self.start + begin, size_bytes
            return
        end = begin + size_bytes
        while begin < end:
            chunk, offset = divmod(begin, self.chunk_bytes)
            length = min(self.chunk_bytes - offset, end - begin)
            yield f"{self.first}{chunk}{self.last}", offset, length
            begin += length


def make_files(
    form: str, folder: Path, entries: Mapping[str, Entry], shard_bytes: int = SHARD_BYTES
) -> dict[str, Place]:
    """Make the files of safetensors or zarr, at full size with headers and no values yet."""
    if form == "safetensors":
        return _make_safetensors(folder, entries, shard_bytes)
    return _make_zarr(folder, entries)


def _make_safetensors(
    folder: Path, entries: Mapping[str, Entry], shard_bytes: int
) -> dict[str, Place]:
    shards: list[list[str]] = [[]]
    held = 0
    for name in sorted(entries):
        if shards[-1] and held + entries[name].size_bytes > shard_bytes:
            shards.append([])
            held = 0
        shards[-1].append(name)
        held += entries[name].size_bytes
    places: dict[str, Place] = {}
    for i, shard in enumerate(shards, start=1):
        file = f"model-{i:05d}-of-{len(shards):05d}" if len(shards) > 1 else "model"
        file += ".safetensors"
        # The widest types first: then every tensor is aligned to its type.
        order = sorted(shard, key=lambda name: (-entries[name].dtype.itemsize, name))
        header, offset = _header(order, entries)
        for name in order:
            places[name] = Place(entries[name], file, start=offset)
            offset += entries[name].size_bytes
        _make_file(folder / file, offset, header)
    if len(shards) > 1:
        total = sum(entry.size_bytes for entry in entries.values())
        weight_map = {name: places[name].first for name in sorted(places)}
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")
    return places


def _header(names: Sequence[str], entries: Mapping[str, Entry]) -> tuple[bytes, int]:
    """The header of a safetensors file of these tensors, and its length."""
    codes = {dtype: code for code, dtype in SAFETENSORS_DTYPES.items()}
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name in names:
        entry, begin = entries[name], offset
        offset += entry.size_bytes
        header[name] = {
            "dtype": codes[entry.dtype],
            "shape": list(entry.shape),
            "data_offsets": [begin, offset],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text, 8 + len(text)


def _make_zarr(folder: Path, entries: Mapping[str, Entry]) -> dict[str, Place]:
    group = folder / GROUP
    group.mkdir()
    _write_json(group / "zarr.json", {"zarr_format": 3, "node_type": "group", "attributes": {}})
    places: dict[str, Place] = {}
    for name in sorted(entries):
        entry = entries[name]
        row_bytes = math.prod(entry.shape[1:]) * entry.dtype.itemsize
        rows = max(1, min([_CHUNK_BYTES // max(row_bytes, 1), *entry.shape[:1]]))
        (group / name).mkdir()
        _write_json(group / name / "zarr.json", _array_json(entry, rows))
        places[name] = _zarr_place(name, entry, rows)
        for file in dict.fromkeys(span[0] for span in places[name].spans(0, entry.size_bytes)):
            (folder / file).parent.mkdir(parents=True, exist_ok=True)
            _make_file(folder / file, places[name].chunk_bytes or entry.size_bytes)
    return places


def _zarr_place(name: str, entry: Entry, rows: int) -> Place:
    if not entry.shape:
        return Place(entry, f"{GROUP}/{name}/c")
    chunk_bytes = max(rows * math.prod(entry.shape[1:]) * entry.dtype.itemsize, 1)
    rest = "/0" * (len(entry.shape) - 1)
    return Place(entry, f"{GROUP}/{name}/c/", rest, chunk_bytes=chunk_bytes)


def open_zarr(folder: Path) -> dict[str, Place]:
    """The arrays of a group that was written here. Raises ValueError or OSError for any other."""
    if json_of(folder / GROUP / "zarr.json").get("node_type") != "group":
        raise ValueError("its zarr.json is not a group's")
    places: dict[str, Place] = {}
    for file in sorted((folder / GROUP).glob("*/zarr.json")):
        said, name = json_of(file), file.parent.name
        try:
            entry = Entry(tuple(said["shape"]), getattr(torch, said["attributes"]["dtype"]))
            rows = [*said["chunk_grid"]["configuration"]["chunk_shape"], 1][0]
            known = {key: said[key] for key in _array_json(entry, rows)} == _array_json(entry, rows)
            known = known and all(type(size) is int and size >= 0 for size in (rows, *entry.shape))
        except (KeyError, TypeError, AttributeError):
            known = False
        if not known or not rows or entry.size_bytes > _LARGEST_BYTES:
            raise ValueError(f"the zarr.json of {name} is not what is written here")
        places[name] = _zarr_place(name, entry, rows)
    return places


def check_chunks(folder: Path, place: Place) -> None:
    """Raises OSError unless every chunk of an array is there; stops at the first that is not."""
    for name, _, _ in place.spans(0, place.entry.size_bytes):
        os.close(_open_chunk(folder / name, place))


def _array_json(entry: Entry, rows: int) -> dict[str, Any]:
    """The metadata of one array in chunks of rows. Source: the zarr v3 core specification, section
    "Metadata"."""
    chunk = [rows, *(max(size, 1) for size in entry.shape[1:])] if entry.shape else []
    stored = _ZARR_BITS.get(entry.dtype, entry.dtype)
    little = {"configuration": {"endian": "little"}} if stored.itemsize > 1 else {}
    zero: float | bool = 0.0 if stored.is_floating_point else 0
    return {
        "zarr_format": 3,
        "node_type": "array",
        "shape": list(entry.shape),
        "data_type": _name(stored),
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": chunk}},
        "chunk_key_encoding": {"name": "default", "configuration": {"separator": "/"}},
        "fill_value": False if stored is torch.bool else zero,
        "codecs": [{"name": "bytes"} | little],
        "attributes": {"dtype": _name(entry.dtype)},
    }


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n")


def _make_file(path: Path, size_bytes: int, header: bytes = b"") -> None:
    with path.open("xb") as file:
        file.write(header)
        file.truncate(size_bytes)


def runs(
    shape: Sequence[int], offsets: Sequence[int], sizes: Sequence[int]
) -> Iterator[tuple[int, int]]:
    """First value, in row-major order of the whole, and number of values of each run of a part."""
    if math.prod(sizes) == 0:
        return
    split = len(shape) - 1  # the innermost dim that is not whole: runs are of it and all inside
    while split > 0 and sizes[split] == shape[split]:
        split -= 1
    strides = [math.prod(shape[dim + 1 :]) for dim in range(len(shape))]
    inside = math.prod(sizes[max(split, 0) :])
    base = sum(offset * stride for offset, stride in zip(offsets, strides, strict=True))
    for index in product(*(range(size) for size in sizes[: max(split, 0)])):
        yield base + sum(i * strides[dim] for dim, i in enumerate(index)), inside


class PartWriter:
    """Writes parts of tensors to their places; `close` syncs what it wrote."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._handles: dict[str, int] = {}

    def write(self, place: Place, offsets: Sequence[int], part: Tensor) -> None:
        """Put a part, on the CPU, at its offsets in the whole tensor."""
        values: Any = part.detach().contiguous().reshape(-1).view(torch.uint8).numpy()
        content, item_bytes, done = memoryview(values), part.dtype.itemsize, 0
        for first, num in runs(place.entry.shape, offsets, part.shape):
            for file, offset, length in place.spans(first * item_bytes, num * item_bytes):
                self._put(file, content[done : done + length], offset)
                done += length

    def _put(self, file: str, content: memoryview, offset: int) -> None:
        if file not in self._handles:
            if len(self._handles) >= 64:  # a chunk is a file, and open files are limited
                self.close()
            self._handles[file] = os.open(self._folder / file, os.O_WRONLY)
        while content:  # a call may write less than it is given, as before a disk is full
            written = os.pwrite(self._handles[file], content, offset)
            content, offset = content[written:], offset + written

    def close(self) -> None:
        try:
            for handle in self._handles.values():
                os.fsync(handle)
        finally:
            for handle in self._handles.values():
                os.close(handle)
            self._handles.clear()


def read_part(folder: Path, place: Place, offsets: Sequence[int], sizes: Sequence[int]) -> Tensor:
    """A part of a tensor from its place. Raises OSError for a file that is missing or cut short."""
    item_bytes = place.entry.dtype.itemsize
    content, done = bytearray(math.prod(sizes) * item_bytes), 0
    file, handle = "", -1
    try:
        for first, num in runs(place.entry.shape, offsets, sizes):
            for name, offset, length in place.spans(first * item_bytes, num * item_bytes):
                if name != file:  # runs go through the files in order
                    if handle >= 0:
                        os.close(handle)
                    handle, file = -1, name
                    handle = _open_chunk(folder / name, place)
                piece = os.pread(handle, length, offset)
                while len(piece) < length:  # a call may give less than it is asked for
                    more = os.pread(handle, length - len(piece), offset + len(piece))
                    if not more:
                        raise OSError(f"{name} is cut short")
                    piece += more
                content[done : done + length] = piece
                done += length
    finally:
        if handle >= 0:
            os.close(handle)
    if not content:
        return torch.empty(tuple(sizes), dtype=place.entry.dtype)
    return torch.frombuffer(content, dtype=torch.uint8).view(place.entry.dtype).view(tuple(sizes))


def _open_chunk(path: Path, place: Place) -> int:
    expected = place.chunk_bytes or place.entry.size_bytes
    handle = os.open(path, os.O_RDONLY)
    if os.fstat(handle).st_size != expected:
        os.close(handle)
        raise OSError(f"{path} has not the {expected} bytes of a chunk")
    return handle
