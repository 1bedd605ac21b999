"""Both exchanges of the contrastive ops and losses against the definition of the whole batch in
float64, by four processes forked from here: python exchange_worker.py REPORT.json

They work in groups of 1 to 4; the last of them, which is in every group, writes the errors.
"""

import json
import multiprocessing
import sys
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from itertools import product
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from carillon.engine.losses import gathered, ring
from carillon.engine.losses.contrastive import sigmoid_contrastive, softmax_contrastive
from carillon.engine.models.towers.dual_encoder import DualFeatures
from carillon.engine.parallel.parity import gradient_errors
from carillon.kernels.table import load_native

NUM_RANKS = 4
PAIRS, EXTRA, DIMS = 7, 4, 10  # of a rank; extra columns match no row
LEAVES = ("rows", "columns", "scale", "bias")
RESULTS = ("row_lse", "column_lse", "positive", "row_sum", "column_sum", "losses")
EXCHANGES = {"gather": gathered, "ring": ring}


class Problem(NamedTuple):
    """The whole batch: the ranks' rows and columns one after another; float64."""

    rows: Tensor
    columns: Tensor
    scale: Tensor
    bias: Tensor
    row_ids: Tensor
    column_ids: Tensor
    weights: list[Tensor]

    @property
    def leaves(self) -> tuple[Tensor, ...]:
        return self.rows, self.columns, self.scale, self.bias


def problem(num_ranks: int, extra: int) -> Problem:
    """Ids that pairs share within a rank and across ranks; some pairs have none."""
    generator = torch.Generator().manual_seed(num_ranks)
    n, m = num_ranks * PAIRS, num_ranks * (PAIRS + extra)

    def unit(count: int) -> Tensor:
        values = torch.randn(count, DIMS, generator=generator, dtype=torch.float64)
        return F.normalize(values, dim=-1).float().double()

    row_ids = torch.randint(-1, 2 * num_ranks, (n,), generator=generator)
    column_ids = torch.randint(-1, 2 * num_ranks, (m,), generator=generator)
    column_ids.view(num_ranks, -1)[:, :PAIRS] = row_ids.view(num_ranks, -1)
    lengths = (n, m, n, n, m, n)
    return Problem(
        *(unit(n), unit(m)),
        *(torch.tensor([value], dtype=torch.float64) for value in (25.0, -3.0)),
        *(row_ids, column_ids),
        [torch.rand(k, generator=generator, dtype=torch.float64) for k in lengths],
    )


