"""What torch.compile and opcheck must know of torch.ops.carillon.image_normalize.

No autograd formula: the input is an integer tensor, so nothing can ask for its gradient.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from carillon.kernels.image_normalize.reference import check


def register(namespace: str) -> None:
    """Registers the shape function; called once a namespace, after the op has been declared."""
    torch.library.register_fake(f"{namespace}::image_normalize", shape)


def shape(
    images_NHWC: Tensor, mean: Sequence[float], std: Sequence[float], dtype: torch.dtype
) -> Tensor:
    check(images_NHWC, mean, std, dtype)
    n, h, w, c = images_NHWC.shape
    return images_NHWC.new_empty((n, c, h, w), dtype=dtype)
