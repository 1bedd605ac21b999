"""The forms of a checkpoint's tensors on disk, opened without a distributed start.

| form | files | for |
| --- | --- | --- |
| dcp | .metadata, *.distcp | training's own: one file a process |
| safetensors | model*.safetensors, with an index where there are several | Hugging Face's tools |
| zarr | tensors.zarr, a group with one array a tensor (v3) | reading parts, from any language |
| torch_dist | as dcp, with metadata.json and common.pt | Megatron-Core |

Training saves and resumes the first three, in any layout. Every form that we write has the same
state.json and manifest.json beside it, and the same bytes in each tensor. zarr has no bfloat16 or
float8: such an array holds the bits as whole numbers, and its attribute `dtype` has torch's name.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load

from carillon.engine.config import UserError
from carillon.engine.train.checkpoint_megatron import is_torch_dist, iteration, own_name
from carillon.engine.train.checkpoint_metadata import (
    METADATA,
    CheckedReader,
    check_files,
    expect_one_process,
    told,
)
from carillon.engine.train.checkpoint_places import (
    GROUP,
    SAFETENSORS_DTYPES,
    Entry,
    check_chunks,
    open_zarr,
    read_part,
)

FORMS = ("dcp", "safetensors", "zarr", "torch_dist")


class TensorSource(Protocol):
    """The tensors of one checkpoint. Raises UserError for a file that cannot be read."""

    form: str
    step: int
    entries: Mapping[str, Entry]

    def read(self, names: Sequence[str]) -> dict[str, Tensor]:
        """These tensors, on the CPU."""


class PartSource(TensorSource, Protocol):
    """Tensors of which a part can be read alone."""

    def check_size(self) -> None:
        """Raises UserError unless the files hold as many bytes as the tensors have."""

    def read_part(self, name: str, offsets: Sequence[int], sizes: Sequence[int]) -> Tensor: ...


def form_of(path: Path) -> str:
    """The form of a checkpoint's tensors. Raises UserError for none that is known, or several."""
    signs = {
        "torch_dist" if is_torch_dist(path) else "dcp": (path / METADATA).is_file(),
        "safetensors": any(path.glob("*.safetensors")),
        "zarr": (path / GROUP).is_dir(),
    }
    found = [form for form, is_there in signs.items() if is_there]
    if len(found) > 1:
        raise UserError(
            f"{path} holds tensors in several forms, {' and '.join(found)}: it does not say which "
            "are meant. Move the files of all but one out of that folder"
        )
    if not found:
        raise UserError(f"{path} holds no tensors in a known form: {', '.join(FORMS)}")
    return found[0]


def open_tensors(path: Path, step: int) -> TensorSource:
    """All tensors of a checkpoint of `step` that was verified. Raises UserError for an unknown
    form, and for files that hold less than they say."""
    form = form_of(path)
    if form in ("dcp", "torch_dist"):
        return _DcpSource(path, step, form)
    source = open_parts(path, step, form)
    source.check_size()
    return source


def open_parts(path: Path, step: int, form: str) -> PartSource:
    """The same, where the form is one to read parts from."""
    return (_SafetensorsSource if form == "safetensors" else _ZarrSource)(path, step)


class _DcpSource:
    """torch's own files, and Megatron-Core's under their names here."""

    def __init__(self, path: Path, step: int, form: str) -> None:
        self._path, self.form = path, form
        is_foreign = form == "torch_dist"
        self.step = step or iteration(path) if is_foreign else step
        metadata = CheckedReader(path).read_metadata()
        check_files(path, metadata)
        stored = metadata.state_dict_metadata
        self._stored = {
            own_name(name) if is_foreign else name: name
            for name, entry in stored.items()
            if isinstance(entry, TensorStorageMetadata)
        }
        self.entries: Mapping[str, Entry] = {
            name: _entry(stored[old]) for name, old in self._stored.items()
        }

    def read(self, names: Sequence[str]) -> dict[str, Tensor]:
        expect_one_process()
        tensors = {
            name: torch.empty(self.entries[name].shape, dtype=self.entries[name].dtype)
            for name in names
        }
        stored = {self._stored[name]: tensor for name, tensor in tensors.items()}
        try:
            load(stored, storage_reader=CheckedReader(self._path), no_dist=True)
        except CheckpointException as error:  # a BaseException of DCP's, around any failure
            raise UserError(f"checkpoint {self._path} cannot be read: {told(error)}") from error
        return tensors


