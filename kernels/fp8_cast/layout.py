"""Where the scales of an fp8 copy stand in memory, as torch._scaled_mm wants them.

Shapes are those of a copy with R rows and C columns. A copy is the first operand as it is,
`(copy, scale)`, or the second one transposed, `(copy.t(), scale.t())`, at any granularity:

| granularity | shape | order |
| --- | --- | --- |
| tensorwise | () | |
| rowwise | (R, 1) | |
| 1x128 | (R, ceil(C / 128)) | rows run fastest |
| 128x128 | (ceil(R / 128), ceil(C / 128)) | block columns run fastest, row pitch a multiple of 4 |

Source: cuBLASLt's layouts of scaling factors, and the checks of torch's ScaledBlas.cpp. The pitch
is cuBLASLt's 16-byte rule (pytorch pull request 166752), and the padding is zero.
"""

import torch
from torch import Tensor

BLOCK = 128
_PITCH = 4
GRANULARITIES = ("tensorwise", "rowwise", "1x128", "128x128")


def num_blocks(size: int) -> int:
    """Blocks of 128 that cover `size`; the last one may be shorter."""
    return -(-size // BLOCK)


def new_scale(like: Tensor, granularity: str, num_rows: int, num_columns: int) -> Tensor:
    """Allocates the float32 scales of a copy of this size, on the device of `like`."""
    if granularity == "tensorwise":
        return like.new_empty((), dtype=torch.float32)
    if granularity == "rowwise":
        return like.new_empty((num_rows, 1), dtype=torch.float32)
    blocks = num_blocks(num_columns)
    if granularity == "1x128":
        return like.new_empty((blocks, num_rows), dtype=torch.float32).t()
    pitch = -(-blocks // _PITCH) * _PITCH
    return like.new_zeros((num_blocks(num_rows), pitch), dtype=torch.float32)[:, :blocks]
