import json
import os
import pickle
import shutil
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from carillon.engine.config import UserError
from carillon.engine.train.checkpoint import (
    Checkpoint,
    CheckpointStore,
    list_checkpoints,
)
from carillon.engine.train.checkpoint_reader import read_tensors
from carillon.engine.train.checkpoint_seal import recover, seal


def tensors(value: float = 1.0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {
        "model.a": torch.randn(5, 3, generator=generator) * value,
        "model.b": torch.full((2,), value, dtype=torch.bfloat16),
        "optimizer.a.step": torch.tensor(value),
    }


def store(path: Path, keep_last: int = 2) -> CheckpointStore:
    return CheckpointStore(path, keep_last=keep_last, is_main=True)


def saved(path: Path, step: int = 7, value: float = 1.0) -> Checkpoint:
    writer = store(path)
    writer.save(step, tensors(value), {"step": step})
    writer.wait()
    return writer.at(step)


def test_what_is_saved_is_read_back_bitwise(tmp_path: Path) -> None:
    checkpoint = saved(tmp_path)
    checkpoint.verify()
    into = {name: torch.zeros_like(value) for name, value in tensors().items()}
    read_tensors(checkpoint, into, partial=False)
    for name, value in tensors().items():
        assert torch.equal(into[name], value)
    assert checkpoint.state == {"step": 7}
    assert [c.step for c in list_checkpoints(tmp_path)] == [7]


def test_tensors_changed_after_save_returns_do_not_leak_in(tmp_path: Path) -> None:
    writer, values = store(tmp_path), tensors()
    writer.save(1, values, {"step": 1})
    for value in values.values():
        value.zero_()
    writer.wait()
    into = {name: torch.zeros_like(value) for name, value in tensors().items()}
    read_tensors(writer.at(1), into, partial=False)
    assert torch.equal(into["model.a"], tensors()["model.a"])


def test_the_last_and_the_protected_are_kept(tmp_path: Path) -> None:
    writer = store(tmp_path, keep_last=2)
    writer.protect({2})
    for step in range(1, 6):
        writer.save(step, tensors(), {"step": step})
    writer.wait()
    assert [c.step for c in list_checkpoints(tmp_path)] == [2, 4, 5]


def test_a_step_saved_again_replaces_the_old_one(tmp_path: Path) -> None:
    saved(tmp_path, 3, 1.0)
    again = saved(tmp_path, 3, 2.0)
    into = {name: torch.zeros_like(value) for name, value in tensors().items()}
    read_tensors(again, into, partial=False)
    assert into["optimizer.a.step"] == 2.0


def test_a_kill_while_a_step_is_replaced_leaves_no_half_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved(tmp_path, 3, 1.0)

    def killed(path: Any, **options: Any) -> None:
        """Removes some files, as a kill in the middle of rmtree does."""
        if Path(path).name != "step-00000003.tmp":
            next(Path(path).iterdir()).unlink()

    monkeypatch.setattr(shutil, "rmtree", killed)
    saved(tmp_path, 3, 2.0)
    for checkpoint in list_checkpoints(tmp_path):
        checkpoint.verify()


def test_a_checkpoint_is_durable_before_it_has_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every file, then the folder, is synced before the rename; the parent folder after it."""
    events: list[tuple[str, str]] = []
    fsync, rename = os.fsync, os.rename

    def synced(handle: int) -> None:
        fsync(handle)
        events.append(("sync", Path(os.readlink(f"/proc/self/fd/{handle}")).name))

    def renamed(source: Any, target: Any) -> None:
        events.append(("rename", Path(target).name))
        rename(source, target)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "rename", renamed)
    checkpoint = saved(tmp_path, 7)
    at = events.index(("rename", checkpoint.path.name))
    before = [name for what, name in events[:at] if what == "sync"]
    files = {file.name for file in checkpoint.path.iterdir()}
    # DCP writes its metadata under another name and renames it, which the folder's sync covers.
    written = {".metadata.tmp" if name == ".metadata" else name for name in files}
    assert written <= set(before)
    assert before[-1] == "step-00000007.tmp"
    assert events[at + 1] == ("sync", tmp_path.name)


def test_leftovers_of_a_killed_save_are_no_checkpoints(tmp_path: Path) -> None:
    done = saved(tmp_path, 3)
    shutil.copytree(done.path, tmp_path / "step-00000009.tmp")
    (tmp_path / "notes.tmp").mkdir()  # not ours
    assert [c.step for c in list_checkpoints(tmp_path)] == [3]
    store(tmp_path)
    assert not (tmp_path / "step-00000009.tmp").exists()
    assert (tmp_path / "notes.tmp").exists()


def test_a_final_name_without_a_manifest_is_damage(tmp_path: Path) -> None:
    damaged = saved(tmp_path, 100_000_003)  # one digit more is newer, whatever the alphabet says
    saved(tmp_path, 20_000_000)
    (damaged.path / "manifest.json").unlink()
    found = list_checkpoints(tmp_path)
    assert [c.step for c in found] == [20_000_000, 100_000_003]
    with pytest.raises(UserError, match=r"is damaged: manifest\.json is missing"):
        found[-1].verify()


def test_what_has_no_manifest_is_not_removed_as_old(tmp_path: Path) -> None:
    damaged = saved(tmp_path, 1)
    (damaged.path / "manifest.json").unlink()
    writer = store(tmp_path, keep_last=2)
    for step in range(2, 6):
        writer.save(step, tensors(), {"step": step})
    writer.wait()
    assert [c.step for c in list_checkpoints(tmp_path)] == [1, 4, 5]


class Killed(BaseException):
    """Stands for the end of the process."""


def test_a_kill_at_any_moment_of_sealing_leaves_what_can_be_gone_on_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before each call that changes what the disk has; the old checkpoint or the new is there."""
    template = saved(tmp_path / "template", 3, 2.0)
    real = {(os, "fsync"): os.fsync, (os, "rename"): os.rename, (shutil, "rmtree"): shutil.rmtree}
    calls = 0
    while True:
        folder = tmp_path / str(calls)
        saved(folder, 3, 1.0)
        new = folder / "step-00000003.tmp"
        shutil.copytree(template.path, new)
        for name in ("manifest.json", "state.json"):
            (new / name).unlink()
        left = calls

        def stop_or(function: Any, *given: Any, **named: Any) -> Any:
            nonlocal left
            if left == 0:
                raise Killed
            left -= 1
            return function(*given, **named)

        with monkeypatch.context() as patch:
            for (module, name), function in real.items():
                patch.setattr(module, name, partial(stop_or, function))
            try:
                seal(new, {"step": 3})
                is_done = True
            except Killed:
                is_done = False
        recover(folder)
        (found,) = list_checkpoints(folder)
        found.verify()
        store(folder)
        assert [p.name for p in folder.iterdir()] == ["step-00000003"]
        found.verify()
        if is_done:
            break
        calls += 1
    assert calls > 8  # each file's sync, two renames, a removal


@pytest.mark.parametrize("name", ["model.safetensors", "more/deep.bin", ".metadata2", "a link"])
def test_a_file_that_the_manifest_does_not_name_is_refused(tmp_path: Path, name: str) -> None:
    checkpoint = saved(tmp_path / "run")
    checkpoint.verify()
    stray = checkpoint.path / name
    if name == "a link":
        (tmp_path / "elsewhere").mkdir()
        stray.symlink_to(tmp_path / "elsewhere")
    else:
        stray.parent.mkdir(exist_ok=True)
        stray.write_bytes(b"x")
    with pytest.raises(UserError, match=f"holds {name}, which is not in its manifest"):
        checkpoint.verify()
    stray.unlink()
    checkpoint.verify()


@pytest.mark.parametrize("step", ["abc", None, [1], float("inf"), True, -1, 1.5, "missing"])
def test_a_step_that_is_none_is_one_message(tmp_path: Path, step: Any) -> None:
    writer = store(tmp_path)
    writer.save(7, tensors(), {} if step == "missing" else {"step": step})
    writer.wait()
    writer.at(7).verify()
    with pytest.raises(UserError, match=r"is damaged: state\.json is not what was written"):
        _ = writer.at(7).state


@pytest.mark.parametrize("name", ["manifest.json", "state.json"])
def test_json_that_is_nested_too_deep_is_one_message(tmp_path: Path, name: str) -> None:
    checkpoint = saved(tmp_path)
    (checkpoint.path / name).write_text('{"files":' * 100_000)
    with pytest.raises(UserError, match=f"is damaged: {name} is"):
        checkpoint.verify()
    with pytest.raises(UserError, match=f"is damaged: {name} is"):
        _ = checkpoint.state if name == "state.json" else checkpoint.verify()


@pytest.mark.parametrize("name", ["__0_0.distcp", ".metadata", "state.json"])
@pytest.mark.parametrize("damage", ["flip", "truncate", "remove"])
def test_damage_is_named_before_anything_is_read(tmp_path: Path, name: str, damage: str) -> None:
    checkpoint = saved(tmp_path)
    file = checkpoint.path / name
    content = bytearray(file.read_bytes())
    if damage == "flip":
        content[len(content) // 2] ^= 0x10
        file.write_bytes(content)
    elif damage == "truncate":
        file.write_bytes(content[:-1])
    else:
        file.unlink()
    with pytest.raises(UserError, match=rf"is damaged: {name} is"):
        checkpoint.verify()


def test_a_manifest_or_state_that_is_none_is_one_message(tmp_path: Path) -> None:
    checkpoint = saved(tmp_path)
    (tmp_path / "step-abc").mkdir()  # a stray folder is no checkpoint
    (tmp_path / "step-abc" / "manifest.json").write_text("{}")
    assert [c.step for c in list_checkpoints(tmp_path)] == [7]
    whole = (checkpoint.path / "manifest.json").read_text()
    for content in ("", "{", "[]", "{}", '{"files": {}}', '{"files": 3}'):
        (checkpoint.path / "manifest.json").write_text(content)
        with pytest.raises(UserError, match=r"is damaged: manifest\.json is"):
            checkpoint.verify()
    assert '"size_bytes"' in whole
    for one, other in (("size_bytes", "size_bytdr"), ("sha256", "sha25v")):
        (checkpoint.path / "manifest.json").write_text(whole.replace(f'"{one}"', f'"{other}"', 1))
        with pytest.raises(UserError, match=r"is damaged: manifest\.json is not what was written"):
            checkpoint.verify()
    for field, value in (
        ("size_bytes", "7"),
        ("size_bytes", 7.0),
        ("size_bytes", True),
        ("size_bytes", -7),
        ("sha256", None),
        ("sha256", "g" * 64),
        ("sha256", "a" * 63),
    ):
        manifest = json.loads(whole)
        manifest["files"]["__0_0.distcp"][field] = value
        (checkpoint.path / "manifest.json").write_text(json.dumps(manifest))
        with pytest.raises(UserError, match=r"is damaged: manifest\.json is .* at __0_0"):
            checkpoint.verify()
    (checkpoint.path / "state.json").write_text("{")
    with pytest.raises(UserError, match=r"is damaged: state\.json is"):
        _ = checkpoint.state


def test_a_checkpoint_caught_while_replaced_comes_back(tmp_path: Path) -> None:
    checkpoint = saved(tmp_path, 3)
    checkpoint.path.rename(tmp_path / "step-00000003.old.tmp")
    store(tmp_path)
    assert [c.step for c in list_checkpoints(tmp_path)] == [3]
    checkpoint.verify()


class Evil:
    def __reduce__(self) -> Any:
        return (os.system, ("touch owned",))


def test_pickled_metadata_runs_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    checkpoint = saved(tmp_path)
    for hostile in (Evil(), {"a": Evil()}, eval, Path.unlink):
        (checkpoint.path / ".metadata").write_bytes(pickle.dumps(hostile))
        with pytest.raises(UserError, match="metadata"):
            read_tensors(checkpoint, tensors(), partial=False)
    assert not (tmp_path / "owned").exists()


def test_a_pickle_in_place_of_tensors_runs_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    checkpoint = saved(tmp_path)
    (checkpoint.path / "__0_0.distcp").write_bytes(pickle.dumps(Evil()) * 50)
    with pytest.raises(UserError, match="cannot be read"):
        read_tensors(checkpoint, tensors(), partial=False)
    assert not (tmp_path / "owned").exists()


def test_another_models_checkpoint_is_refused_by_name(tmp_path: Path) -> None:
    checkpoint = saved(tmp_path)
    other = tensors() | {"model.a": torch.zeros(5, 4), "model.c": torch.zeros(1)}
    del other["model.b"]
    with pytest.raises(UserError) as error:
        read_tensors(checkpoint, other, partial=False)
    message = str(error.value)
    assert "1 missing (first: model.c)" in message
    assert "1 unknown (first: model.b)" in message
    assert "1 of another shape (first: model.a)" in message
    read_tensors(checkpoint, {"model.a": torch.zeros(5, 3)}, partial=True)


def test_a_failed_write_is_one_message_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a full disk fails: in the middle, when files are synced."""
    saved(tmp_path, 1)
    real, calls = os.fsync, []

    def full(handle: int) -> None:
        calls.append(handle)
        if len(calls) > 1:
            raise OSError(28, "No space left on device")
        real(handle)

    monkeypatch.setattr(os, "fsync", full)
    writer = store(tmp_path)
    assert not writer.has_failed
    writer.save(2, tensors(), {"step": 2})
    deadline = time.monotonic() + 60
    while not writer.has_failed and time.monotonic() < deadline:  # known without a wait for it
        time.sleep(0.01)
    assert writer.has_failed
    with pytest.raises(UserError, match=r"was not written: .*No space left on device"):
        writer.wait()
    assert not writer.has_failed
    assert [c.step for c in list_checkpoints(tmp_path)] == [1]
    assert not list(tmp_path.glob("*.tmp"))


def test_the_content_hash_covers_every_byte(tmp_path: Path) -> None:
    one = saved(tmp_path / "1", value=1.0).content_hash
    two = saved(tmp_path / "2", value=1.5).content_hash
    assert one != two
    manifest = json.loads((tmp_path / "1" / "step-00000007" / "manifest.json").read_text())
    assert set(manifest["files"]) == {"__0_0.distcp", ".metadata", "state.json"}
