"""Tile sizes of the Triton kernels, by head size, dtype and the longest sequence.

Chosen from what the compiler says (no spills, shared memory that leaves room for a second block
where it can): docs/gpu-status.md. Not measured on a GPU yet. In float32 tf32x3 keeps two parts of
every operand: above a head size of 64 products over it go by chunks, else whatever the tile spills.
"""

from typing import NamedTuple

import torch


class Tile(NamedTuple):
    """Tokens of a block of queries and of keys, warps, stages of the load pipeline, and how many
    values of a head a product takes at a time (0: all)."""

    block_q: int
    block_k: int
    num_warps: int
    num_stages: int
    chunk: int = 0


_SHORT = 64  # tokens: one block holds the whole sequence

# By (kernel, bytes of an element), then the largest head size that the row serves.
_TILES: dict[tuple[str, int], dict[int, Tile]] = {
    ("forward", 2): {
        64: Tile(128, 64, 4, 3),
        128: Tile(128, 64, 8, 3),
        256: Tile(128, 32, 8, 2),
    },
    ("forward", 4): {
        64: Tile(64, 32, 4, 2),
        128: Tile(32, 32, 8, 1, 64),
        256: Tile(32, 32, 8, 1, 64),
    },
    ("backward_queries", 2): {
        64: Tile(64, 64, 4, 2),
        128: Tile(64, 64, 8, 2),
        256: Tile(64, 32, 8, 2),
    },
    ("backward_queries", 4): {
        64: Tile(64, 32, 4, 2),
        128: Tile(32, 32, 8, 1, 32),
        256: Tile(16, 64, 8, 1, 64),
    },
    ("backward_keys", 2): {
        64: Tile(64, 64, 4, 2),
        128: Tile(64, 64, 8, 2),
        256: Tile(16, 64, 8, 2),
    },
    ("backward_keys", 4): {
        64: Tile(32, 64, 8, 1),
        128: Tile(64, 16, 8, 1, 64),
        256: Tile(32, 16, 8, 1, 64),
    },
}


def tile_of(
    kernel: str, head_dim: int, dtype: torch.dtype, longest: int, masked: bool = False
) -> Tile:
    """The tile of a launch whose longest sequence has `longest` tokens, causal where `masked`."""
    rows = _TILES[kernel, dtype.itemsize]
    tile = next(rows[size] for size in rows if head_dim <= size)
    if kernel == "forward" and longest <= _SHORT and tile.block_q > _SHORT:
        return tile._replace(block_q=_SHORT, num_warps=4 if head_dim <= 64 else tile.num_warps)
    if kernel == "backward_keys" and masked and tile.block_q == 64:
        return tile._replace(block_q=32)  # the mask takes registers
    return tile
