"""image_normalize of a training batch, beside the same composition in torch."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from case import Bar, Call, Case, Outputs, Side, of_peers, of_providers
from torch import Tensor

from carillon.kernels.image_normalize.reference import image_normalize
from carillon.kernels.roofline import Cost

OP = "image_normalize"
MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
LIMITS = {"bf16": 2.0**-8, "fp32": 1e-6}
BAR = Bar("ratio", 1.0)


class Given(NamedTuple):
    images: Tensor


def cases(tiny: bool) -> list[Case]:
    if tiny:
        return [_case(group, 2, 16, "bf16") for group in ("check", "bar")]
    checks = [_case("check", 3, size, dtype) for size in (97, 224) for dtype in DTYPES]
    bars = [_case("bar", 256, 224, "bf16")]
    sweep = [_case("sweep", 256, 224, "fp32"), _case("sweep", 2048, 64, "bf16")]
    return [*checks, *bars, *sweep]


def _case(group: str, batch: int, size: int, dtype: str) -> Case:
    num_values = batch * size * size * 3
    return Case(
        name=f"{batch}x{size}x{size} {dtype}",
        group=group,
        values={"batch": batch, "size": size, "dtype": dtype, "passes": "forward"},
        costs=(Cost(flops=0.0, size_bytes=float(num_values * (1 + DTYPES[dtype].itemsize))),),
        bars=(BAR,) if group == "bar" else (),
        limit=LIMITS[dtype],
    )


def draw(case: Case, device: str) -> Given:
    generator = torch.Generator(device).manual_seed(0)
    size = case.values["size"]
    shape = (case.values["batch"], size, size, 3)
    return Given(
        torch.randint(0, 256, shape, dtype=torch.uint8, device=device, generator=generator)
    )


def sides(case: Case, device: str) -> list[Side]:
    dtype = DTYPES[case.values["dtype"]]

    def normalize(op: Any, given: Given) -> Call:
        return lambda: [op(given.images, MEAN, STD, dtype)]

    ours = of_providers(OP, device, lambda kernel: lambda given: normalize(kernel(OP), given))
    if case.group == "check":
        return [side for side in ours if side.kind == "ours"]

    def find(peers: Any) -> tuple[dict[str, Any], dict[str, str]]:
        return peers.available(device), peers.missing(device)

    return [*ours, *of_peers(OP, find, lambda peer: lambda given: normalize(peer, given))]


def expected(case: Case, given: Given) -> Outputs:
    """By the definition in float32."""
    return [image_normalize(given.images, MEAN, STD, torch.float32)]
