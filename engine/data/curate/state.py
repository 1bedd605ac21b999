"""The state of a run on disk, by which it goes on after a kill.

`.NAME.curation-HASH` beside the output, HASH of the pipeline and of what goes in, holds a table for
every part that is scored, written aside and renamed: a part is there whole or not at all. A lock
keeps a second run out. The folder goes when the output is published.
"""

from __future__ import annotations

import fcntl
import glob
import hashlib
import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa

from carillon.engine.access import explained
from carillon.engine.config import UserError
from carillon.engine.data.curate.score import PART_ROWS, Part
from carillon.engine.data.publish import json_of
from carillon.engine.data.shard_writer import write_synced
from carillon.engine.data.shards import Dataset

_WRITING = "writing.json"


class State:
    """The folder of one run, locked while it is open."""

    def __init__(self, out: Path, identity: str) -> None:
        self.folder = out.absolute().parent / f".{out.absolute().name}.curation-{identity[:12]}"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._lock = os.open(self.folder / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        except OSError as error:
            raise UserError(f"{self.folder} cannot be written: {explained(error)}") from None
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(self._lock)
            raise UserError(
                f"another curation writes {out}; wait for it, or give another --out"
            ) from None

    def close(self) -> None:
        os.close(self._lock)

    def remove(self) -> None:
        """Away with the folder; the output that needed it stands."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def clear_partial_outputs(self, out: Path) -> None:
        """Remove what a killed pass 3 of this very run left beside the output.

        What else stood there when that pass began is another program's, and stays.
        """
        noted = json_of(self.folder / _WRITING)
        if noted:
            others = set(noted["others"])
            for path in _partial_outputs(out):
                if path.name not in others:
                    shutil.rmtree(path, ignore_errors=True)

    def begin_writing(self, out: Path) -> None:
        """Note what stands beside the output before pass 3 makes its folder there."""
        others = sorted(path.name for path in _partial_outputs(out))
        write_whole(self.folder / _WRITING, json.dumps({"others": others}).encode())

    def table_path(self, part: Part) -> Path:
        return table_path(self.folder, part)

    def is_scored(self, part: Part) -> bool:
        return self.table_path(part).is_file()

    def tables(self, parts: Sequence[Part]) -> list[pa.Table]:
        """The tables of parts, on disk until they are touched."""
        return [read_table(self.table_path(part), part) for part in parts]


def _partial_outputs(out: Path) -> list[Path]:
    """Unfinished data sets of this name, as shard_writer.py calls them."""
    return list(out.absolute().parent.glob(f".{glob.escape(out.name)}.partial-*"))


def skipped_rows(folder: Path, part: Part) -> dict[int, str]:
    """Rows of a part that may not be touched again, with the reason."""
    try:
        content = json.loads(_skipped_path(folder, part).read_bytes())
    except FileNotFoundError:
        return {}
    return {int(row): str(reason) for row, reason in content.items()}


def skip_row(folder: Path, part: Part, row: int, reason: str) -> None:
    """Remember that a row killed the process that read it, or kept it too long."""
    content = {str(k): v for k, v in (skipped_rows(folder, part) | {row: reason}).items()}
    write_whole(_skipped_path(folder, part), json.dumps(content).encode())


def _skipped_path(folder: Path, part: Part) -> Path:
    return folder / f"part-{part.number:06d}.quarantine.json"


def table_path(folder: Path, part: Part) -> Path:
    return folder / f"part-{part.number:06d}.arrow"


def write_table(path: Path, table: pa.Table) -> None:
    """Write a table whole or not at all."""
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)
    write_whole(path, sink.getvalue().to_pybytes())


def read_table(path: Path, part: Part) -> pa.Table:
    """A part's table by memory map. Raises UserError when it is damaged."""
    try:
        table = pa.ipc.open_file(pa.memory_map(str(path))).read_all()
    except (OSError, pa.ArrowException) as error:
        raise UserError(f"{path} cannot be read: {error}. Remove it and start again.") from None
    if len(table) != part.end - part.start:
        raise UserError(f"{path} does not hold {part.end - part.start} rows. Remove it.")
    return table


def write_whole(path: Path, data: bytes) -> None:
    """Write a file aside, sync it and rename it; raises UserError for a full disk."""
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        write_synced(partial, data)
        partial.replace(path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise UserError(f"{path} cannot be written: {explained(error)}") from None


def parts_of(datasets: Sequence[Dataset]) -> list[Part]:
    """All parts, in the order of sets, splits, shards and rows."""
    parts: list[Part] = []
    for source, dataset in enumerate(datasets):
        for name, files in dataset.manifest.splits.items():
            first = 0
            for shard in files.shards:
                end = first + shard.num_samples
                for start in range(first, end, PART_ROWS):
                    part = Part(len(parts), source, name, start, min(start + PART_ROWS, end))
                    parts.append(part)
                first = end
    return parts


def run_identity(
    pipeline_hash: str, datasets: Sequence[Dataset], against: Sequence[Dataset]
) -> str:
    """A hash of all that the tables follow from."""
    content: dict[str, Any] = {
        "pipeline": pipeline_hash,
        "datasets": [dataset.fingerprint for dataset in datasets],
        "against": [dataset.fingerprint for dataset in against],
        "part_rows": PART_ROWS,
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
