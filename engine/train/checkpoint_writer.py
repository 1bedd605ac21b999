"""Writes tensors in a form: from every process its own shards, or one source after another.

Training goes through torch.distributed.checkpoint (DCP), which asks a writer for a plan on one
process and for the data on each; converting goes tensor by tensor in one process.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from contextlib import closing
from pathlib import Path

from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from carillon.engine.train.checkpoint_forms import TensorSource
from carillon.engine.train.checkpoint_megatron import foreign_name, write_beside
from carillon.engine.train.checkpoint_metadata import expect_one_process
from carillon.engine.train.checkpoint_places import Entry, PartWriter, make_files

_BATCH_BYTES = 1 << 30  # tensors held at a time between two forms, unless one is larger


def storage_writer(form: str, folder: Path) -> FileSystemWriter:
    """DCP's writer of a form that training saves."""
    if form == "dcp":
        return FileSystemWriter(folder, sync_files=True)
    return _PlacedWriter(form, folder)


class _PlacedWriter(FileSystemWriter):
    """Each process writes its shards to their places in the files of safetensors or zarr."""

    def __init__(self, form: str, folder: Path) -> None:
        super().__init__(folder)
        self._form = form

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        """On one process: the files, and in each plan the places of its tensors."""
        entries: dict[str, Entry] = {}
        for item in (item for plan in plans for item in plan.items):
            assert item.tensor_data is not None  # everything else is in state.json
            dtype = item.tensor_data.properties.dtype
            entries[item.index.fqn] = Entry(tuple(item.tensor_data.size), dtype)
        places = make_files(self._form, Path(self.path), entries)
        return [
            dataclasses.replace(
                plan, storage_data={item.index.fqn: places[item.index.fqn] for item in plan.items}
            )
            for plan in plans
        ]

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        results: list[WriteResult] = []
        with closing(PartWriter(Path(self.path))) as writer:
            for item in plan.items:
                assert item.tensor_data is not None
                part = planner.resolve_data(item).cpu()  # type: ignore[union-attr]
                offsets = item.tensor_data.chunk.offsets
                writer.write(plan.storage_data[item.index.fqn], offsets, part)
                results.append(WriteResult(item.index, part.nbytes, None))
        done: Future[list[WriteResult]] = Future()
        done.set_result(results)
        return done

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """Nothing: headers and zarr.json say all, and no pickle is left."""


def write_tensors(
    form: str, folder: Path, source: TensorSource, names: Mapping[str, str], shard_bytes: int
) -> None:
    """Write tensors of `source` into an existing empty folder.

    `names` has the name in the source by the name to give; a safetensors file takes up to
    `shard_bytes` of them. dcp and torch_dist need memory for all at once.
    """
    if form in ("dcp", "torch_dist"):
        expect_one_process()
        tensors = source.read(list(names.values()))
        named = foreign_name if form == "torch_dist" else str
        renamed = {named(name): tensors[old] for name, old in names.items()}
        save(renamed, storage_writer=FileSystemWriter(folder, sync_files=True), no_dist=True)
        if form == "torch_dist":
            write_beside(folder, source.step)
        return
    entries = {name: source.entries[old] for name, old in names.items()}
    places = make_files(form, folder, entries, shard_bytes)
    with closing(PartWriter(folder)) as writer:
        for batch in _batches(source, names):
            tensors = source.read(list(batch.values()))
            for name, old in batch.items():
                writer.write(places[name], [0] * tensors[old].ndim, tensors[old])


def _batches(source: TensorSource, names: Mapping[str, str]) -> Iterator[dict[str, str]]:
    """In order, as many at a time as fit in the limit, at least one."""
    batch: dict[str, str] = {}
    held = 0
    for name, old in names.items():
        size = source.entries[old].size_bytes
        if batch and held + size > _BATCH_BYTES:
            yield batch
            batch, held = {}, 0
        batch[name] = old
        held += size
    if batch:
        yield batch
