"""Every form holds the same bytes, and a converted checkpoint is trained on from."""

import json
import pickle
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import zarr
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import MetadataIndex

from carillon.engine.cli import main
from carillon.engine.config import UserError
from carillon.engine.train.checkpoint import Checkpoint, CheckpointStore
from carillon.engine.train.checkpoint_forms import FORMS, open_tensors
from carillon.engine.train.checkpoint_seal import seal

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
        (["convert", "{saved}", "--to", "zarr", "--out", "{saved}"], "exists; give another place"),
        (["convert", "{saved}", "--to", "zarr", "--out", "{saved}/in/it"], "is in the checkpoint"),
        (["convert", "{link}", "--to", "zarr", "--out", "{saved}/it"], "is in the checkpoint"),
        (["convert", "{saved}", "--to", "zarr", "--out", "{link}/it"], "is in the checkpoint"),
        (["convert", "{saved}", "--to", "zarr", "--out", "{tmp}/o", "--shard-gb", "0"], "0 given"),
        *(
            (
                ["convert", "{saved}", "--to", "safetensors", "--out", "{tmp}/o", "--shard-gb", gb],
                f"--shard-gb {gb} given; more than 0",
            )
            for gb in ("inf", "nan", "1e+300", "-1")
        ),
        (["convert", "{saved}", "--to", "zarr", "--out", "/proc/o"], "/proc/o cannot be written"),
    ],
)
def test_what_cannot_be_done(
    saved: Path, tmp_path: Path, capsys: Capture, arguments: list[str], message: str
) -> None:
    link = tmp_path / "link"
    link.symlink_to(saved)
    given = [word.format(tmp=tmp_path, saved=saved, link=link) for word in arguments]
    assert main(["checkpoint", *given]) == 2
    said = capsys.readouterr().err
    assert message in said
    assert "--overwrite" not in said  # which there is not
    assert {path.name for path in tmp_path.iterdir()} == {"checkpoints", "link"}
    Checkpoint(path=saved, step=7).verify()


