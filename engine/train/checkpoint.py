"""Checkpoints: written by every process at once, asynchronous, whole or absent.

A save stages tensors on the CPU, writes and syncs them in the background under a temporary name,
adds `state.json` and a manifest of SHA-256, and renames the folder (checkpoint_seal.py): what bears
a final name is complete, or was damaged since. Reading (checkpoint_reader.py) verifies the
manifest, and that no other file is there, before anything is opened. The tensors go through
torch.distributed.checkpoint in one of three forms (checkpoint_forms.py); everything else is JSON.
At most one save is in flight, so host memory stays bounded by one copy.
Status: staging from CUDA tensors has not run on a GPU yet.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import threading
from collections.abc import Iterator, Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, cast

import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.state_dict_saver import async_save

from carillon.engine.access import explained
from carillon.engine.config import UserError
from carillon.engine.file_hash import file_sha256
from carillon.engine.train.checkpoint_metadata import expect_one_process, root_cause
from carillon.engine.train.checkpoint_seal import (
    MANIFEST,
    STATE,
    clear_leftovers,
    seal,
)
from carillon.engine.train.checkpoint_writer import storage_writer


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A checkpoint on disk, under its final name."""

    path: Path
    step: int

    @property
    def content_hash(self) -> str:
        """SHA-256 of the manifest, which holds the SHA-256 of every file."""
        return hashlib.sha256((self.path / MANIFEST).read_bytes()).hexdigest()

    @property
    def state(self) -> dict[str, Any]:
        state = _read_json(self.path, STATE)
        if type(state.get("step")) is not int or state["step"] < 0:
            raise UserError(_damaged(self.path, STATE, "not what was written, at step"))
        return state

    def verify(self) -> None:
        """Raises UserError naming the first file that is missing, not what was written, or not in
        the manifest."""
        files = _read_json(self.path, MANIFEST).get("files")
        if not isinstance(files, dict) or STATE not in files or len(files) < 2:
            raise UserError(_damaged(self.path, MANIFEST, "not a manifest of a checkpoint"))
        try:
            for name in _names_in(self.path):
                if name not in files and name != MANIFEST:
                    raise UserError(
                        f"checkpoint {self.path} holds {name}, which is not in its "
                        f"{MANIFEST}: nothing says what it is. Move it out of that folder"
                    )
            for name, entry in files.items():
                self._verify_file(name, entry)
        except OSError as error:
            raise UserError(
                f"{error.filename or self.path} cannot be read: {explained(error)}"
            ) from None

    def _verify_file(self, name: str, entry: Any) -> None:
        if not _is_entry(entry) or not _is_inside(name):
            raise UserError(_damaged(self.path, MANIFEST, f"not what was written, at {name}"))
        file = self.path / name
        if not file.is_file() or file.stat().st_size != entry["size_bytes"]:
            raise UserError(_damaged(self.path, name, "missing or cut short"))
        if file_sha256(file) != entry["sha256"]:
            raise UserError(
                _damaged(self.path, name, "not what was written (its SHA-256 is another)")
            )


def _names_in(folder: Path) -> Iterator[str]:
    """Of everything in a folder but the folders in it; a link is what it is, not what it leads
    to."""
    for place, folders, files in os.walk(folder, onerror=_raise):
        links = [name for name in folders if (Path(place) / name).is_symlink()]
        for name in sorted(links + files):
            yield (Path(place) / name).relative_to(folder).as_posix()


def _raise(error: OSError) -> None:
    raise error


def _is_inside(name: str) -> bool:
    path = PurePosixPath(name)
    return not path.is_absolute() and ".." not in path.parts


def _is_entry(entry: object) -> bool:
    """Whether it is what `seal` writes of a file."""
    if not isinstance(entry, dict) or entry.keys() != {"size_bytes", "sha256"}:
        return False
    size_bytes, digest = entry["size_bytes"], entry["sha256"]
    is_digest = isinstance(digest, str) and re.fullmatch(r"[0-9a-f]{64}", digest) is not None
    return type(size_bytes) is int and size_bytes >= 0 and is_digest


def _read_json(folder: Path, name: str) -> dict[str, Any]:
    try:
        value = json.loads((folder / name).read_bytes())
    except (FileNotFoundError, ValueError, RecursionError):
        value = None
    except OSError as error:
        raise UserError(f"{folder / name} cannot be read: {explained(error)}") from None
    if not isinstance(value, dict):
        raise UserError(_damaged(folder, name, "missing or not what was written"))
    return value


