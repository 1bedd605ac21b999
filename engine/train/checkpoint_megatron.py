"""Megatron-Core's `torch_dist`: DCP files under Megatron's names, with two files beside them.

metadata.json names the format, which is how such a folder is known; common.pt holds what is not a
tensor, as a pickle. That is read only by torch.load with weights_only, which builds plain values,
and only its `iteration` is used; one that holds more (Megatron-LM's arguments) is left unread.

| here | in Megatron-Core |
| --- | --- |
| model.NAME | NAME |
| optimizer.NAME.exp_avg, .exp_avg_sq, .fp32_param | optimizer.state.exp_avg.NAME, and so on |
| optimizer.NAME.step | optimizer.state.step.NAME |
| average.NAME | average.NAME |

NAME itself is not changed: what Megatron-Core calls the parts of a layer, that it stacks layers and
interleaves q, k and v, belongs to a model and is not done here. Its objects (_extra_state of FP8
layers) are left out. Its optimizer's flattened buckets, of checkpoints that are not
fully_reshardable, come as the buckets that they are.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

import torch

from carillon.engine.data.publish import json_of

FORMAT = "metadata.json"
COMMON = "common.pt"
_STATES = ("exp_avg", "exp_avg_sq", "step", "fp32_param")


def is_torch_dist(folder: Path) -> bool:
    return json_of(folder / FORMAT).get("sharded_backend") == "torch_dist"


def iteration(folder: Path) -> int:
    """The step that a checkpoint is of; 0 when its common.pt does not say it in plain values."""
    try:
        common = torch.load(folder / COMMON, map_location="cpu", weights_only=True)
        return int(common["iteration"])
    except Exception:  # absent, a pickle of more than plain values, or damaged: never needed
        return 0


def own_name(name: str) -> str:
    """The name here of a tensor of Megatron-Core's."""
    state = re.fullmatch(r"optimizer\.state\.(\w+)\.(.+)", name)
    if state is not None:
        return f"optimizer.{state[2]}.{state[1]}"
    return name if name.startswith(("optimizer.", "average.")) else f"model.{name}"


def foreign_name(name: str) -> str:
    """The name for Megatron-Core of a tensor of ours; those of no group stay."""
    state = re.fullmatch(rf"optimizer\.(.+)\.({'|'.join(_STATES)})", name)
    if state is not None:
        return f"optimizer.state.{state[2]}.{state[1]}"
    return name.removeprefix("model.")


def write_beside(folder: Path, step: int) -> None:
    """The two files that make a folder of DCP's one of Megatron-Core's."""
    torch.save({"iteration": step, "checkpoint_version": 3.0}, folder / COMMON)
    versions = {
        "sharded_backend": "torch_dist",
        "sharded_backend_version": 1,
        "common_backend": "torch",
        "common_backend_version": 1,
    }
    (folder / FORMAT).write_text(json.dumps(versions))
