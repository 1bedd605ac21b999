"""Reads the tensors of a checkpoint that torch.distributed.checkpoint (DCP) wrote.

DCP's own metadata is a pickle: it is read by an unpickler that knows its few classes and nothing
else, after the manifest was verified.
"""

from __future__ import annotations

import io
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta, TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load as load_tensors

from carillon.engine.config import UserError
from carillon.engine.train.checkpoint import Checkpoint, expect_one_process, root_cause


def read_tensors(
    checkpoint: Checkpoint,
    tensors: Mapping[str, Tensor],
    *,
    partial: bool,
    shapes: Mapping[str, torch.Size] | None = None,
) -> None:
    """Fill `tensors` in place, whatever layout wrote them.

    `partial` allows the checkpoint to hold more (optimizer state when only weights are wanted).
    `shapes` are those of the whole model's tensors where this process has a part of them only.
    Raises UserError when names or shapes are not this model's. Call `verify` first.
    """
    expect_one_process()
    if not (checkpoint.path / ".metadata").is_file():
        raise UserError(
            f"checkpoint {checkpoint.path} is in a form that is not trained from: make one that is "
            "by 'carillon checkpoint convert FOLDER --to dcp --out FOLDER'"
        )
    reader = CheckedReader(checkpoint.path)
    shapes = shapes or {name: tensor.shape for name, tensor in tensors.items()}
    _check_same_model(reader.read_metadata(), shapes, checkpoint, partial)
    try:
        load_tensors(dict(tensors), storage_reader=reader, no_dist=not dist.is_initialized())
    except CheckpointException as error:  # a BaseException of DCP's, around any failure to read
        cause = str(root_cause(error)).splitlines()[0]
        raise UserError(f"checkpoint {checkpoint.path} cannot be read: {cause}") from error


def _check_same_model(
    metadata: Metadata, shapes: Mapping[str, torch.Size], checkpoint: Checkpoint, partial: bool
) -> None:
    stored = {
        name: entry.size
        for name, entry in metadata.state_dict_metadata.items()
        if isinstance(entry, TensorStorageMetadata)
    }
    missing = sorted(set(shapes) - set(stored))
    extra = [] if partial else sorted(set(stored) - set(shapes))
    wrong = sorted(n for n, shape in shapes.items() if n in stored and shape != stored[n])
    problems = [
        f"{len(names)} {what} (first: {names[0]})"
        for names, what in ((missing, "missing"), (extra, "unknown"), (wrong, "of another shape"))
        if names
    ]
    if problems:
        raise UserError(
            f"checkpoint {checkpoint.path} is of another model: tensors {'; '.join(problems)}. "
            "Train with the config that wrote it, or start a run of another name"
        )


class CheckedReader(FileSystemReader):
    """DCP's reader with its pickled metadata read by an allow-list."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        content = (Path(self.path) / ".metadata").read_bytes()
        metadata = _MetadataUnpickler(io.BytesIO(content)).load()
        if not isinstance(metadata, Metadata):
            raise UserError(f"checkpoint {self.path}: .metadata is not a checkpoint's metadata")
        if metadata.storage_meta is None:
            metadata.storage_meta = StorageMeta()
        metadata.storage_meta.load_id = self.load_id
        return metadata


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