def _damaged(path: Path, name: str, why: str) -> str:
    return (
        f"checkpoint {path} is damaged: {name} is {why}. "
        "Move that folder away to go on from the checkpoint before it"
    )


def list_checkpoints(folder: Path) -> list[Checkpoint]:
    """What bears a checkpoint's final name, oldest first; `verify` tells what was damaged since."""
    named = [p for p in folder.glob("step-*") if re.fullmatch(r"step-[0-9]{8,}", p.name)]
    found = [Checkpoint(path=p, step=int(p.name.removeprefix("step-"))) for p in named]
    return sorted(found, key=lambda checkpoint: checkpoint.step)


class CheckpointStore:
    """Saves and finds the checkpoints of one run; the same calls on every rank."""

    def __init__(self, folder: Path, *, keep_last: int, is_main: bool, form: str = "dcp") -> None:
        self.folder, self.keep_last, self._is_main = folder, keep_last, is_main
        self.form = form
        # Its own group: background collectives must not interleave with the training's.
        self._group = dist.new_group(backend="gloo") if dist.is_initialized() else None
        expect_one_process()
        self._pending: threading.Thread | None = None
        self._error: BaseException | None = None
        self._kept: set[int] = set()
        refusal: list[str | None] = [None]
        if is_main:
            try:
                folder.mkdir(parents=True, exist_ok=True)
                clear_leftovers(folder)
            except OSError as error:
                refusal = [f"checkpoints cannot be kept in {folder}: {explained(error)}"]
        if self._group is not None:
            dist.broadcast_object_list(refusal, src=0, group=self._group)
        if refusal[0] is not None:
            raise UserError(refusal[0])

    def save(self, step: int, tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> None:
        """Start a save; returns once the tensors are staged.

        Raises UserError when the save before this one failed (a full disk, a read-only folder).
        """
        self.wait()
        temporary = self.folder / f"step-{step:08d}.tmp"
        if self._is_main:
            shutil.rmtree(temporary, ignore_errors=True)
        saving = cast(
            "Future[Metadata]",
            async_save(
                dict(tensors),
                storage_writer=storage_writer(self.form, temporary),
                process_group=self._group,
                no_dist=self._group is None,
            ),
        )
        self._pending = threading.Thread(
            target=self._finish, args=(saving, temporary, dict(state)), name="checkpoint"
        )
        self._pending.start()

    def wait(self) -> None:
        """Block until no save is in flight; raises UserError if it failed."""
        if self._pending is not None:
            self._pending.join()
            self._pending = None
        if self._error is not None:
            error, self._error = self._error, None
            raise UserError(f"checkpoint in {self.folder} was not written: {error}") from error

    @property
    def has_failed(self) -> bool:
        """Whether it is known already that the save in flight failed; `wait` raises why."""
        return self._error is not None

    def at(self, step: int) -> Checkpoint:
        return Checkpoint(path=self.folder / f"step-{step:08d}", step=step)

    def protect(self, steps: set[int]) -> None:
        """Steps that keep-last does not remove (the best ones)."""
        self._kept = steps

    def _finish(self, saving: Future[Metadata], temporary: Path, state: dict[str, Any]) -> None:
        try:
            saving.result()
            outcome: list[BaseException | None] = [None]
            if self._is_main:
                try:
                    seal(temporary, state)
                    self._remove_old()
                except Exception as error:  # the others wait to hear of it, whatever it is
                    outcome = [error]
            if self._group is not None:
                dist.broadcast_object_list(outcome, src=0, group=self._group)
            if outcome[0] is not None:
                raise outcome[0]
        except BaseException as error:  # handed to the training thread by wait()
            self._error = root_cause(error)
            if self._is_main:
                shutil.rmtree(temporary, ignore_errors=True)

    def _remove_old(self) -> None:
        # What has no manifest is not ours to remove.
        done = [c for c in list_checkpoints(self.folder) if (c.path / MANIFEST).is_file()]
        for checkpoint in done[: -self.keep_last]:
            if checkpoint.step not in self._kept:
                # Renamed first: a kill in the middle of the removal leaves no half checkpoint.
                doomed = checkpoint.path.with_suffix(".tmp")
                checkpoint.path.rename(doomed)
                shutil.rmtree(doomed)
