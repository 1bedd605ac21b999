"""What torch.distributed.checkpoint (DCP) pickles and raises, read with care.

Its own metadata is a pickle: it is read by an unpickler that knows its few classes and nothing
else. Megatron-Core pickles a subclass, and beside it how the file was written: the subclass is read
as its parent, the rest into objects that hold nothing.
"""

from __future__ import annotations

import io
import pickle
import warnings
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta

from carillon.engine.config import UserError

METADATA = ".metadata"


class CheckedReader(FileSystemReader):
    """DCP's reader with its pickled metadata read by an allow-list."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        content = (Path(self.path) / METADATA).read_bytes()
        try:
            metadata = _MetadataUnpickler(io.BytesIO(content)).load()
        except UserError:
            raise
        except Exception as error:  # a damaged pickle raises whatever it likes
            raise UserError(f"checkpoint {self.path}: .metadata cannot be read: {error}") from None
        if not isinstance(metadata, Metadata):
            raise UserError(f"checkpoint {self.path}: .metadata is not a checkpoint's metadata")
        if metadata.storage_meta is None:
            metadata.storage_meta = StorageMeta()
        metadata.storage_meta.load_id = self.load_id
        return metadata


class _Unread:
    """Stands for what a foreign writer noted beside the metadata."""

    def __init__(self, *_: object) -> None: ...

    def __setstate__(self, _: object) -> None: ...


class _MetadataUnpickler(pickle.Unpickler):
    _MODULES = ("torch.distributed.checkpoint.metadata", "torch.distributed.checkpoint.filesystem")
    _NAMES = frozenset(
        {
            ("torch", "Size"),
            ("torch.serialization", "_get_layout"),
            ("collections", "OrderedDict"),
            ("builtins", "set"),
            ("pathlib", "PosixPath"),  # where it was written; never used
            ("pathlib._local", "PosixPath"),
        }
    )

    def find_class(self, module: str, name: str) -> Any:
        is_dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        is_plain_class = module in self._MODULES and "." not in name
        if is_dtype or (module, name) in self._NAMES:
            return super().find_class(module, name)
        if is_plain_class and name in _METADATA_CLASSES:
            return super().find_class(module, name)
        if (module, name) == (_MEGATRON, "MCoreMetadata"):
            return Metadata
        if (module, name) in _UNREAD:
            return _Unread
        raise UserError(
            f"checkpoint metadata names {module}.{name}, which no checkpoint of ours does"
        )


_METADATA_CLASSES = frozenset(
    {
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorStorageMetadata",
        "BytesStorageMetadata",
        "TensorProperties",
        "ChunkStorageMetadata",
        "_MEM_FORMAT_ENCODING",
        "_StorageInfo",
        "_StoragePrefix",
    }
)
_MEGATRON = "megatron.core.dist_checkpointing.strategies.torch"
_PLANNER = "torch.distributed.checkpoint.planner"
_UNREAD = frozenset(
    {(_MEGATRON, "MCoreSavePlan")}
    | {
        (_PLANNER, name)
        for name in (
            "SavePlan",
            "WriteItem",
            "WriteItemType",
            "TensorWriteData",
            "BytesIOWriteData",
        )
    }
)


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