def definition(given: Problem, num_ranks: int, with_ids: bool) -> list[Tensor]:
    """The five reductions and the sigmoid form's losses, from all logits."""
    n, m = len(given.rows) // num_ranks, len(given.columns) // num_ranks
    at = torch.arange(len(given.rows))
    matches = torch.zeros(len(given.rows), len(given.columns), dtype=torch.bool)
    matches[at, at // n * m + at % n] = True
    kept = torch.ones_like(matches)
    if with_ids:
        equal = (given.row_ids[:, None] == given.column_ids) & (given.row_ids[:, None] >= 0)
        kept = ~equal | matches
    logits = given.scale * given.rows @ given.columns.T
    masked = logits.masked_fill(~kept, -torch.inf)
    counted = logits.masked_fill(~kept, 0.0)
    signed = torch.where(matches, -1.0, 1.0) * (logits + given.bias)
    losses = F.softplus(signed).masked_fill(~kept, 0.0).sum(1)
    sums = counted.sum(1), counted.sum(0)
    positive = logits[matches]  # row by row
    return [masked.logsumexp(1), masked.logsumexp(0), positive, *sums, losses]


def leaves_of(values: Sequence[Tensor]) -> list[Tensor]:
    return [value.detach().clone().requires_grad_() for value in values]


def gradients_of(given: Problem) -> dict[str, Tensor]:
    """Those that there are."""
    named = zip(LEAVES, given.leaves, strict=True)
    return {name: leaf.grad for name, leaf in named if leaf.grad is not None}


def weighted(results: Sequence[Tensor], weights: Sequence[Tensor]) -> Tensor:
    return torch.stack([(x * w).sum() for x, w in zip(results, weights, strict=True)]).sum()


def local(values: Tensor, rank: int, num_ranks: int) -> Tensor:
    return values.chunk(num_ranks)[rank]


def whole(values: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Rows of all ranks."""
    parts = [torch.empty_like(values) for _ in range(dist.get_world_size(group))]
    dist.all_gather(parts, values.contiguous(), group=group)
    return torch.cat(parts)


def whole_gradients(own: Sequence[Tensor], group: dist.ProcessGroup) -> dict[str, Tensor]:
    """Of the ranks' parts all rows, of what they share the sum."""
    gradients = {}
    for name, leaf in zip(LEAVES, own, strict=False):
        assert leaf.grad is not None
        if name in ("rows", "columns"):
            gradients[name] = whole(leaf.grad, group)
        else:
            dist.all_reduce(leaf.grad, group=group)
            gradients[name] = leaf.grad
    return gradients


def ops_error(
    group: dist.ProcessGroup, given: Problem, exchange: str, provider: str, with_ids: bool
) -> dict[str, float]:
    """Of every result, and of the gradients by a weighted sum of all of them."""
    num_ranks, rank = dist.get_world_size(group), dist.get_rank(group)
    reference = Problem(*leaves_of(given.leaves), *given[4:])
    wanted = definition(reference, num_ranks, with_ids)
    weighted(wanted, given.weights).backward()

    rows, columns = (local(value, rank, num_ranks).float() for value in given.leaves[:2])
    own = leaves_of((rows, columns, given.scale.float(), given.bias.float()))
    how: dict[str, Any] = {"provider": provider}
    if with_ids:
        how["row_ids"] = local(given.row_ids, rank, num_ranks)
        how["column_ids"] = local(given.column_ids, rank, num_ranks)
    ops = EXCHANGES[exchange]
    found = [
        *ops.contrastive(*own[:3], group, with_sums=True, **how),
        ops.contrastive_sigmoid(*own, group, **how),
    ]
    weighted(found, [local(w, rank, num_ranks).float() for w in given.weights]).backward()
    got = {name: whole(value.detach(), group) for name, value in zip(RESULTS, found, strict=True)}
    results = {name: value.detach() for name, value in zip(RESULTS, wanted, strict=True)}
    errors = gradient_errors(whole_gradients(own, group), gradients_of(reference))
    return gradient_errors(got, results) | errors


def plain_loss(given: Problem, kind: str, smoothing: float, with_ids: bool) -> Tensor:
    """The loss of the whole batch, pair by pair as classes that count."""
    ids = given.row_ids
    n = len(ids)
    logits = given.scale * given.rows @ given.columns.T
    same = (ids[:, None] == ids) & (ids >= 0) & ~torch.eye(n, dtype=torch.bool)
    if not with_ids:
        same = torch.zeros_like(same)
    if kind == "sigmoid":
        signs = 2 * torch.eye(n, dtype=torch.float64) - 1
        return -(F.logsigmoid(signs * (logits + given.bias))[~same]).sum() / n
    losses = []
    for side in (logits, logits.T):
        for i in range(n):
            kept = ~same[i]
            label = kept[:i].sum()  # where its own stands among those that count
            losses.append(F.cross_entropy(side[i][kept], label, label_smoothing=smoothing))
    return torch.stack(losses).mean()


def loss_error(
    group: dist.ProcessGroup,
    given: Problem,
    exchange: Any,
    kind: str,
    smoothing: float,
    with_ids: bool,
) -> dict[str, float]:
    num_ranks, rank = dist.get_world_size(group), dist.get_rank(group)
    reference = Problem(*leaves_of(given.leaves), *given[4:])
    expected = plain_loss(reference, kind, smoothing, with_ids)
    expected.backward()
    rows, columns = (local(value, rank, num_ranks).float() for value in given.leaves[:2])
    ids = local(given.row_ids, rank, num_ranks) if with_ids else None
    own = leaves_of((rows, columns, given.scale.float(), given.bias.float()))
    if kind == "sigmoid":
        loss = sigmoid_contrastive(DualFeatures(*own), group, ids, exchange=exchange)
    else:
        own.pop()  # this form has no bias
        features = DualFeatures(*own, bias=None)
        loss = softmax_contrastive(
            features, group, ids, label_smoothing=smoothing, exchange=exchange
        )
    mean = loss / num_ranks  # its sum over ranks is the loss of the batch
    mean.backward()
    total = mean.detach().clone()
    dist.all_reduce(total, group=group)
    errors = gradient_errors(whole_gradients(own, group), gradients_of(reference))
    return errors | {"loss": abs(float(total) / expected.item() - 1)}


class LargestTensor(TorchDispatchMode):
    """Values of the largest tensor that any operator gives while this is entered."""

    values = 0

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        for one in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(one, Tensor):
                self.values = max(self.values, one.numel())
        return out


def largest_values(group: dist.ProcessGroup, exchange: str) -> int:
    """Forward and backward with far more dims than ranks."""
    rows, columns = (torch.ones(8, 64, requires_grad=True) for _ in range(2))
    with LargestTensor() as seen:
        out = EXCHANGES[exchange].contrastive(
            rows, columns, torch.ones(1), group, provider="native"
        )
        torch.autograd.backward(out.row_lse.sum() + out.column_lse.sum())
    return seen.values


def cases(group: dist.ProcessGroup) -> Iterator[tuple[str, dict[str, float]]]:
    """Each case's name and its errors."""
    num_ranks = dist.get_world_size(group)
    for exchange, extra, with_ids in product(EXCHANGES, (0, EXTRA), (False, True)):
        given = problem(num_ranks, extra)
        for provider in ("native", "reference") if with_ids and extra else ("native",):
            name = f"{exchange} {provider} extra={extra} ids={with_ids}"
            yield name, ops_error(group, given, exchange, provider, with_ids)
    given = problem(num_ranks, 0)
    for exchange, with_ids in product(EXCHANGES, (False, True)):
        for kind, smoothing in (("softmax", 0.0), ("softmax", 0.1), ("sigmoid", 0.0)):
            name = f"{exchange} {kind} smoothing={smoothing} ids={with_ids}"
            yield name, loss_error(group, given, exchange, kind, smoothing, with_ids)


def run_rank(rank: int, report: Path) -> None:
    store = f"file://{report.with_suffix('.store')}"
    dist.init_process_group(
        "gloo",
        init_method=store,
        rank=rank,
        world_size=NUM_RANKS,
        timeout=timedelta(seconds=200),
    )
    found = {}
    for size in range(1, NUM_RANKS + 1):
        # Not from rank 0 on: a member's number in the group is then not that in the world.
        group = dist.new_group(list(range(NUM_RANKS - size, NUM_RANKS)))
        if rank >= NUM_RANKS - size:
            assert isinstance(group, dist.ProcessGroup)
            found[size] = {
                "errors": dict(cases(group)),
                "largest": {exchange: largest_values(group, exchange) for exchange in EXCHANGES},
            }
    if rank == NUM_RANKS - 1:
        report.write_text(json.dumps(found))
    dist.destroy_process_group()


def main() -> None:
    torch.set_num_threads(1)
    load_native()
    fork = multiprocessing.get_context("fork")
    report = Path(sys.argv[1])
    ranks = [fork.Process(target=run_rank, args=(rank, report)) for rank in range(NUM_RANKS)]
    for process in ranks:
        process.start()
    # Asked once a round: waiting for none of them would never end.
    while alive := [process for process in ranks if process.is_alive()]:
        wait([process.sentinel for process in alive])
        if any(process.exitcode for process in ranks):
            for process in ranks:
                process.terminate()  # they would wait for the one that failed
    sys.exit(any(process.exitcode for process in ranks))


if __name__ == "__main__":
    main()
