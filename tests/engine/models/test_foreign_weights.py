"""Foreign weight files: what is read, and what is refused before anything in it is used."""

import json
import pickle
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from carillon.engine.config import UserError
from carillon.engine.models.foreign_weights import read_json, read_weights


class Bomb:
    """A pickle that leaves a file behind when it is read."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[object, ...]:
        return (Path.touch, (self.trace,))


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "model.pkl", "epoch_1.ckpt"])
@pytest.mark.parametrize("whole_folder", [False, True])
def test_pickles_are_refused_unread(name: str, whole_folder: bool, tmp_path: Path) -> None:
    trace = tmp_path / "trace"
    (tmp_path / name).write_bytes(pickle.dumps(Bomb(trace)))
    with pytest.raises(UserError, match=rf"{name} are not loaded: it is a pickle.*safetensors"):
        read_weights(tmp_path if whole_folder else tmp_path / name)
    assert not trace.exists()


def test_the_advised_conversion_works(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    tied = torch.arange(6.0).view(2, 3).T
    torch.save({"state_dict": {"a": tied, "b": tied}}, "model.pt")
    with pytest.raises(UserError) as refusal:
        read_weights(Path("model.pt"))
    code = str(refusal.value).split('python -c "')[1].rstrip('"')
    exec(compile(code, "advice", "exec"), {})
    assert torch.equal(read_weights(Path("model.safetensors"))["b"], tied)


def test_shards_are_joined(tmp_path: Path) -> None:
    save_file({"a": torch.ones(2)}, tmp_path / "model-1.safetensors")
    save_file({"b": torch.zeros(3)}, tmp_path / "model-2.safetensors")
    index = {"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    assert {name: value.sum().item() for name, value in read_weights(tmp_path).items()} == {
        "a": 2,
        "b": 0,
    }


@pytest.mark.parametrize(
    ("shard", "reason"),
    [
        ("../model-1.safetensors", "stand beside their index"),
        ("/etc/passwd", "stand beside their index"),
        ("model-9.safetensors", "is missing"),
        ("model-1.bin", "not a .safetensors file"),
        (3, "stand beside their index"),
    ],
)
def test_index_names_only_files_beside_it(shard: object, reason: str, tmp_path: Path) -> None:
    index = {"weight_map": {"a": shard}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match=reason):
        read_weights(tmp_path)


@pytest.mark.parametrize("text", ['{"weight_map": {}}', '{"weight_map": [1]}', "{}", "[]", "{"])
def test_broken_index_is_one_message(text: str, tmp_path: Path) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(text)
    with pytest.raises(UserError, match=r"model.safetensors.index.json"):
        read_weights(tmp_path)


def test_truncated_file_is_one_message(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    save_file({"a": torch.ones(1000)}, file)
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(UserError, match=r"model.safetensors cannot be read"):
        read_weights(file)


def test_missing_and_empty_are_one_message(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="do not exist"):
        read_weights(tmp_path / "none")
    with pytest.raises(UserError, match="holds no weights"):
        read_weights(tmp_path)
    (tmp_path / "model.onnx").touch()
    with pytest.raises(UserError, match=r"a .safetensors file is needed"):
        read_weights(tmp_path / "model.onnx")
    with pytest.raises(UserError, match="cannot be read as JSON"):
        read_json(tmp_path / "config.json")
