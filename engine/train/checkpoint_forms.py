"""The forms of a checkpoint's tensors on disk, read and written without a distributed start.

| form | files | for |
| --- | --- | --- |
| dcp | .metadata, *.distcp | training: it saves and resumes this form, in any layout |
| safetensors | model*.safetensors, with an index where there are several | Hugging Face's tools |
| zarr | tensors.zarr, a group with one array a tensor (v3) | reading parts, from any language |

Every form has the same state.json and manifest.json beside it, and the same bytes in each tensor.
zarr has no bfloat16 or float8: such an array holds the bits as whole numbers, and its attribute
`dtype` has torch's name.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_saver import save

from carillon.engine.config import UserError
from carillon.engine.train.checkpoint import Checkpoint, expect_one_process
from carillon.engine.train.checkpoint_reader import CheckedReader, read_tensors

FORMS = ("dcp", "safetensors", "zarr")
INDEX = "model.safetensors.index.json"
GROUP = "tensors.zarr"
_BATCH_BYTES = 1 << 30  # tensors held at a time between two forms, unless one is larger


class Entry(NamedTuple):
    """What a tensor is."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def size_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


class TensorSource(Protocol):
    """The tensors of one checkpoint."""

    form: str
    entries: Mapping[str, Entry]

    def read(self, names: Sequence[str]) -> dict[str, Tensor]:
        """These tensors, on the CPU."""


def open_tensors(checkpoint: Checkpoint) -> TensorSource:
    """The tensors of a checkpoint that was verified. Raises UserError for an unknown form."""
    path = checkpoint.path
    if (path / ".metadata").is_file():
        return _DcpSource(checkpoint)
    if any(path.glob("*.safetensors")):
        return _SafetensorsSource(path)
    if (path / GROUP).is_dir():
        return _ZarrSource(path)
    raise UserError(f"{path} holds no tensors in a known form: {', '.join(FORMS)}")


class _DcpSource:
    form = "dcp"

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._checkpoint = checkpoint
        metadata = CheckedReader(checkpoint.path).read_metadata().state_dict_metadata
        self.entries: Mapping[str, Entry] = {
            name: Entry(tuple(entry.size), entry.properties.dtype)
            for name, entry in metadata.items()
            if isinstance(entry, TensorStorageMetadata)
        }

    def read(self, names: Sequence[str]) -> dict[str, Tensor]:
        tensors = {name: torch.empty(e.shape, dtype=e.dtype) for name, e in self._of(names)}
        read_tensors(self._checkpoint, tensors, partial=True)
        return tensors

    def _of(self, names: Sequence[str]) -> Iterator[tuple[str, Entry]]:
        return ((name, self.entries[name]) for name in names)


class _SafetensorsSource:
    form = "safetensors"

    def __init__(self, path: Path) -> None:
        self._files: dict[str, Path] = {}
        entries: dict[str, Entry] = {}
        for file in sorted(path.glob("*.safetensors")):
            try:
                with safe_open(file, framework="pt") as opened:
                    for name in opened.keys():  # noqa: SIM118 (it is no mapping)
                        part = opened.get_slice(name)
                        dtype = _SAFETENSORS_DTYPES[part.get_dtype()]
                        entries[name] = Entry(tuple(part.get_shape()), dtype)
                        self._files[name] = file
            except (SafetensorError, KeyError, OSError) as error:
                raise UserError(f"{file} cannot be read: {error}") from None
        self.entries: Mapping[str, Entry] = entries

    def read(self, names: Sequence[str]) -> dict[str, Tensor]:
        tensors: dict[str, Tensor] = {}
        for file in dict.fromkeys(self._files[name] for name in names):
            with safe_open(file, framework="pt") as opened:
                here = [name for name in names if self._files[name] == file]
                tensors |= {name: opened.get_tensor(name) for name in here}
        return tensors