def test_converting_leaves_what_is_beside_it_alone(
    saved: Path, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A folder of the user's under any name; also when it fails, and when the place is taken in
    the meantime."""
    keep = tmp_path / "keep"
    (keep / "weights.tmp").mkdir(parents=True)
    (keep / "weights.tmp" / "notes.txt").write_text("work")
    out = convert(saved, "safetensors", keep / "weights")
    assert sorted(path.name for path in keep.iterdir()) == ["weights", "weights.tmp"]
    assert (keep / "weights.tmp" / "notes.txt").read_text() == "work"
    (tmp_path / "usual").mkdir()
    assert out.stat().st_mode == (tmp_path / "usual").stat().st_mode

    def taken(*given: Any) -> None:
        (keep / "more").mkdir()
        (keep / "more" / "notes.txt").write_text("work")

    monkeypatch.setattr("carillon.engine.train.checkpoint_writer.write_tensors", taken)
    command = ["checkpoint", "convert", str(saved), "--to", "zarr", "--out", str(keep / "more")]
    assert main(command) == 2
    assert "more cannot be written: " in capsys.readouterr().err
    assert sorted(path.name for path in keep.iterdir()) == ["more", "weights", "weights.tmp"]
    assert (keep / "more" / "notes.txt").read_text() == "work"


def reseal(path: Path, **changes: Any) -> None:
    """Give a folder that was changed a manifest that vouches for it."""
    state = json.loads((path / "state.json").read_text()) | changes
    (path / "manifest.json").unlink()
    path.rename(path.with_suffix(".tmp"))
    seal(path.with_suffix(".tmp"), state)


def refused(path: Path, capsys: Capture, *actions: str) -> str:
    """What each action says of a checkpoint that none of them takes."""
    more = {"convert": ["--to", "dcp", "--out", str(path.parent / "refused")]}
    said = ""
    for action in actions:
        assert main(["checkpoint", action, str(path), *more.get(action, [])]) == 2
        said = capsys.readouterr().err
        assert len(said.splitlines()) == 1
    assert not (path.parent / "refused").exists()
    return said


@pytest.mark.parametrize("form", ["dcp", "safetensors", "zarr"])
def test_a_stray_file_of_tensors_is_refused(
    saved: Path, tmp_path: Path, form: str, capsys: Capture
) -> None:
    """Whichever it would take the place of; vouched for by a manifest, it is still ambiguous."""
    path = convert(saved, form, tmp_path / "out")
    save_file({"model.a": torch.zeros(5, 3)}, path / "zz.safetensors")
    actions = ("verify", "inspect", "convert")
    assert "holds zz.safetensors, which is not in its manifest" in refused(path, capsys, *actions)
    reseal(path)
    said = refused(path, capsys, "inspect", "convert")
    if form == "safetensors":
        assert "holds model.a twice, in model.safetensors and in zz.safetensors" in said
    else:
        assert "holds tensors in several forms" in said


@pytest.mark.parametrize("step", ["abc", None, [1], float("inf")])
def test_a_state_without_a_step_is_refused(saved: Path, step: Any, capsys: Capture) -> None:
    state = saved / "state.json"
    state.write_text(json.dumps({"step": step}))
    said = refused(saved, capsys, "verify", "inspect", "convert")
    assert "state.json is missing or cut short" in said
    reseal(saved)
    assert "state.json is not what was written, at step" in refused(saved, capsys, "inspect")


def test_a_checkpoint_of_a_run_that_lost_its_manifest_is_refused(
    setup: Any, capsys: Capture
) -> None:
    """It is not passed over for the one before it, or for a start at step 0."""
    assert setup.train("optimization.steps=5") == 0
    (checkpoint,) = setup.checkpoints()
    (checkpoint.path / "manifest.json").unlink()
    left = sorted(checkpoint.path.iterdir())
    capsys.readouterr()
    expected = f"checkpoint {checkpoint.path} is damaged: manifest.json is missing"
    for command in (
        setup.argv("optimization.steps=5"),
        ["checkpoint", "verify", str(setup.run)],
        ["checkpoint", "inspect", str(setup.run)],
        ["embed", str(setup.run), "--out", str(setup.output / "e")],
    ):
        assert main(command) == 2
        assert expected in capsys.readouterr().err
    assert sorted(checkpoint.path.iterdir()) == left


def test_a_run_goes_on_from_a_checkpoint_caught_while_replaced(setup: Any, tmp_path: Path) -> None:
    """As a kill between the two renames of `seal` leaves it; nothing is computed again."""
    assert setup.train("optimization.steps=5") == 0
    (checkpoint,) = setup.checkpoints()
    before = checkpoint.content_hash
    shutil.copytree(checkpoint.path, checkpoint.path.with_suffix(".tmp"))
    checkpoint.path.rename(checkpoint.path.with_suffix(".old.tmp"))
    assert setup.train("optimization.steps=5") == 0
    assert checkpoint.content_hash == before
    assert [line["step"] for line in setup.lines("sample_keys.jsonl")] == [1, 2, 3, 4, 5]


@pytest.mark.parametrize("shape", [[10**14], [10**14, 3], [2**62, 2**62], [5.0, 3]])
def test_an_array_that_is_larger_than_its_files_is_refused(
    saved: Path, tmp_path: Path, shape: list[Any], capsys: Capture
) -> None:
    """In zarr.json, which names the rows of a chunk too: one that fits, and one chunk for all."""
    path = convert(saved, "zarr", tmp_path / "out")
    file = path / "tensors.zarr" / "model.a" / "zarr.json"
    whole = json.loads(file.read_text())
    for rows in (5, shape[0]):
        chunk = {"name": "regular", "configuration": {"chunk_shape": [rows, *shape[1:]]}}
        file.write_text(json.dumps(whole | {"shape": shape, "chunk_grid": chunk}))
        reseal(path)
        assert "tensors.zarr" in refused(path, capsys, "inspect", "convert")


@pytest.mark.parametrize("content", ["[]", "3", '{"a":' * 100_000])
@pytest.mark.parametrize("name", ["zarr.json", "model.a/zarr.json"])
def test_zarr_metadata_of_another_kind_is_refused(
    saved: Path, tmp_path: Path, name: str, content: str, capsys: Capture
) -> None:
    path = convert(saved, "zarr", tmp_path / "out")
    (path / "tensors.zarr" / name).write_text(content)
    reseal(path)
    assert "tensors.zarr cannot be read" in refused(path, capsys, "inspect", "convert")


@pytest.mark.parametrize("value", ["5", True, None, 0, -1, 5.0])
def test_zarr_chunks_of_no_number_of_rows_are_refused(
    saved: Path, tmp_path: Path, value: Any, capsys: Capture
) -> None:
    path = convert(saved, "zarr", tmp_path / "out")
    file = path / "tensors.zarr" / "model.a" / "zarr.json"
    said = json.loads(file.read_text())
    said["chunk_grid"]["configuration"]["chunk_shape"][0] = value
    file.write_text(json.dumps(said))
    reseal(path)
    assert "tensors.zarr cannot be read" in refused(path, capsys, "inspect", "convert")


@pytest.mark.parametrize("place_bytes", [1000, 4 * 10**14])
def test_dcp_metadata_of_more_than_its_files_hold_is_refused(
    saved: Path, place_bytes: int, capsys: Capture
) -> None:
    """A tensor that its place does not hold, or a place that its file does not."""
    metadata = FileSystemReader(saved).read_metadata()
    entry: Any = metadata.state_dict_metadata["model.a"]
    entry.size = entry.chunks[0].sizes = torch.Size([10**14])
    entry.chunks[0].offsets = torch.Size([0])
    stored = metadata.storage_data
    place = stored.pop(MetadataIndex("model.a", torch.Size([0, 0])))
    stored[MetadataIndex("model.a", torch.Size([0]))] = replace(place, length=place_bytes)
    (saved / ".metadata").write_bytes(pickle.dumps(metadata))
    reseal(saved)
    said = refused(saved, capsys, "inspect", "convert")
    expected = "is larger than its place" if place_bytes == 1000 else "missing or cut short"
    assert expected in said


def test_memory_that_does_not_hold_the_tensors_is_one_message(
    saved: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*given: Any) -> None:
        raise MemoryError

    monkeypatch.setattr("carillon.engine.train.checkpoint_writer.write_tensors", full)
    assert "memory does not hold the tensors" in refused(saved, capsys, "convert")


def test_a_manifest_that_leads_outside_is_refused(saved: Path) -> None:
    manifest = json.loads((saved / "manifest.json").read_text())
    for name in ("../outside", "/etc/passwd"):
        files = manifest["files"] | {name: manifest["files"]["state.json"]}
        (saved / "manifest.json").write_text(json.dumps({"files": files}))
        with pytest.raises(UserError, match="not what was written, at "):
            Checkpoint(path=saved, step=7).verify()
