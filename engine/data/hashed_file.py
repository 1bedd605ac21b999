"""A file that is read about once, front to back, with the SHA-256 of its whole along the way.

Indexing a tar goes forward, with a step back for each sample to sum it up. The last chunks that
were read are kept for those steps; a longer one reads again. So a remote tar is fetched once.
"""

from __future__ import annotations

import hashlib
import io
from collections import deque

from carillon.engine.data.store import Blob

_CHUNK_BYTES = 8 << 20
_NUM_KEPT = 4


class HashedFile(io.BytesIO):  # for its type alone: its own buffer stays empty
    """As much of a binary file as reading a tar needs."""

    def __init__(self, blob: Blob) -> None:
        super().__init__()
        self.size_bytes = blob.size_bytes
        self._blob = blob
        self._position = 0
        self._end = 0  # how far the hash has come
        self._kept: deque[tuple[int, bytes]] = deque(maxlen=_NUM_KEPT)
        self._sha256 = hashlib.sha256()

    def seek(self, position: int, whence: int = 0) -> int:
        assert whence == 0
        self._position = position
        return position

    def read(self, size: int | None = -1) -> bytes:
        start = self._position
        stop = self.size_bytes if size is None or size < 0 else min(start + size, self.size_bytes)
        if stop <= start:
            return b""
        while self._end < stop:
            self._advance()
        self._position = stop
        if not self._kept or start < self._kept[0][0]:
            return self._blob.read(start, stop - start)
        parts = (data[max(start - at, 0) : max(stop - at, 0)] for at, data in self._kept)
        return b"".join(parts)

    def sha256(self) -> str:
        """Of the whole file."""
        while self._end < self.size_bytes:
            self._advance()
        return self._sha256.hexdigest()

    def _advance(self) -> None:
        data = self._blob.read(self._end, min(_CHUNK_BYTES, self.size_bytes - self._end))
        if not data:
            raise OSError(None, "it became shorter while it was read")
        self._sha256.update(data)
        self._kept.append((self._end, data))
        self._end += len(data)