_SAFETENSORS_DTYPES = {
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


class _ZarrSource:
    form = "zarr"

    def __init__(self, path: Path) -> None:
        import zarr

        group = zarr.open_group(path / GROUP, mode="r", zarr_format=3)
        self._arrays: dict[str, Any] = dict(group.arrays())
        entries: dict[str, Entry] = {}
        for name, array in self._arrays.items():
            dtype = getattr(torch, str(array.attrs.get("dtype")), None)
            if not isinstance(dtype, torch.dtype):
                raise UserError(f"{path / GROUP}: {name} has no torch type in its attributes")
            entries[name] = Entry(tuple(array.shape), dtype)
        self.entries: Mapping[str, Entry] = entries

    def read(self, names: Sequence[str]) -> dict[str, Tensor]:
        return {name: self._read(name) for name in names}

    def _read(self, name: str) -> Tensor:
        entry = self.entries[name]
        bits = torch.from_numpy(self._arrays[name][...].reshape(-1).copy())
        return bits.view(entry.dtype).view(entry.shape)


def write_tensors(
    form: str, folder: Path, source: TensorSource, names: Mapping[str, str], shard_bytes: int
) -> None:
    """Write tensors of `source` into an existing empty folder.

    `names` has the name in the source by the name to give; a safetensors file takes up to
    `shard_bytes` of them. Only dcp needs memory for all at once.
    """
    if form == "dcp":
        expect_one_process()
        tensors = source.read(list(names.values()))
        renamed = {name: tensors[old] for name, old in names.items()}
        save(renamed, storage_writer=FileSystemWriter(folder, sync_files=True), no_dist=True)
    elif form == "safetensors":
        _write_safetensors(folder, source, names, shard_bytes)
    else:
        _write_zarr(folder, source, names)


def _batches(
    source: TensorSource, names: Mapping[str, str], limit_bytes: int
) -> Iterator[dict[str, str]]:
    """In order, as many at a time as fit in the limit, at least one."""
    batch: dict[str, str] = {}
    held = 0
    for name, old in names.items():
        size = source.entries[old].size_bytes
        if batch and held + size > limit_bytes:
            yield batch
            batch, held = {}, 0
        batch[name] = old
        held += size
    if batch:
        yield batch


def _read_as(source: TensorSource, names: Mapping[str, str]) -> dict[str, Tensor]:
    tensors = source.read(list(names.values()))
    return {name: tensors[old].contiguous() for name, old in names.items()}


def _write_safetensors(
    folder: Path, source: TensorSource, names: Mapping[str, str], shard_bytes: int
) -> None:
    shards = list(_batches(source, names, shard_bytes))
    files = ["model.safetensors"]
    if len(shards) > 1:
        files = [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    for file, shard in zip(files, shards, strict=True):
        save_file(_read_as(source, shard), folder / file, metadata={"format": "pt"})
    if len(shards) > 1:
        total = sum(source.entries[old].size_bytes for old in names.values())
        weight_map = {
            name: file for file, shard in zip(files, shards, strict=True) for name in shard
        }
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")


def _write_zarr(folder: Path, source: TensorSource, names: Mapping[str, str]) -> None:
    import zarr

    group = zarr.create_group(folder / GROUP, zarr_format=3)
    for batch in _batches(source, names, _BATCH_BYTES):
        for name, tensor in _read_as(source, batch).items():
            bits = tensor.view(-1).view(_ZARR_BITS.get(tensor.dtype, tensor.dtype))
            values: Any = bits.numpy().reshape(tensor.shape)
            chunks = tuple(max(size, 1) for size in values.shape)
            array = group.create_array(
                name, shape=values.shape, chunks=chunks, dtype=values.dtype, compressors=None
            )
            array[...] = values
            array.attrs["dtype"] = str(tensor.dtype).removeprefix("torch.")


def counted(entries: Iterable[Entry]) -> tuple[int, int, int]:
    """Tensors, their values and their bytes."""
    given = list(entries)
    return len(given), sum(math.prod(e.shape) for e in given), sum(e.size_bytes for e in given)
