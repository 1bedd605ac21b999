"""Fills a model's tensors from a checkpoint, whatever layout and form wrote it.

Each process reads the parts that it holds, through torch.distributed.checkpoint (DCP); the form is
found, not configured. What one process cannot open, every process refuses.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner
from torch.distributed.checkpoint.state_dict_loader import load as load_tensors
from torch.distributed.checkpoint.storage import StorageReader
from torch.futures import Future

from carillon.engine.config import UserError
from carillon.engine.train.checkpoint import Checkpoint
from carillon.engine.train.checkpoint_forms import PartSource, form_of, open_parts
from carillon.engine.train.checkpoint_metadata import CheckedReader, expect_one_process, told

T = TypeVar("T")


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
    shapes = shapes or {name: tensor.shape for name, tensor in tensors.items()}
    reader = _agreed(lambda: _open(checkpoint, shapes, partial))
    try:
        load_tensors(dict(tensors), storage_reader=reader, no_dist=not dist.is_initialized())
    except CheckpointException as error:  # a BaseException of DCP's, around any failure to read
        raise UserError(f"checkpoint {checkpoint.path} cannot be read: {told(error)}") from error


def _open(checkpoint: Checkpoint, shapes: Mapping[str, torch.Size], partial: bool) -> StorageReader:
    path = checkpoint.path
    form = form_of(path)
    reader: StorageReader
    if form == "torch_dist":
        raise UserError(
            f"checkpoint {path} is in a form that is not trained from: make one that is by "
            "'carillon checkpoint convert FOLDER --to dcp --out FOLDER'"
        )
    if form == "dcp":
        reader = CheckedReader(path)
    else:
        reader = _PartReader(open_parts(path, checkpoint.step, form))
    _check_same_model(reader.read_metadata(), shapes, checkpoint, partial)
    return reader


def _agreed(work: Callable[[], T]) -> T:
    """The result of `work`, or on every process the first that a process was refused."""
    if not dist.is_initialized():
        return work()
    result: T | None = None
    refusal: str | None = None
    try:
        result = work()
    except (UserError, OSError) as error:
        refusal = str(error)
    refusals: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(refusals, refusal)
    first = next((text for text in refusals if text is not None), None)
    if first is not None:
        raise UserError(first)
    assert result is not None
    return result


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


class _PartReader(StorageReader):
    """Gives DCP the parts that it asks for, from a form that holds whole tensors."""

    def __init__(self, source: PartSource) -> None:
        self._source = source

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None: ...

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        stored = {
            name: TensorStorageMetadata(
                properties=TensorProperties(dtype=entry.dtype),
                size=torch.Size(entry.shape),
                chunks=[
                    ChunkStorageMetadata(
                        offsets=torch.Size([0] * len(entry.shape)), sizes=torch.Size(entry.shape)
                    )
                ],
            )
            for name, entry in self._source.entries.items()
        }
        return Metadata(state_dict_metadata=dict(stored))

    def set_up_storage_reader(
        self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any
    ) -> None: ...

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        return plans

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        for item in plan.items:
            name = item.storage_index.fqn
            target = planner.resolve_tensor(item).detach()
            target.copy_(self._source.read_part(name, item.storage_offsets, item.lengths))
            planner.commit_tensor(item, target)
        done: Future[None] = Future()
        done.set_result(None)
        return done

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        return True
