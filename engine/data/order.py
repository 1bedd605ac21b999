"""The sample order as a function: which row stands at global position i follows from (seed, i).

Positions count samples since the run began; epoch e covers [e*n, (e+1)*n). Each epoch's permutation
is a keyed Feistel network with cycle walking (Black and Rogaway 2002, "Ciphers with Arbitrary
Finite Domains"), so nothing of size n is ever stored and start-up does not depend on n. World size,
worker count and restarts cannot enter. `SampleOrder` reads at random over the whole set, which
suits local disks; `BlockOrder` reads runs of rows, for disks and stores where a read has its price.
"""

from __future__ import annotations

import hashlib

import numpy as np
from numpy.typing import NDArray

Positions = NDArray[np.int64]

_ROUNDS = 6  # four make a strong pseudo-random permutation; two more for small odd domains


def stable_hash(*parts: int | str) -> int:
    """A 64-bit integer from the parts, the same on every machine and Python."""
    text = "\x1f".join(str(part) for part in parts)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def position_generator(seed: int, purpose: str, position: int) -> np.random.Generator:
    """Random numbers owned by one position: the same at any world size and after any restart."""
    return np.random.Generator(np.random.Philox(key=[stable_hash(seed, purpose), position]))


def _mix(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """The finaliser of splitmix64 (Steele et al. 2014): every output bit depends on every input."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


class Permutation:
    """A pseudo-random bijection of [0, n), evaluated one block of indices at a time."""

    def __init__(self, n: int, key: int) -> None:
        self.n = n
        half_bits = max(1, (max(n - 1, 1).bit_length() + 1) // 2)
        self._shift = np.uint64(half_bits)
        self._mask = np.uint64((1 << half_bits) - 1)
        self._keys = [np.uint64(stable_hash(key, r)) for r in range(_ROUNDS)]

    def __call__(self, index: Positions) -> Positions:
        """Images of `index` (any shape, each in [0, n)), int64."""
        out = self._once(index.astype(np.uint64))
        outside = out >= self.n
        while outside.any():  # the domain is under 4n, so about two rounds on average
            out[outside] = self._once(out[outside])
            outside = out >= self.n
        return out.astype(np.int64)

    def _once(self, x: NDArray[np.uint64]) -> NDArray[np.uint64]:
        left, right = x >> self._shift, x & self._mask
        with np.errstate(over="ignore"):
            for key in self._keys:
                left, right = right, left ^ (_mix(right ^ key) & self._mask)
        return (left << self._shift) | right


class SampleOrder:
    """An endless stream over n rows, each row once an epoch."""

    def __init__(self, n: int, seed: int) -> None:
        if n < 1:
            raise ValueError(f"an order needs at least one sample, got {n}")
        self.n = n
        self.seed = seed
        self._epoch: tuple[int, Permutation] | None = None

    def rows(self, positions: Positions) -> Positions:
        """Rows at global `positions` (int64, any epochs)."""
        epochs, index = np.divmod(positions, self.n)
        out = np.empty_like(index)
        for epoch in np.unique(epochs):
            here = epochs == epoch
            out[here] = self._permutation(int(epoch))(index[here])
        return out

    def replacement(self, position: int, attempt: int) -> int:
        """The row that stands in when the sample at `position` is bad: drawn, so independent of
        everything but the position and how many stand-ins were bad too."""
        return stable_hash(self.seed, "replacement", position, attempt) % self.n

    def _permutation(self, epoch: int) -> Permutation:
        if self._epoch is None or self._epoch[0] != epoch:
            self._epoch = (epoch, Permutation(self.n, stable_hash(self.seed, "epoch", epoch)))
        return self._epoch[1]


class BlockOrder:
    """An endless stream over n rows, each row once an epoch, that reads neighbours together.

    An epoch turns the rows by a drawn number and cuts them into blocks of `block` rows. The blocks
    are shuffled, and then the rows of every `window` blocks that follow each other: so a reader has
    at most that many places of the set open, and what it reads of each is one run of rows. The
    rest that makes no whole block ends the epoch; the turn makes it other rows each time.
    Trade-off: two rows of a block are at most a window apart, so batches are less independent than
    those of `SampleOrder`; the window bounds how much.
    """

    def __init__(self, n: int, seed: int, *, block: int, window: int) -> None:
        if n < 1 or block < 1 or window < 1:
            raise ValueError(
                f"an order needs at least one row, in blocks and windows of at least one; got "
                f"n={n}, block={block}, window={window}"
            )
        self.n, self.seed, self.block, self.window = n, seed, block, window
        self._num_whole = n // block

    def rows(self, positions: Positions) -> Positions:
        """Rows at global `positions` (int64, any epochs)."""
        epochs, index = np.divmod(positions, self.n)
        out = np.empty_like(index)
        for epoch in np.unique(epochs).tolist():
            here = epochs == epoch
            out[here] = self._of_epoch(epoch, index[here])
        return out

    def replacement(self, position: int, attempt: int) -> int:
        """As SampleOrder's."""
        return stable_hash(self.seed, "replacement", position, attempt) % self.n

    def _of_epoch(self, epoch: int, index: Positions) -> Positions:
        size = self.window * self.block
        windows = index // size
        place = np.empty_like(index)  # within the shuffled blocks
        for window in np.unique(windows).tolist():
            here = windows == window
            first = window * size
            shuffled = Permutation(
                min(size, self.n - first), stable_hash(self.seed, "window", epoch, window)
            )
            place[here] = first + shuffled(index[here] - first)
        blocks, inside = np.divmod(place, self.block)
        whole = blocks < self._num_whole
        if self._num_whole:
            shuffled = Permutation(self._num_whole, stable_hash(self.seed, "blocks", epoch))
            blocks[whole] = shuffled(blocks[whole])
        turn = stable_hash(self.seed, "turn", epoch) % self.n
        return (blocks * self.block + inside + turn) % self.n


class HeldOut:
    """Rows of a set of which every k-th is held out: `row % k == k - 1` is validation."""

    def __init__(self, num_rows: int, every: int) -> None:
        self.every = every
        self.num_validation = num_rows // every if every else 0
        self.num_training = num_rows - self.num_validation

    def training_row(self, index: Positions) -> Positions:
        """The index-th training row."""
        return index + index // (self.every - 1) if self.every else index

    def validation_rows(self) -> Positions:
        """All validation rows in order."""
        return np.arange(self.num_validation, dtype=np.int64) * self.every + (self.every - 1)
