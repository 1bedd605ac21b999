"""Started by torchrun: attention over shares of packed rows against whole rows; rank 0 writes."""

import json
import sys
from itertools import product
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from carillon.engine.parallel.collectives import gather_rows
from carillon.engine.parallel.context import ContextAttention
from carillon.engine.parallel.parity import gradient_errors
from carillon.engine.parallel.zigzag import Zigzag
from carillon.kernels.packed_attention.reference import packed_attention

CHUNK, HEAD_DIM = 7, 16  # tokens of a chunk: no multiple of any tile
METHODS = ("ulysses", "ring", "all_gather")
HEADS = {2: [(4, 4), (4, 2), (6, 3), (2, 1)], 4: [(4, 4), (8, 2), (4, 1)]}


def documents(length: int) -> dict[str, list[list[int]]]:
    """Starts and the end of the documents of two rows."""
    return {
        "one document": [[0, length], [0, length]],
        "across shares": [
            [0, 5, 17, 18, length - 1, length],
            [0, length // 2 + 3, length, length, length, length],
        ],
        "short and empty": [
            [0, 0, *range(1, length, 3), length],
            [0, 1, 1, *range(2, length, 3), length, length, length],
        ],
    }


def padded(starts: list[list[int]]) -> Tensor:
    longest = max(len(row) for row in starts)
    return torch.tensor([row + row[-1:] * (longest - len(row)) for row in starts]).int()


def dense(q: Tensor, k: Tensor, v: Tensor, offsets: Tensor, causal: bool) -> Tensor:
    """Whole rows, written out over one mask."""
    index = torch.arange(q.shape[1])
    document = torch.stack([torch.searchsorted(row, index, right=True) for row in offsets])
    seen = document[:, :, None] == document[:, None, :]
    seen = seen & (index[:, None] >= index) if causal else seen
    k, v = (x.repeat_interleave(q.shape[2] // x.shape[2], dim=2) for x in (k, v))
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) * q.shape[3] ** -0.5
    weights = scores.masked_fill(~seen[:, None], -torch.inf).softmax(3)
    return torch.einsum("bhqk,bkhd->bqhd", weights, v)


def packed(q: Tensor, k: Tensor, v: Tensor, offsets: Tensor, causal: bool) -> Tensor:
    """Whole rows by the op."""
    batch, length = q.shape[:2]
    starts = (offsets + length * torch.arange(batch)[:, None]).flatten().int()
    flat = (x.flatten(0, 1) for x in (q, k, v))
    out, _ = packed_attention(*flat, starts, starts, length, length, causal)
    return out.unflatten(0, (batch, length))


def results(attend: Any, inputs: list[Tensor], grad: Tensor) -> dict[str, Tensor]:
    leaves = [x.detach().requires_grad_() for x in inputs]
    out = attend(*leaves)
    grads = torch.autograd.grad(out, leaves, grad)
    return dict(zip(("out", "dq", "dk", "dv"), (out.detach(), *grads), strict=True))


def compared(found: dict[str, Tensor], reference: dict[str, Tensor]) -> float:
    return max(gradient_errors(found, reference).values())


def main() -> None:
    dist.init_process_group("gloo")
    group = dist.group.WORLD
    assert group is not None
    size, rank = dist.get_world_size(), dist.get_rank()
    zigzag = Zigzag(size, rank)
    length = 2 * size * CHUNK
    cases = []
    for heads, (name, starts), causal in product(
        HEADS[size], documents(length).items(), (True, False)
    ):
        offsets = padded(starts)
        generator = torch.Generator().manual_seed(5)
        shapes = [(2, length, count, HEAD_DIM) for count in (heads[0], heads[1], heads[1])]
        inputs = [torch.randn(shape, generator=generator) for shape in shapes]
        grad = torch.randn(shapes[0], generator=generator)
        exact = results(
            lambda q, k, v, o=offsets, c=causal: dense(q, k, v, o, c),
            [x.double() for x in inputs],
            grad.double(),
        )
        one = results(lambda q, k, v, o=offsets, c=causal: packed(q, k, v, o, c), inputs, grad)
        for method, dtype, provider in product(
            METHODS, (torch.float32, torch.bfloat16), (None, "reference")
        ):
            if provider == "reference" and (dtype is torch.bfloat16 or name == "one document"):
                continue
            core = ContextAttention(method, group, causal=causal, provider=provider)
            shares = results(
                lambda q, k, v, o=offsets, core=core: core(q, k, v, o),
                [zigzag.share(x).to(dtype) for x in inputs],
                zigzag.share(grad).to(dtype),
            )
            whole = {
                key: zigzag.join(gather_rows(x.float().unsqueeze(0), group))
                for key, x in shares.items()
            }
            cases.append(
                {
                    "case": f"{method} {heads} {name} causal={causal} {provider}",
                    "dtype": str(dtype),
                    "error": compared(whole, one),
                    "error_float64": compared(whole, exact),
                    "one_float64": compared(one, exact),
                }
            )
    if rank == 0:
        Path(sys.argv[1]).write_text(json.dumps(cases))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
