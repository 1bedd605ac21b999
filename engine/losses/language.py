"""Cross-entropy of the next token over packed rows.

The loss of a step is a mean over the tokens that count in the global batch, so the number of them
is known before the first backward pass, over all microbatches and processes. A process's loss is
its own sum, so scaled that the mean over processes is the loss of the global batch. Log-softmax is
in float32, a chunk of tokens at a time, and computed again in the backward pass: logits are held
in their own type only.
Reduction: sum in float32; deterministic. Left out: a split vocabulary, label smoothing.

Legend: B rows, L tokens of a row, T = B x L tokens, V vocabulary.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from carillon.engine.data.packed_rows import IGNORED

_CHUNK = 1024  # tokens: 128k words of float32 for each are 0.5 GB


def counted(labels_BL: Tensor) -> Tensor:
    """How many tokens have a label: (), int64. Sum it over microbatches and processes."""
    return (labels_BL != IGNORED).sum()


def language_loss(
    logits_BLV: Tensor, labels_BL: Tensor, *, num_tokens: Tensor | int, num_processes: int = 1
) -> Tensor:
    """The own sum of -log p(label), x processes / counted tokens of the global batch: ().

    `num_processes`: those whose losses are averaged. A global batch without labels has loss 0.
    """
    logits_TV, labels_T = logits_BLV.flatten(0, 1), labels_BL.flatten()
    total = logits_TV.new_zeros((), dtype=torch.float32)
    for logits, labels in zip(
        torch.split(logits_TV, _CHUNK), torch.split(labels_T, _CHUNK), strict=True
    ):
        part = checkpoint(_sum, logits, labels, use_reentrant=False, preserve_rng_state=False)
        total = total + part
    count = torch.as_tensor(num_tokens, device=total.device).clamp(min=1)
    return total * num_processes / count


def _sum(logits_TV: Tensor, labels_T: Tensor) -> Tensor:
    return F.cross_entropy(logits_TV.float(), labels_T, ignore_index=IGNORED, reduction="sum")
