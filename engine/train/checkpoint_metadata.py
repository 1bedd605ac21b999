"""What torch.distributed.checkpoint (DCP) pickles and raises, read with care.

Its own metadata is a pickle, and Megatron-Core's has more classes in it. None of these classes is
made here: each name of an allow-list gives the same inert object, which has the fields that the
file says and no code. Names, shapes, types and places are then taken out of the fields, checked,
and the metadata is built anew; the rest is dropped. So a file can neither run anything nor change a
class, and no entry is left but tensors, which DCP reads with weights_only; it unpickles others.
"""

from __future__ import annotations

import io
import math
import pickle
import warnings
from collections.abc import Iterable
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from torch.distributed.checkpoint.filesystem import FileSystemReader, _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)

from carillon.engine.config import UserError

METADATA = ".metadata"


class CheckedReader(FileSystemReader):
    """DCP's reader with its pickled metadata read by an allow-list."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        content = (Path(self.path) / METADATA).read_bytes()
        try:
            metadata = _built_anew(_FieldsUnpickler(io.BytesIO(content)).load())
        except UserError:
            raise
        except Exception as error:  # a damaged pickle raises whatever it likes
            raise UserError(
                f"checkpoint {self.path}: .metadata cannot be read: "
                f"{str(error) or type(error).__name__}"
            ) from None
        metadata.storage_meta = StorageMeta(load_id=self.load_id)
        return metadata


class _Fields:
    """Stands for any object in the file: its fields, and none of its code."""

    said: Any = None

    def __init__(self, *_: object) -> None: ...

    def __setstate__(self, said: object) -> None:
        # Defined here, it is also what keeps a file from setting attributes of the class itself.
        self.said = said


_DCP = "torch.distributed.checkpoint"
_MEGATRON = "megatron.core.dist_checkpointing.strategies.torch"
# Plain values: these are made as what they are.
_TYPES = frozenset({("torch", "Size"), ("collections", "OrderedDict"), ("builtins", "set")})
# Nothing of these classes and functions is called or kept: find_class gives _Fields for each.
_KNOWN = frozenset(
    (module, name)
    for module, names in {
        f"{_DCP}.metadata": (
            "Metadata MetadataIndex StorageMeta TensorStorageMetadata BytesStorageMetadata "
            "TensorProperties ChunkStorageMetadata _MEM_FORMAT_ENCODING"
        ),
        f"{_DCP}.filesystem": "_StorageInfo _StoragePrefix",
        "torch.serialization": "_get_layout",
        "pathlib": "PosixPath",
        "pathlib._local": "PosixPath",
        # Of Megatron-Core: the metadata's own class, and how the files were planned.
        _MEGATRON: "MCoreMetadata MCoreSavePlan",
        f"{_DCP}.planner": "SavePlan WriteItem WriteItemType TensorWriteData BytesIOWriteData",
    }.items()
    for name in names.split()
)


class _FieldsUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _KNOWN:
            return _Fields
        is_dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if is_dtype or (module, name) in _TYPES:
            return super().find_class(module, name)
        raise UserError(
            f"checkpoint metadata names {module}.{name}, which no checkpoint of ours does"
        )


def _built_anew(read: Any) -> Metadata:
    """torch's own of what was read; whatever is not as it should be raises some Exception."""
    if not isinstance(read, _Fields) or not isinstance(read.said, dict):
        raise ValueError("it is not a checkpoint's metadata")
    entries, places = read.said["state_dict_metadata"], read.said["storage_data"]
    tensors = {
        str(name): _tensor(entry.said)
        for name, entry in entries.items()
        if entry.said is not None  # has fields: not bytes, which are not read here
    }
    stored = {_index(index.said): _place(place.said) for index, place in places.items()}
    for name, tensor in tensors.items():
        for chunk in tensor.chunks:
            place = stored[MetadataIndex(name, chunk.offsets)]
            if math.prod(chunk.sizes) * tensor.properties.dtype.itemsize > place.length:
                raise ValueError(f"{name} is larger than its place in {place.relative_path}")
    return Metadata(state_dict_metadata=dict(tensors), storage_data=stored)


def _tensor(said: dict[str, Any]) -> TensorStorageMetadata:
    dtype = said["properties"].said[0]
    if not isinstance(dtype, torch.dtype):
        raise ValueError(f"{dtype!r} is not a type of values")
    chunks = [
        ChunkStorageMetadata(_size(chunk.said["offsets"]), _size(chunk.said["sizes"]))
        for chunk in said["chunks"]
    ]
    size = _size(said["size"])
    if sum(math.prod(chunk.sizes) for chunk in chunks) != math.prod(size):
        raise ValueError(f"the parts of a tensor of shape {tuple(size)} do not make it up")
    return TensorStorageMetadata(TensorProperties(dtype=dtype), size, chunks)


def _size(said: Iterable[int]) -> torch.Size:
    size = torch.Size(said)
    if min(size, default=0) < 0:
        raise ValueError(f"{tuple(size)} is not a shape")
    return size


def _index(said: dict[str, Any]) -> MetadataIndex:
    offset = said.get("offset")
    return MetadataIndex(str(said["fqn"]), None if offset is None else _size(offset))


def _place(said: dict[str, Any]) -> _StorageInfo:
    file = PurePosixPath(said["relative_path"])
    if file.is_absolute() or ".." in file.parts:
        raise ValueError(f"the file {file} is outside of the checkpoint")
    offset, length = _size([said["offset"], said["length"]])
    if said.get("transform_descriptors"):
        raise ValueError(f"the file {file} is packed in a way that is not written here")
    return _StorageInfo(str(file), offset, length)


def check_files(folder: Path, metadata: Metadata) -> None:
    """Raise UserError for a file that is missing, or ends before what lies in it does."""
    ends: dict[str, int] = {}
    for place in metadata.storage_data.values():
        end = place.offset + place.length
        ends[place.relative_path] = max(end, ends.get(place.relative_path, 0))
    for name, end in ends.items():
        file = folder / name
        if not file.is_file() or file.stat().st_size < end:
            raise UserError(f"checkpoint {folder} cannot be read: {name} is missing or cut short")


def expect_one_process() -> None:
    """One process is what `carillon train` and every reader are; DCP warns of it each time."""
    warnings.filterwarnings("ignore", message="torch.distributed is disabled")


def root_cause(error: BaseException) -> BaseException:
    failures = getattr(error, "failures", None)  # DCP's CheckpointException: rank -> (error, trace)
    cause: BaseException = next(iter(failures.values()))[0] if failures else error
    if isinstance(cause, RuntimeError) and "inline_container" in str(cause):
        # torch.save closing a file that it could not fill; the reason stays in its own process.
        reason = cause.__context__ if isinstance(cause.__context__, OSError) else None
        return reason or OSError("a file could not be written whole; is the disk full?")
    return cause


def told(error: BaseException) -> str:
    """What failed in reading, in a line."""
    cause = root_cause(error)
    lines = str(cause).strip().splitlines()
    return lines[0] if lines else f"a file is cut short or damaged ({type(cause).__name__})"
