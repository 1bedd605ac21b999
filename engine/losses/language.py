"""Cross-entropy of the next token over packed rows.

The loss of a step is a mean over the tokens that count in the global batch, so the number of them
is known before the first backward pass, over all microbatches and processes. A process's loss is
its own sum, so scaled that the mean over processes is the loss of the global batch. Log-softmax is
in float32, a chunk of tokens at a time, and computed again in the backward pass: logits are held
in their own type only.
Over tensor-parallel processes each has the logits of a share of the vocabulary: of a token, three
numbers pass between them (Shoeybi et al. 2019, Megatron-LM, section 3).
Reduction: sum in float32; deterministic. Left out: label smoothing.
Status: runs on CPU, over a split vocabulary with gloo; not run on a GPU yet.

Legend: B rows, L tokens of a row, T = B x L tokens, V vocabulary.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from carillon.engine.data.packed_rows import IGNORED

_CHUNK = 1024  # tokens: 128k words of float32 for each are 0.5 GB


def counted(labels_BL: Tensor) -> Tensor:
    """How many tokens have a label: (), int64. Sum it over microbatches and processes."""
    return (labels_BL != IGNORED).sum()


class SplitVocabulary(NamedTuple):
    """The processes that share a vocabulary of `size` words, as many each as DTensor gives them."""

    group: dist.ProcessGroup
    size: int

    @property
    def first(self) -> int:
        """The first word of this process's share."""
        share = -(-self.size // dist.get_world_size(self.group))
        return min(dist.get_rank(self.group) * share, self.size)

    @property
    def num_own(self) -> int:
        """How many words this process has."""
        share = -(-self.size // dist.get_world_size(self.group))
        return min(share, self.size - self.first)


def language_loss(
    logits_BLV: Tensor,
    labels_BL: Tensor,
    *,
    num_tokens: Tensor | int,
    num_processes: int = 1,
    split: SplitVocabulary | None = None,
) -> Tensor:
    """The own sum of -log p(label), x processes / counted tokens of the global batch: ().

    `num_processes`: those whose losses are averaged. A global batch without labels has loss 0.
    With `split`, logits are of this process's share of the vocabulary; labels are the same on all
    processes of its group, and each gets the whole loss.
    """
    logits_TV, labels_T = logits_BLV.flatten(0, 1), labels_BL.flatten()
    total = logits_TV.new_zeros((), dtype=torch.float32)
    for logits, labels in zip(
        torch.split(logits_TV, _CHUNK), torch.split(labels_T, _CHUNK), strict=True
    ):
        if split is None:
            part = checkpoint(_sum, logits, labels, use_reentrant=False, preserve_rng_state=False)
        else:
            part = _SplitSum.apply(logits, labels, split)  # type: ignore[no-untyped-call]
        total = total + part
    count = torch.as_tensor(num_tokens, device=total.device).clamp(min=1)
    return total * num_processes / count


def _sum(logits_TV: Tensor, labels_T: Tensor) -> Tensor:
    return F.cross_entropy(logits_TV.float(), labels_T, ignore_index=IGNORED, reduction="sum")


class _SplitSum(torch.autograd.Function):
    """As _sum where V is this process's share. Held for the backward pass: the logits as they are,
    and one number a token."""

    @staticmethod
    def forward(ctx: Any, logits_TV: Tensor, labels_T: Tensor, split: SplitVocabulary) -> Tensor:
        own = logits_TV.shape[1]
        values_TV = logits_TV.float()
        most_T = values_TV.new_full((len(values_TV),), -torch.inf)
        if own:
            most_T = values_TV.amax(1)
        dist.all_reduce(most_T, dist.ReduceOp.MAX, group=split.group)
        index_T = labels_T - split.first
        mine_T = (index_T >= 0) & (index_T < own) & (labels_T != IGNORED)
        index_T = index_T.where(mine_T, 0)
        sums_T2 = torch.zeros((len(values_TV), 2), device=logits_TV.device)
        if own:
            sums_T2[:, 0] = (values_TV - most_T[:, None]).exp().sum(1)
            sums_T2[:, 1] = values_TV.gather(1, index_T[:, None])[:, 0].where(mine_T, 0.0)
        dist.all_reduce(sums_T2, group=split.group)
        lse_T = most_T + sums_T2[:, 0].log()
        ctx.save_for_backward(logits_TV, labels_T, lse_T, index_T, mine_T)
        return (lse_T - sums_T2[:, 1]).where(labels_T != IGNORED, 0.0).sum()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        logits_TV, labels_T, lse_T, index_T, mine_T = ctx.saved_tensors
        grad_TV = (logits_TV.float() - lse_T[:, None]).exp()
        if logits_TV.shape[1]:
            grad_TV.scatter_add_(1, index_T[:, None], -mine_T[:, None].float())
        grad_TV *= (labels_T != IGNORED)[:, None] * grad
        return grad_TV.to(logits_TV.dtype), None, None