def _entry(stored: Any) -> Entry:
    return Entry(tuple(stored.size), stored.properties.dtype)


class _SafetensorsSource:
    form = "safetensors"

    def __init__(self, path: Path, step: int) -> None:
        self.step = step
        self._files: dict[str, Path] = {}
        self._opened: dict[Path, Any] = {}
        entries: dict[str, Entry] = {}
        for file in sorted(path.glob("*.safetensors")):
            try:
                with safe_open(file, framework="pt") as opened:
                    for name in opened.keys():  # noqa: SIM118 (it is no mapping)
                        part = opened.get_slice(name)
                        dtype = SAFETENSORS_DTYPES[part.get_dtype()]
                        if name in entries:
                            raise UserError(
                                f"{path} holds {name} twice, in {self._files[name].name} and in "
                                f"{file.name}: it does not say which is meant"
                            )
                        entries[name] = Entry(tuple(part.get_shape()), dtype)
                        self._files[name] = file
            except (SafetensorError, KeyError, OSError) as error:
                raise UserError(f"{file} cannot be read: {error}") from None
        self.entries: Mapping[str, Entry] = entries

    def check_size(self) -> None:
        """Nothing: the library has compared each header with its file."""

    def read(self, names: Sequence[str]) -> dict[str, Tensor]:
        return {name: self._file_of(name).get_tensor(name) for name in names}

    def read_part(self, name: str, offsets: Sequence[int], sizes: Sequence[int]) -> Tensor:
        if not sizes:
            return self.read([name])[name]
        part: Tensor = self._file_of(name).get_slice(name)[_slices(offsets, sizes)]
        return part

    def _file_of(self, name: str) -> Any:
        """Opened once: each opening reads the header of all tensors."""
        file = self._files[name]
        if file not in self._opened:
            self._opened[file] = safe_open(file, framework="pt")
        return self._opened[file]


def _slices(offsets: Sequence[int], sizes: Sequence[int]) -> tuple[slice, ...]:
    return tuple(slice(at, at + size) for at, size in zip(offsets, sizes, strict=True))


class _ZarrSource:
    form = "zarr"

    def __init__(self, path: Path, step: int) -> None:
        self.step, self._path = step, path
        try:
            self._places = open_zarr(path)
        except (OSError, ValueError) as error:
            raise UserError(f"{path / GROUP} cannot be read: {error}") from None
        self.entries: Mapping[str, Entry] = {n: place.entry for n, place in self._places.items()}

    def check_size(self) -> None:
        for name, place in self._places.items():
            try:
                check_chunks(self._path, place)
            except OSError as error:
                raise UserError(f"{self._path / GROUP}: {name} cannot be read: {error}") from None

    def read(self, names: Sequence[str]) -> dict[str, Tensor]:
        shapes = {name: self.entries[name].shape for name in names}
        return {name: self.read_part(name, [0] * len(s), s) for name, s in shapes.items()}

    def read_part(self, name: str, offsets: Sequence[int], sizes: Sequence[int]) -> Tensor:
        try:
            return read_part(self._path, self._places[name], offsets, sizes)
        except OSError as error:  # a chunk that is gone, or of another size than zarr.json says
            raise UserError(f"{self._path / GROUP}: {name} cannot be read: {error}") from None


def counted(entries: Iterable[Entry]) -> tuple[int, int, int]:
    """Tensors, their values and their bytes."""
    given = list(entries)
    return len(given), sum(math.prod(e.shape) for e in given), sum(e.size_bytes for e in given)
