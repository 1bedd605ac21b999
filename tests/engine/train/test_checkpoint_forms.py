"""Every form holds the same bytes, and a converted checkpoint is trained on from."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import zarr
from safetensors.torch import load_file
from torch import Tensor

from carillon.engine.cli import main
from carillon.engine.config import UserError
from carillon.engine.train.checkpoint import Checkpoint, CheckpointStore
from carillon.engine.train.checkpoint_forms import FORMS, open_tensors

Capture = pytest.CaptureFixture[str]
STATE = {"step": 7, "config_hash": "abc", "world_size": 2}


def tensors() -> dict[str, Tensor]:
    values = torch.randn(5, 3, generator=torch.Generator().manual_seed(1))
    return {
        "model.a": values,
        "model.b": values.to(torch.bfloat16),
        "model.c": values.to(torch.float8_e4m3fn),
        "model.none": torch.empty(0, 4),
        "optimizer.a.step": torch.tensor(3.0),
        "optimizer.a.count": torch.tensor([1, -2]),
        "average.a": -values,
    }


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    store = CheckpointStore(tmp_path / "checkpoints", keep_last=1, is_main=True)
    store.save(7, tensors(), STATE)
    store.wait()
    return store.at(7).path


def content(path: Path) -> dict[str, Tensor]:
    checkpoint = Checkpoint(path=path, step=7)
    checkpoint.verify()
    source = open_tensors(path, 7)
    return source.read(list(source.entries))


def assert_same_bytes(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name].dtype == value.dtype, name
        assert found[name].shape == value.shape, name
        assert torch.equal(
            found[name].reshape(-1).view(torch.uint8), value.reshape(-1).view(torch.uint8)
        ), name


def convert(path: Path, form: str, out: Path, *options: str) -> Path:
    command = ["checkpoint", "convert", str(path), "--to", form, "--out", str(out), *options]
    assert main(command) == 0
    return out


@pytest.mark.parametrize("second", FORMS)
@pytest.mark.parametrize("first", FORMS)
def test_any_form_becomes_any_other(saved: Path, tmp_path: Path, first: str, second: str) -> None:
    once = convert(saved, first, tmp_path / "first.form")
    twice = convert(once, second, tmp_path / "second")
    assert open_tensors(twice, 7).form == second
    assert_same_bytes(content(twice), tensors())
    state = json.loads((twice / "state.json").read_text())
    assert state == STATE | {"converted_from": Checkpoint(path=once, step=7).content_hash}


def test_weights_are_the_averaged_ones_by_their_own_names(saved: Path, tmp_path: Path) -> None:
    out = convert(saved, "safetensors", tmp_path / "weights", "--weights")
    assert_same_bytes(load_file(out / "model.safetensors"), {"a": tensors()["average.a"]})


def test_large_weights_are_several_files_with_an_index(saved: Path, tmp_path: Path) -> None:
    out = convert(saved, "safetensors", tmp_path / "weights", "--shard-gb", "1e-7")
    index = json.loads((out / "model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == tensors().keys()
    files = sorted(path.name for path in out.glob("*.safetensors"))
    assert set(index["weight_map"].values()) == set(files)
    assert len(files) > 1
    assert re.fullmatch(r"model-00001-of-0000\d\.safetensors", files[0])
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in tensors().values())
    assert_same_bytes(content(out), tensors())


def test_zarr_reads_without_this_project(saved: Path, tmp_path: Path) -> None:
    group: Any = zarr.open_group(convert(saved, "zarr", tmp_path / "z") / "tensors.zarr", mode="r")
    assert group.metadata.zarr_format == 3
    assert torch.equal(torch.from_numpy(group["model.a"][...]), tensors()["model.a"])


def test_a_run_goes_on_from_a_converted_checkpoint(setup: Any, tmp_path: Path) -> None:
    """DCP to zarr to DCP in the run's folder: the same steps follow, to the bit."""
    assert setup.train() == 0
    copy = setup.killed_after(5, tmp_path / "copy")
    (kept,) = copy.checkpoints()
    through = convert(kept.path, "zarr", tmp_path / "zarr")
    shutil.rmtree(kept.path)
    convert(through, "dcp", kept.path)
    assert copy.train() == 0
    assert_same_bytes(copy.content(10), setup.content(10))


def test_training_says_what_to_do_with_a_form_of_others(
    setup: Any, tmp_path: Path, capsys: Capture
) -> None:
    assert setup.train() == 0
    newest = setup.checkpoints()[-1].path
    shutil.move(convert(newest, "torch_dist", tmp_path / "s"), tmp_path / "moved")
    shutil.rmtree(newest)
    shutil.move(tmp_path / "moved", newest)
    assert main(["embed", str(setup.run), "--out", str(tmp_path / "e")]) == 2
    assert "carillon checkpoint convert FOLDER --to dcp" in capsys.readouterr().err


def test_inspect_and_verify(saved: Path, capsys: Capture) -> None:
    assert main(["checkpoint", "inspect", str(saved), "--tensors"]) == 0
    said = capsys.readouterr().out
    assert "form        dcp" in said
    assert "step        7" in said
    assert "processes   2" in said
    assert "model       4 tensors, 45 values, 0.0 MB" in said
    assert "  model.b  5 x 3  bfloat16" in said
    assert "  optimizer.a.step  one value  float32" in said
    assert main(["checkpoint", "verify", str(saved)]) == 0
    assert f"good, {Checkpoint(path=saved, step=7).content_hash}" in capsys.readouterr().out


@pytest.mark.parametrize("form", FORMS)
def test_a_flipped_bit_is_found(saved: Path, tmp_path: Path, form: str, capsys: Capture) -> None:
    out = convert(saved, form, tmp_path / "out")
    largest = max((f for f in out.rglob("*") if f.is_file()), key=lambda f: f.stat().st_size)
    damaged = bytearray(largest.read_bytes())
    damaged[len(damaged) // 2] ^= 1
    largest.write_bytes(damaged)
    assert main(["checkpoint", "verify", str(out)]) == 2
    assert f"{largest.name} is not what was written" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["inspect", "{tmp}"], "is no checkpoint: it has no manifest.json, and it is no run"),
        (["inspect", "{tmp}/nowhere"], "nowhere is no run"),
        (["convert", "{saved}", "--to", "zarr", "--out", "{saved}"], "exists"),
        (["convert", "{saved}", "--to", "zarr", "--out", "{tmp}/o", "--shard-gb", "0"], "0 given"),
        (["convert", "{saved}", "--to", "zarr", "--out", "/proc/o"], "/proc/o cannot be written"),
    ],
)
def test_what_cannot_be_done(
    saved: Path, tmp_path: Path, capsys: Capture, arguments: list[str], message: str
) -> None:
    given = [word.format(tmp=tmp_path, saved=saved) for word in arguments]
    assert main(["checkpoint", *given]) == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.glob("*.tmp"))


def test_a_manifest_that_leads_outside_is_refused(saved: Path) -> None:
    manifest = json.loads((saved / "manifest.json").read_text())
    for name in ("../outside", "/etc/passwd"):
        files = manifest["files"] | {name: manifest["files"]["state.json"]}
        (saved / "manifest.json").write_text(json.dumps({"files": files}))
        with pytest.raises(UserError, match="not what was written, at "):
            Checkpoint(path=saved, step=7).verify()
