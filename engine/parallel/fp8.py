"""8-bit products of a share of a linear layer, and scales that all shares have in common.

The styles of tensor.py hand a layer DTensors. Its local matrices are multiplied, and the product is
placed as torch would place it: a share of the columns, or one summand of the rows. Where one scale
stands for a whole matrix, its amax is the largest of all shares, so the codes are those of one
process: tensorwise by an exchange of one number for each split matrix, delayed by one exchange a
step over all processes, those with other samples and other stages included (in its first step, by
one for each cast, over those with the same stages). Rows and blocks are scaled by share: no
message, and no coarser than one process's groups.
Sums over shares are of bfloat16 products, as they are in bfloat16.
Left out: torchao's and Transformer Engine's own split layers.
Status: runs on CPU with gloo; not run on a GPU yet.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import partial

import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Partial, Shard

from carillon.engine.nn.fp8 import UNIT, Fp8Linear, multiply_fp8
from carillon.engine.nn.fp8_scaling import Role
from carillon.engine.parallel.collectives import largest_over


class SplitFp8Linear(Fp8Linear):
    """An Fp8Linear whose parameters and inputs are DTensors on one tensor-parallel axis."""

    def forward(self, x: Tensor) -> Tensor:
        if not self.takes_fp8:
            return super().forward(x)
        weight = self.weight
        assert isinstance(x, DTensor)
        assert isinstance(weight, DTensor)
        columns = weight.placements == (Shard(0),)
        mesh = weight.device_mesh
        # Each process's product by its columns is a summand of the inputs' gradient.
        x_local = x.to_local(grad_placements=[Partial()]) if columns else x.to_local()
        y = multiply_fp8(x_local, weight.to_local(), self.scaling)
        if self.bias is not None:
            assert isinstance(self.bias, DTensor)
            if columns:
                y = y + self.bias.to_local().to(y.dtype)
            else:  # the sum over processes adds the bias once
                share = self.bias.to_local(grad_placements=[Partial()]) / mesh.size()
                y = y + share.to(y.dtype)
        placement = Shard(y.dim() - 1) if columns else Partial()
        placed: Tensor = DTensor.from_local(y, mesh, [placement], run_check=False)
        return placed


def split_fp8(layers: Iterable[nn.Module], groups: Sequence[dist.ProcessGroup]) -> None:
    """Make 8-bit layers multiply their shares, in place, where their weights are split.

    `groups`: along them are all processes that have these layers (none: one process); delayed
    scaling's first step has one scale for what they hold together.
    """

    def largest(amax: Tensor) -> Tensor:
        for group in groups:
            amax = largest_over(amax, group)
        return amax

    for layer in layers:
        if not isinstance(layer, Fp8Linear) or not groups:
            continue
        if layer.scaling.slot is not None:
            layer.scaling.shares = frozenset(Role)
            layer.scaling.largest_of_shares = largest
        if isinstance(layer.weight, DTensor):
            assert not any(
                side % UNIT for side in layer.weight.to_local().shape
            )  # plans, RunConfig.check
            layer.__class__ = SplitFp8Linear
        if isinstance(layer.weight, DTensor) and layer.scaling.slot is None:
            columns = layer.weight.placements == (Shard(0),)
            layer.scaling.shares = frozenset(
                (Role.WEIGHT, Role.GRADIENT if columns else Role.INPUT)
            )
            layer.scaling.largest_of_shares = partial(
                largest_over, group=layer.weight.device_mesh.get_group()
            )
