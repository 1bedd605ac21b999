"""Forward and backward of one global batch, whole or by cached gradients.

The contrastive loss couples all pairs, so plain gradient accumulation would change it. With more
than one microbatch, features are computed first without a graph; the loss of the whole batch gives
their gradients; a second pass per microbatch back-propagates those (Gao et al. 2021, "Scaling Deep
Contrastive Learning Batch Size", GradCache). It costs one more forward pass and gives the loss and
gradients of the whole batch, in the memory of one microbatch plus the features. Left out: dropout.
The second pass must repeat the first, so a tower with dropout has to replay its random state here.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager

import torch
import torch.distributed as dist
from torch import Tensor

from carillon.engine.data.pairs import Batch
from carillon.engine.data.transforms import normalize
from carillon.engine.models.towers.dual_encoder import DualEncoder, DualFeatures
from carillon.engine.parallel.apply import LaidOut, gradient_sync
from carillon.engine.parallel.pipelined_dual_encoder import PipelinedDualEncoder

Objective = Callable[[DualFeatures, dist.ProcessGroup | None, Tensor | None], Tensor]
Autocast = Callable[[], AbstractContextManager[None]]


def forward_backward(
    model: LaidOut,
    objective: Objective,
    batch: Batch,
    size: int,
    *,
    group: dist.ProcessGroup | None,
    autocast: Autocast,
) -> Tensor:
    """Add the gradients of this process's batch, in microbatches of `size`; returns its loss, a
    detached scalar.

    The mean of the losses over the data ranks is the loss of the global batch.
    """
    if isinstance(model, PipelinedDualEncoder):
        num = len(batch.keys) // size
        return _through_pipelines(model, objective, batch, num, group, autocast)
    if size >= len(batch.keys):
        loss = objective(_features(model, batch, autocast), group, batch.ids)
        torch.autograd.backward(loss)
        return loss.detach()
    return _cached_gradients(model, objective, batch, size, group, autocast)


@torch.no_grad()
def loss_alone(
    model: DualEncoder,
    objective: Objective,
    batch: Batch,
    size: int,
    *,
    group: dist.ProcessGroup | None,
    autocast: Autocast,
) -> Tensor:
    """The loss of this process's batch, as `forward_backward` returns it, and nothing else.

    Where parameters are sharded, call it before `forward_backward`: that frees what this gathered.
    """
    features = _all_features(model, batch.microbatches(size), autocast)
    return objective(features, group, batch.ids)


def _cached_gradients(
    model: DualEncoder,
    objective: Objective,
    batch: Batch,
    size: int,
    group: dist.ProcessGroup | None,
    autocast: Autocast,
) -> Tensor:
    microbatches = batch.microbatches(size)
    with torch.no_grad():
        features = _all_features(model, microbatches, autocast)
    leaves = DualFeatures(
        image=_leaf(features.image),
        text=_leaf(features.text),
        scale=_leaf(features.scale),
        bias=_leaf(features.bias) if features.bias is not None else None,
    )
    loss = objective(leaves, group, batch.ids)
    torch.autograd.backward(loss)
    image_grads = torch.split(_grad(leaves.image), size)
    text_grads = torch.split(_grad(leaves.text), size)
    last = len(microbatches) - 1
    for i, part in enumerate(microbatches):
        with gradient_sync(model, enabled=i == last):
            features = _features(model, part, autocast)
            outputs, grads = [features.image, features.text], [image_grads[i], text_grads[i]]
            if i == last:  # scale and bias enter the loss once
                for output, leaf in ((features.scale, leaves.scale), (features.bias, leaves.bias)):
                    if output is not None and leaf is not None:
                        outputs.append(output)
                        grads.append(_grad(leaf))
            torch.autograd.backward(outputs, grads)
    return loss.detach()


def _through_pipelines(
    model: PipelinedDualEncoder,
    objective: Objective,
    batch: Batch,
    num: int,
    group: dist.ProcessGroup | None,
    autocast: Autocast,
) -> Tensor:
    """Cached gradients again, where a schedule of the pipeline takes `num` microbatches in turn."""
    image, text = (_leaf(features) for features in model.features(batch, num, autocast))
    scale, bias = model.scale()
    loss = objective(DualFeatures(image, text, scale, bias), group, batch.ids)
    torch.autograd.backward(loss)  # into scale and bias, too
    model.backpropagate(batch, num, _grad(image), _grad(text))
    return loss.detach()


def _all_features(
    model: DualEncoder, microbatches: list[Batch], autocast: Autocast
) -> DualFeatures:
    parts = [_features(model, part, autocast) for part in microbatches]
    return DualFeatures(
        image=torch.cat([part.image for part in parts]),
        text=torch.cat([part.text for part in parts]),
        scale=parts[0].scale,
        bias=parts[0].bias,
    )


def _features(model: DualEncoder, batch: Batch, autocast: Autocast) -> DualFeatures:
    images = normalize(batch.images)
    with autocast():
        features: DualFeatures = model(images, batch.tokens, batch.lengths)
    return features


def _leaf(value: Tensor) -> Tensor:
    return value.detach().requires_grad_()


def _grad(leaf: Tensor) -> Tensor:
    if leaf.grad is None:
        raise RuntimeError("the loss does not depend on a feature that it was given")
    return leaf.grad
