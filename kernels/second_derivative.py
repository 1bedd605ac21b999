"""Backward ops have no derivative of their own, and say so.

Without a formula autograd would only warn, and a second derivative would be wrong.
"""

from typing import Any

import torch
from torch import Tensor


def refuse_second_derivative(namespace: str, *backward_ops: str) -> None:
    """Registers a formula that raises RuntimeError for those of the ops that `namespace` has."""
    for name in backward_ops:
        if hasattr(getattr(torch.ops, namespace), name):
            torch.library.register_autograd(f"{namespace}::{name}", _refusal(name))


def _refusal(name: str) -> Any:
    op = name.removesuffix("_backward")

    def refuse(ctx: Any, *grads: Tensor) -> None:
        raise RuntimeError(
            f"{op} has no second derivative: choose the provider 'reference' for one"
        )

    return refuse
