"""torch.compile as a peer gets it."""

from collections.abc import Callable
from typing import TypeVar

import torch

Function = TypeVar("Function", bound=Callable[..., object])


def compiled(function: Function) -> Function:
    """The whole function as one graph, for the shapes of each call.

    A part that cannot be compiled raises instead of running uncompiled, and so does the ninth
    shape: a sweep calls torch.compiler.reset() between its sizes.
    """
    return torch.compile(function, fullgraph=True, dynamic=False)
