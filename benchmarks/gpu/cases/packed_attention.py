"""packed_attention of ViT and caption lengths, forward alone and with backward.

Peers hold q, k and v in their own layout, as a model that uses them would: laying out is not timed.
"""

from __future__ import annotations

import random
from typing import Any, NamedTuple

import torch
from case import Bar, Call, Case, Outputs, Side, of_peers, of_providers
from torch import Tensor

from carillon.kernels.packed_attention.reference import cost, packed_attention

OP = "packed_attention"
HEADS, HEAD_DIM = 12, 64
TOKENS = 32_768
# Weights and results are rounded to bfloat16, 2^-9 each; gradients are sums that cancel in part.
LIMITS = {"bf16": 2.0**-6, "fp32": 1e-5}
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
BAR = Bar("ratio", 1.1)


class Given(NamedTuple):
    leaves: list[Tensor]
    grad_out: Tensor
    starts: Tensor
    lengths: tuple[int, ...]


def cases(tiny: bool) -> list[Case]:
    if tiny:
        found = [_case("check", "mix", (5, 17, 1), "fp32", True)]
        return [*found, _case("bar", "equal", (9,) * 3, "fp32", True)]
    checks = [
        _case("check", name, lengths, dtype, True)
        for name, lengths in (("577", (577,) * 3), ("mix 1-577", (577, 1, 50, 197, 130, 64)))
        for dtype in DTYPES
    ]
    equal = {f"{length} tokens": (length,) * (TOKENS // length) for length in (50, 197, 577)}
    mixes = {"mix 10-577": _mix(10, 577), "captions 8-128": _mix(8, 128)}
    bars = [
        _case("bar", name, lengths, "bf16", back)
        for back in (True, False)
        for name, lengths in (equal | {"mix 50-577": _mix(50, 577)}).items()
    ]
    sweep = [_case("sweep", name, lengths, "bf16", True) for name, lengths in mixes.items()]
    sweep += [_case("sweep", "256 tokens", (256,) * 128, "bf16", True)]
    sweep += [_case("sweep", "2048 tokens", (2048,) * 16, "bf16", True)]
    sweep += [_case("sweep", "197 tokens", (197,) * 40, "fp32", True)]
    return [*checks, *bars, *sweep]


def _mix(least: int, most: int) -> tuple[int, ...]:
    draw, lengths = random.Random(0), list[int]()
    while sum(lengths) < TOKENS:
        lengths.append(draw.randint(least, most))
    return tuple(lengths)


def _case(group: str, name: str, lengths: tuple[int, ...], dtype: str, backward: bool) -> Case:
    sizes = (list(lengths), list(lengths), HEADS, HEADS, HEAD_DIM, DTYPES[dtype])
    passes = (False, True) if backward else (False,)
    return Case(
        name=f"{name} {dtype} {'forward and backward' if backward else 'forward'}",
        group=group,
        values={
            "lengths": f"{min(lengths)}-{max(lengths)}",
            "sequences": len(lengths),
            "tokens": sum(lengths),
            "heads": HEADS,
            "head_dim": HEAD_DIM,
            "dtype": dtype,
            "passes": "forward and backward" if backward else "forward",
            "each": lengths,
        },
        costs=tuple(cost(*sizes, backward=back) for back in passes),
        bars=(BAR,) if group == "bar" else (),
        limit=LIMITS[dtype],
    )


def draw(case: Case, device: str) -> Given:
    generator = torch.Generator(device).manual_seed(0)
    lengths = case.values["each"]
    shape = (sum(lengths), HEADS, HEAD_DIM)
    drawn = [
        torch.randn(shape, device=device, generator=generator).to(DTYPES[case.values["dtype"]])
        for _ in range(4)
    ]
    starts = torch.tensor([0, *lengths], device=device).cumsum(0).int()
    return Given([x.requires_grad_() for x in drawn[:3]], drawn[3], starts, lengths)


def _step(attend: Any, leaves: list[Tensor], grad_out: Tensor, backward: bool) -> Call:
    if not backward:
        return lambda: (torch.no_grad()(attend)(*leaves),)

    def call() -> Outputs:
        out = attend(*leaves)
        return (out.detach(), *torch.autograd.grad(out, leaves, grad_out))

    return call


def _packed(op: Any, given: Given, backward: bool) -> Call:
    longest = max(given.lengths)
    rest = (given.starts, given.starts, longest, longest)
    return _step(lambda *qkv: op(*qkv, *rest)[0], given.leaves, given.grad_out, backward)


def _of_peer(peer: Any, given: Given, backward: bool) -> Call:
    laid_out = [peer.lay_out(x.detach()).requires_grad_() for x in given.leaves]
    return _step(peer.attend, laid_out, peer.lay_out(given.grad_out), backward)


def sides(case: Case, device: str) -> list[Side]:
    backward = "backward" in case.values["passes"]
    ours = of_providers(
        OP, device, lambda kernel: lambda given: _packed(kernel(OP), given, backward)
    )
    if case.group == "check":
        return [side for side in ours if side.kind == "ours"]
    lengths, dtype = case.values["each"], DTYPES[case.values["dtype"]]

    def find(peers: Any) -> tuple[dict[str, Any], dict[str, str]]:
        missing = peers.missing(device, lengths, dtype, backward=backward)
        names = [name for name in peers.PEERS if name not in missing]
        # A peer is made when its turn comes: a mask of FlexAttention takes time and memory.
        return {name: (peers.PEERS[name], device, lengths) for name in names}, missing

    def make(found: Any) -> Any:
        maker, *where = found
        return lambda given: _of_peer(maker(*where), given, backward)

    return [*ours, *of_peers(OP, find, make)]


def expected(case: Case, given: Given) -> Outputs:
    """By the definition in float32, of the same values."""
    wide = [leaf.detach().float().requires_grad_() for leaf in given.leaves]
    in_float32 = given._replace(leaves=wide, grad_out=given.grad_out.float())
    return _packed(packed_attention, in_float32, backward=True)()
