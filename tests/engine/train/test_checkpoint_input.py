"""Checkpoints that cannot be read or written: one message, code 2 on every process, no hang."""

import json
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from carillon.engine.cli import main
from carillon.engine.config import UserError
from carillon.engine.train.checkpoint import Checkpoint, CheckpointStore
from carillon.engine.train.checkpoint_forms import open_tensors
from carillon.engine.train.checkpoint_seal import MANIFEST, STATE, seal

Setup = Any  # conftest's
Capture = pytest.CaptureFixture[str]
FORMS = ("dcp", "safetensors", "zarr")
# By rank, the bytes that fit into a file: of the main process all but tensors does, of the other
# nothing that matters.
FULL = {0: 300_000, 1: 2048}
SOON = 20  # steps until a save that fails, and from there to the next


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def reseal(path: Path) -> None:
    """Give a folder that was changed a manifest that vouches for it."""
    state = json.loads((path / STATE).read_text())
    (path / MANIFEST).unlink()
    path.rename(path.with_suffix(".tmp"))
    seal(path.with_suffix(".tmp"), state)


def lie(file: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Change a safetensors header."""
    content = file.read_bytes()
    size = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + size])
    change(header)
    text = json.dumps(header).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + content[8 + size :])


@pytest.fixture(scope="module")
def trained(make_setup: Any) -> dict[str, Setup]:
    """Five steps in each form, in one process."""
    setups = {form: make_setup() for form in FORMS}
    for form, setup in setups.items():
        assert setup.train("optimization.steps=5", f"logging.checkpoint_form={form}") == 0
    return setups


def copy_of(setup: Setup, output: Path) -> Setup:
    return setup.killed_after(5, output)


def newest(setup: Setup) -> Path:
    path: Path = setup.checkpoints()[-1].path
    return path


def test_every_form_holds_the_same_training(trained: dict[str, Setup]) -> None:
    contents = {}
    for form, setup in trained.items():
        (checkpoint,) = setup.checkpoints()
        source = open_tensors(checkpoint.path, 5)
        assert source.form == form
        contents[form] = source.read(list(source.entries))
    for form in FORMS[1:]:
        assert contents[form].keys() == contents["dcp"].keys()
        for name, value in contents["dcp"].items():
            assert contents[form][name].equal(value), (form, name)


@pytest.fixture(scope="module")
def told(
    trained: dict[str, Setup],
    make_setup: Any,
    tmp_path_factory: pytest.TempPathFactory,
    ranks: Any,
) -> dict[str, Any]:
    """What two processes that are given each fault say and end with, by the fault's name."""
    folder, more = tmp_path_factory.mktemp("faults"), "optimization.steps=5"
    cases: dict[str, tuple[int, list[str]]] = {}
    limits: dict[str, dict[int, int]] = {}
    for form, pattern in (("dcp", "*.distcp"), ("safetensors", "*.safetensors"), ("zarr", "c/0/0")):
        for fault in ("missing", "flipped"):
            setup = copy_of(trained[form], folder / f"{form} {fault}")
            file = max(setup.checkpoints()[0].path.rglob(pattern), key=lambda f: f.stat().st_size)
            flip(file) if fault == "flipped" else file.unlink()
            cases[f"{form} {fault}"] = (2, setup.argv(more))
    for form, other in (("dcp", "safetensors"), ("safetensors", "zarr"), ("zarr", "dcp")):
        # Another model's: under this run's name, in another form too.
        setup = copy_of(trained[other], folder / f"{form} another")
        (checkpoint,) = setup.checkpoints()
        shutil.rmtree(checkpoint.path)
        shutil.copytree(another_models(trained[form], folder / f"{form} wide"), checkpoint.path)
        cases[f"{form} another"] = (2, setup.argv(more))
    for form, work in (("dcp", nonsense), ("safetensors", lying), ("zarr", short)):
        setup = copy_of(trained[form], folder / f"{form} lying")
        work(setup.checkpoints()[0].path)
        cases[f"{form} lying"] = (2, setup.argv(more))
    for form in FORMS:
        for rank, limit in FULL.items():
            setup, name = make_setup(), f"{form} full-{rank}"
            argv = setup.argv(more, f"logging.checkpoint_form={form}", "model.vision.width=128")
            cases[name] = (2, [*argv, "distributed.zero_stage=3"])
            limits[name] = {rank: limit}
    setup = copy_of(trained["dcp"], folder / "unwritable")
    shutil.rmtree(setup.run / "checkpoints")
    (setup.run / "checkpoints").write_text("a file where the folder should be")
    cases["unwritable"] = (2, setup.argv(more))
    setup = copy_of(trained["dcp"], folder / "formless")
    (checkpoint,) = setup.checkpoints()
    (checkpoint.path / ".metadata").rename(checkpoint.path / "tensors.hdf5")
    reseal(checkpoint.path)
    cases["formless"] = (2, setup.argv(more))
    setup = copy_of(trained["dcp"], folder / "unlisted")
    shutil.copy(trained["safetensors"].checkpoints()[0].path / "model.safetensors", newest(setup))
    cases["unlisted"] = (2, setup.argv(more))
    setup = copy_of(trained["dcp"], folder / "manifestless")
    (newest(setup) / MANIFEST).unlink()
    cases["manifestless"] = (2, setup.argv(more))
    setup, name = make_setup(), "soon full-1"  # so many steps lie between two saves
    few = [f"logging.checkpoint_interval_steps={SOON}", f"optimization.steps={2 * SOON}"]
    cases[name] = (2, setup.argv(*few, "model.vision.width=128", "distributed.zero_stage=3"))
    limits[name] = {1: FULL[1]}
    cases["unknown"] = (2, make_setup().argv(more, "logging.checkpoint_form=zar"))
    results = dict(ranks(folder / "ranks", cases, file_limits=limits))
    for name in limits:
        output = Path(cases[name][1][2].removeprefix("logging.output="))
        results[name]["left"] = [str(path) for path in output.glob("*/checkpoints/*")]
        (metrics,) = output.glob("*/metrics.jsonl")
        results[name]["steps"] = len(metrics.read_text().splitlines())
    return results


@pytest.mark.parametrize(
    ("fault", "expected"),
    [
        ("missing", "missing or cut short"),
        ("flipped", "not what was written"),
        ("another", "of another model"),
        ("lying", "cannot be read"),
        ("full-0", "was not written"),
        ("full-1", "was not written"),
        ("unwritable", "checkpoints cannot be kept in"),
        ("formless", "holds no tensors in a known form"),
        ("unlisted", "holds model.safetensors, which is not in its manifest"),
        ("manifestless", "is damaged: manifest.json is missing"),
        ("unknown", "logging.checkpoint_form"),
    ],
)
def test_the_main_process_alone_tells_it_in_a_line(
    told: dict[str, Any], fault: str, expected: str
) -> None:
    of_forms = {name: result for name, result in told.items() if name.split()[-1] == fault}
    assert len(of_forms) == (1 if fault in told else len(FORMS) + (fault == "full-1"))
    for name, result in of_forms.items():
        assert result["codes"] == [2, 2], (name, result)
        lines = [line for line in result["stderr"][0].splitlines() if line.startswith("carillon: ")]
        assert len(lines) == 1, (name, result)
        assert expected in result["stderr"][0], (name, result)
        assert "Traceback" not in "".join(result["stderr"]), (name, result)
        assert not result["stderr"][1].strip(), (name, result)
        assert not result.get("left"), (name, result)  # of a checkpoint that could not be written


def test_a_failed_save_ends_every_process_before_the_next_save(told: dict[str, Any]) -> None:
    assert SOON <= told["soon full-1"]["steps"] < 2 * SOON


def test_a_failed_save_is_told_in_the_next_step(
    setup: Setup, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Here the save has ended by the time it returns, so the step is known."""
    save = CheckpointStore.save

    def save_and_end(store: CheckpointStore, *given: Any) -> None:
        def full(handle: int) -> None:
            raise OSError(28, "No space left on device")

        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", full)
            save(store, *given)
            deadline = time.monotonic() + 60
            while not store.has_failed and time.monotonic() < deadline:
                time.sleep(0.01)

    monkeypatch.setattr(CheckpointStore, "save", save_and_end)
    assert setup.train("optimization.steps=10") == 2
    said = capsys.readouterr().err
    assert said.count("was not written: [Errno 28] No space left on device") == 1
    assert [line["step"] for line in setup.metrics()] == [1, 2, 3, 4, 5, 6]


def nonsense(path: Path) -> None:
    (path / ".metadata").write_bytes(b"no pickle")
    reseal(path)


def lying(path: Path) -> None:
    lie(path / "model.safetensors", offsets)
    reseal(path)


def short(path: Path) -> None:
    """A chunk of zarr loses a value: known only when that part is read."""
    chunk = path / "tensors.zarr" / "model.text_projection.weight" / "c" / "0" / "0"
    chunk.write_bytes(chunk.read_bytes()[:-4])
    reseal(path)


def another_models(setup: Setup, output: Path) -> Path:
    """A sound checkpoint whose tensors have other shapes."""
    copy = copy_of(setup, output)
    (path,) = (checkpoint.path for checkpoint in copy.checkpoints())
    through, convert = output / "through", ["checkpoint", "convert"]
    assert main([*convert, str(path), "--to", "safetensors", "--out", str(through)]) == 0

    def widen(header: dict[str, Any]) -> None:
        shape = header["model.text_projection.weight"]["shape"]
        shape[:] = [shape[1], shape[0]]

    lie(through / "model.safetensors", widen)
    reseal(through)
    form, out = open_tensors(setup.checkpoints()[0].path, 5).form, output / "out"
    assert main([*convert, str(through), "--to", form, "--out", str(out)]) == 0
    return out


def offsets(header: dict[str, Any]) -> None:
    header["model.text_projection.weight"]["data_offsets"][1] += 4


def beyond(header: dict[str, Any]) -> None:
    header["model.text_projection.weight"]["data_offsets"] = [0, 2**60]


def shape(header: dict[str, Any]) -> None:
    header["model.text_projection.weight"]["shape"] = [2**40, 2**40]


def dtype(header: dict[str, Any]) -> None:
    header["model.text_projection.weight"]["dtype"] = "F99"


@pytest.mark.parametrize("change", [offsets, beyond, shape, dtype])
def test_a_lying_safetensors_header_is_refused(
    trained: dict[str, Setup], tmp_path: Path, change: Any, capsys: Capture
) -> None:
    setup = copy_of(trained["safetensors"], tmp_path / "runs")
    (path,) = (checkpoint.path for checkpoint in setup.checkpoints())
    lie(path / "model.safetensors", change)
    reseal(path)  # so that not the manifest but the reader has to find it
    assert main(["checkpoint", "inspect", str(path)]) == 2
    assert "model.safetensors cannot be read" in capsys.readouterr().err
    assert setup.train("optimization.steps=5") == 2
    assert "model.safetensors cannot be read" in capsys.readouterr().err


@pytest.mark.parametrize("length", [0, 7, 2**63])
def test_a_safetensors_file_of_nonsense_is_refused(
    trained: dict[str, Setup], tmp_path: Path, length: int
) -> None:
    setup = copy_of(trained["safetensors"], tmp_path / "runs")
    (path,) = (checkpoint.path for checkpoint in setup.checkpoints())
    (path / "model.safetensors").write_bytes(length.to_bytes(8, "little"))
    with pytest.raises(UserError, match="cannot be read"):
        open_tensors(path, 5)


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"zarr_format": 3, "node_type": "array"}'])
def test_zarr_metadata_of_nonsense_is_refused(
    trained: dict[str, Setup], tmp_path: Path, content: str
) -> None:
    setup = copy_of(trained["zarr"], tmp_path / "runs")
    (path,) = (checkpoint.path for checkpoint in setup.checkpoints())
    array = path / "tensors.zarr" / "model.text_projection.weight" / "zarr.json"
    array.write_text(content)
    with pytest.raises(UserError, match=r"tensors\.zarr cannot be read"):
        open_tensors(path, 5)


def test_an_unknown_form_is_refused(
    setup: Setup, trained: dict[str, Setup], tmp_path: Path, capsys: Capture
) -> None:
    assert setup.train("logging.checkpoint_form=zar") == 2
    said = capsys.readouterr().err
    assert "logging.checkpoint_form" in said
    assert "zarr" in said
    assert not setup.output.exists()
    empty = tmp_path / "step-00000005.tmp"
    empty.mkdir()
    (empty / "tensors.hdf5").write_bytes(b"x")
    seal(empty, {"step": 5})
    assert main(["checkpoint", "inspect", str(tmp_path / "step-00000005")]) == 2
    assert "no tensors in a known form: dcp, safetensors, zarr" in capsys.readouterr().err
    Checkpoint(path=tmp_path / "step-00000005", step=5).verify()
