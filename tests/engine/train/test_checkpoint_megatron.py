"""Megatron-Core's torch_dist, on a checkpoint that it wrote itself (tests/fixtures/torch_dist)."""

import json
import os
import pickle
import runpy
import shutil
from enum import Enum
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import _MEM_FORMAT_ENCODING, TensorStorageMetadata

from carillon.engine.cli import main
from carillon.engine.train.checkpoint import Checkpoint
from carillon.engine.train.checkpoint_forms import open_tensors
from carillon.engine.train.checkpoint_megatron import foreign_name, own_name
from carillon.engine.train.checkpoint_metadata import CheckedReader

FIXTURES = Path(__file__).parents[2] / "fixtures"
WRITTEN = FIXTURES / "torch_dist"
VALUES: dict[str, torch.Tensor] = runpy.run_path(str(FIXTURES / "make_torch_dist.py"))["tensors"]()


@pytest.mark.parametrize("form", ["dcp", "safetensors", "zarr", "torch_dist"])
def test_what_megatron_core_wrote_comes_over_bitwise(tmp_path: Path, form: str) -> None:
    command = ["checkpoint", "convert", str(WRITTEN), "--to", form, "--out", str(tmp_path / "out")]
    assert main(command) == 0
    Checkpoint(path=tmp_path / "out", step=5).verify()
    source = open_tensors(tmp_path / "out", 5)
    assert source.form == form
    found = source.read(list(source.entries))
    assert found.keys() == {own_name(name) for name in VALUES}
    for name, value in VALUES.items():
        assert found[own_name(name)].dtype == value.dtype
        assert torch.equal(found[own_name(name)], value), name
    assert json.loads((tmp_path / "out" / "state.json").read_text())["step"] == 5


def test_an_export_has_what_megatron_core_looks_for(tmp_path: Path) -> None:
    """Its own loader reads one too; that it did is in docs/architecture.md."""
    out = tmp_path / "out"
    command = ["checkpoint", "convert", str(WRITTEN), "--to", "torch_dist", "--out", str(out)]
    assert main(command) == 0
    assert json.loads((out / "metadata.json").read_text()) == json.loads(
        (WRITTEN / "metadata.json").read_text()
    )
    common: Any = [torch.load(f / "common.pt", weights_only=True) for f in (out, WRITTEN)]
    assert common[0] == common[1]
    stored = FileSystemReader(out).read_metadata().state_dict_metadata
    assert stored.keys() == VALUES.keys()


def test_names_go_there_and_back() -> None:
    for name, foreign in (
        ("model.text.token.weight", "text.token.weight"),
        ("optimizer.text.token.weight.exp_avg", "optimizer.state.exp_avg.text.token.weight"),
        ("optimizer.logit_scale.step", "optimizer.state.step.logit_scale"),
        ("average.logit_scale", "average.logit_scale"),
    ):
        assert foreign_name(name) == foreign
        assert own_name(foreign) == name


def test_inspect_says_that_nothing_vouches_for_it(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["checkpoint", "inspect", str(WRITTEN)]) == 0
    said = capsys.readouterr().out
    assert "not verified, it has no manifest" in said
    assert "form        torch_dist" in said
    assert "step        5" in said
    assert main(["checkpoint", "verify", str(WRITTEN)]) == 2
    assert "no manifest to verify it by" in capsys.readouterr().err


class Evil:
    def __reduce__(self) -> Any:
        return (os.system, ("touch owned",))


@pytest.mark.parametrize("name", [".metadata", "common.pt", "__0_0.distcp"])
def test_a_hostile_pickle_runs_nothing(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(WRITTEN, tmp_path / "bad")
    (tmp_path / "bad" / name).write_bytes(pickle.dumps(Evil()) * 50)
    code = main(["checkpoint", "convert", "bad", "--to", "zarr", "--out", "out"])
    assert not (tmp_path / "owned").exists()
    assert code == (0 if name == "common.pt" else 2)  # nothing is needed of that file
    said = capsys.readouterr().err
    assert ("posix.system" in said) == (name == ".metadata")
    assert ("cannot be read" in said) == (name == "__0_0.distcp")


def test_metadata_cannot_change_a_class(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """With parents of a file's choice an entry would be a tensor for us and bytes for DCP, which
    unpickles bytes. pickle.dumps does not write such a thing, so here are the instructions."""

    def named(name: str) -> bytes:
        return f"c{TensorStorageMetadata.__module__}\n{name}\n".encode()

    parents = named("TensorStorageMetadata") + named("BytesStorageMetadata") + b"\x86"
    attributes = b"N}\x8c\x09__bases__" + parents + b"s\x86b"
    shutil.copytree(WRITTEN, tmp_path / "bad")
    content = b"\x80\x04" + named("_MEM_FORMAT_ENCODING") + attributes + b"."
    (tmp_path / "bad" / ".metadata").write_bytes(content)
    assert main(["checkpoint", "inspect", str(tmp_path / "bad")]) == 2
    assert ".metadata cannot be read" in capsys.readouterr().err
    assert _MEM_FORMAT_ENCODING.__bases__ == (Enum,)


def outside(metadata: Any) -> None:
    next(iter(metadata.storage_data.values())).relative_path = "../__0_0.distcp"


def a_part_less(metadata: Any) -> None:
    first_tensor(metadata).chunks.pop()


def no_type(metadata: Any) -> None:
    first_tensor(metadata).properties.dtype = "float32"


def below_zero(metadata: Any) -> None:
    first_tensor(metadata).size = torch.Size([-1])


def first_tensor(metadata: Any) -> Any:
    entries = metadata.state_dict_metadata.values()
    return next(entry for entry in entries if isinstance(entry, TensorStorageMetadata))


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (outside, "outside of the checkpoint"),
        (a_part_less, "do not make it up"),
        (no_type, "not a type of values"),
        (below_zero, "not a shape"),
    ],
)
def test_lying_metadata_is_refused(
    tmp_path: Path, change: Any, expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(WRITTEN, tmp_path / "bad")
    metadata = CheckedReader(WRITTEN).read_metadata()
    change(metadata)
    (tmp_path / "bad" / ".metadata").write_bytes(pickle.dumps(metadata))
    assert main(["checkpoint", "inspect", str(tmp_path / "bad")]) == 2
    assert expected in capsys.readouterr().err


@pytest.mark.parametrize("content", [b"", b"\x80\x04", b"garbage", pickle.dumps([1])])
def test_damaged_metadata_is_one_message(
    tmp_path: Path, content: bytes, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(WRITTEN, tmp_path / "bad")
    (tmp_path / "bad" / ".metadata").write_bytes(content)
    assert main(["checkpoint", "inspect", str(tmp_path / "bad")]) == 2
    assert ".metadata" in capsys.readouterr().err
