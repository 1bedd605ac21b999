"""Peers of the contrastive loss: (image, text, scale) -> loss, the sigmoid form with a bias too.

image and text are (N, D), float32 or bfloat16, scale and bias (1,) float32. bfloat16 features are
computed under autocast, as trainers do.
- `torch`: the logits as one product, cross-entropy of their rows and of their columns.
- `torch.compile`: the same, compiled.
- `open_clip`: OpenCLIP's ClipLoss, which multiplies twice, and its SigLipLoss.
- `inf_cl`: Inf-CL's algorithm, done again (inf_cl.py on torch's operators; on CUDA
  inf_cl_triton.py). The softmax form only.
"""

import importlib
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from peers.compiling import compiled

Loss = Callable[..., Tensor]
FORMS = ("softmax", "sigmoid")


def available(device: str, form: str = "softmax") -> dict[str, Loss]:
    """The peers that run on `device`, by name. `form`: softmax or sigmoid."""
    composed = {"softmax": softmax, "sigmoid": sigmoid}[form]
    peers: dict[str, Loss] = {"torch": composed, "torch.compile": compiled(composed)}
    if "open_clip" not in missing(device, form):
        peers["open_clip"] = _open_clip(form)
    if form == "softmax":
        module = "inf_cl_triton" if device.startswith("cuda") else "inf_cl"
        peers["inf_cl"] = importlib.import_module(f"peers.{module}").loss
    return peers


def missing(device: str, form: str = "softmax") -> dict[str, str]:
    """Why a peer cannot run here, by name."""
    reasons = {}
    if find_spec("open_clip") is None:
        reasons["open_clip"] = "open_clip_torch is not installed: make bench-env installs it"
    if form == "sigmoid":
        reasons["inf_cl"] = "Inf-CL has no sigmoid form"
    return reasons


def softmax(image: Tensor, text: Tensor, scale: Tensor) -> Tensor:
    labels = torch.arange(len(image), device=image.device)
    with _autocast(image):
        logits = scale * (image @ text.T)
        loss = F.cross_entropy(logits.float(), labels) + F.cross_entropy(logits.T.float(), labels)
    return loss / 2


def sigmoid(image: Tensor, text: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    """The sum over pairs of softplus(-z l), divided by the number of rows."""
    with _autocast(image):
        logits = (scale * (image @ text.T) + bias).float()
        signs = 2 * torch.eye(len(image), device=image.device) - 1
        return F.softplus(-signs * logits).sum() / len(image)


def _autocast(image: Tensor) -> torch.autocast:
    return torch.autocast(image.device.type, torch.bfloat16, image.dtype == torch.bfloat16)


def _open_clip(form: str) -> Loss:
    module: Any = importlib.import_module("open_clip.loss")
    loss = module.ClipLoss() if form == "softmax" else module.SigLipLoss()

    def call(image: Tensor, text: Tensor, *scale_and_bias: Tensor) -> Tensor:
        with _autocast(image):
            result: Tensor = loss(image, text, *(value[0] for value in scale_and_bias))
        return result

    return call
