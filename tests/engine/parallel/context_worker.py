"""Started by torchrun: attention over shares of packed rows against whole rows, and a decoder that
uses it against one process; rank 0 writes."""

import json
import runpy
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
from carillon.kernels.table import resolve

decoder = runpy.run_path(str(Path(__file__).with_name("context_decoder_worker.py")))
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
    out, _ = resolve("packed_attention", q.device)(*flat, starts, starts, length, length, causal)
    return out.unflatten(0, (batch, length))


def results(attend: Any, inputs: list[Tensor], grad: Tensor) -> dict[str, Tensor]:
    leaves = [x.detach().requires_grad_() for x in inputs]
    out = attend(*leaves)
    grads = torch.autograd.grad(out, leaves, grad)
    return dict(zip(("out", "dq", "dk", "dv"), (out.detach(), *grads), strict=True))


def compared(found: dict[str, Tensor], reference: dict[str, Tensor]) -> float:
    return max(gradient_errors(found, reference).values())


def run_cases() -> list[dict[str, Any]]:
    """Every case of this world size, in a process group that has started."""
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
        for dtype in (torch.float32, torch.bfloat16):
            inputs, grad = [x.to(dtype) for x in inputs], grad.to(dtype)
            exact = results(
                lambda q, k, v, o=offsets, c=causal: dense(q, k, v, o, c),
                [x.double() for x in inputs],
                grad.double(),
            )
            one = results(lambda q, k, v, o=offsets, c=causal: packed(q, k, v, o, c), inputs, grad)
            for method, provider in product(METHODS, (None, "reference")):
                if provider == "reference" and name == "one document":
                    continue  # it is slow
                core = ContextAttention(method, group, causal=causal, provider=provider)
                shares = results(
                    lambda q, k, v, o=offsets, core=core: core(q, k, v, o),
                    [zigzag.share(x) for x in inputs],
                    zigzag.share(grad),
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
    return cases


def main() -> None:
    dist.init_process_group("gloo")
    results = {"attention": run_cases(), "decoder": decoder["run_cases"]()}
    if dist.get_rank() == 0:
        Path(sys.argv[1]).write_text(json.dumps(results))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
