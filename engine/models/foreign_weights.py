"""Reads weights that others saved: safetensors, whole or sharded, and nothing that is unpickled.

Left out: downloading; a path must be on this machine.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from carillon.engine.config import UserError

# In the order of preference within a folder: Hugging Face's names, then OpenCLIP's.
_INDEXES = ("model.safetensors.index.json",)
_FILES = ("model.safetensors", "open_clip_model.safetensors")
_PICKLES = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt")
_CONVERT = (
    "it is a pickle, which can run any code when it is read. Convert it once where you trust it:"
    " python -c \"import torch, safetensors.torch as s; d = torch.load('{name}', weights_only=True,"
    " map_location='cpu'); d = d.get('state_dict', d); s.save_file({{k: v.contiguous().clone() for"
    " k, v in d.items()}}, 'model.safetensors')\""
)


def read_weights(path: Path) -> dict[str, Tensor]:
    """All tensors of a .safetensors file, or of a folder that holds one or its shards.

    Raises UserError for a missing, damaged or pickled file, and for an index that names a file
    that is not beside it.
    """
    tensors: dict[str, Tensor] = {}
    for file in _weight_files(path):
        try:
            with safe_open(file, framework="pt", device="cpu") as opened:
                tensors.update({name: opened.get_tensor(name) for name in opened.keys()})  # noqa: SIM118
        except (SafetensorError, OSError) as error:
            raise UserError(
                f"weights {file} cannot be read: {error}; fetch the file again"
            ) from None
    return tensors


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object. Raises UserError where the file is something else."""
    try:
        values = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read as JSON: {error}") from None
    if not isinstance(values, dict):
        raise UserError(f"{path} holds a {type(values).__name__}; a JSON object is needed")
    return values


def _weight_files(path: Path) -> Iterable[Path]:
    if not path.exists():
        raise UserError(f"weights {path} do not exist; give a .safetensors file or its folder")
    if path.is_file():
        if path.suffix == ".safetensors":
            return [path]
        if path.suffix in _PICKLES:
            raise _refused(path)
        raise UserError(f"weights {path} are not loaded: a .safetensors file is needed")
    for name in _FILES:
        if (path / name).is_file():
            return [path / name]
    for name in _INDEXES:
        if (path / name).is_file():
            return _shards(path / name)
    pickles = sorted(file.name for file in path.iterdir() if file.suffix in _PICKLES)
    if pickles:
        raise _refused(path / pickles[0])
    raise UserError(f"folder {path} holds no weights; one of {', '.join(_FILES)} is needed")


def _refused(pickle: Path) -> UserError:
    return UserError(f"weights {pickle} are not loaded: {_CONVERT.format(name=pickle.name)}")


def _shards(index: Path) -> list[Path]:
    weight_map = read_json(index).get("weight_map")
    names = list(dict.fromkeys(weight_map.values())) if isinstance(weight_map, dict) else []
    for name in names:
        if not isinstance(name, str) or Path(name).name != name:
            raise UserError(f"{index} names the shard {name!r}; shards stand beside their index")
        if not name.endswith(".safetensors"):
            raise UserError(f"{index} names {name}, which is not a .safetensors file")
        if not (index.parent / name).is_file():
            raise UserError(f"{index} names {name}, which is missing; fetch the folder again")
    if not names:
        raise UserError(f"{index} names no shards: its weight_map is missing or empty")
    return [index.parent / name for name in names]
