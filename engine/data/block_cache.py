"""A bounded cache on disk of aligned blocks of remote objects, shared by processes.

A block is a file named by what it is a block of, written aside and renamed, so that readers never
see half of one; its checksum is looked at when a process first uses it, and a damaged file is
dropped as if it had not been there. Using a block makes it young; once more than `max_bytes` are
held, or half of the free disk, the oldest go, under a lock that nobody waits for. Between looks a
process may write a thirty-second of the limit, so that much a process it may be exceeded.
A disk that is full or cannot be written costs speed, not samples: reads go on without a cache.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import logging
import os
import shutil
import zlib
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path

_CRC_BYTES = 4
_MAX_REMEMBERED = 65_536  # blocks whose checksum this process has seen to be right
_KEPT_SHARE = 0.9
_PARTIAL = ".partial-"
_log = logging.getLogger(__name__)


def cache_root() -> Path:
    """The folder for what can be made again: `$XDG_CACHE_HOME/carillon` or `~/.cache/carillon`."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "carillon"


class BlockCache:
    """Blocks by (name, number); `name` stands for one version of one object."""

    def __init__(self, folder: Path, max_bytes: int) -> None:
        self._folder, self._max_bytes = folder, max_bytes
        self._checked: OrderedDict[Path, None] = OrderedDict()
        self._unlooked_bytes = max_bytes  # so that the first write looks
        self._usable = max_bytes > 0

    def read(self, name: str, number: int, start: int, size: int) -> bytes | None:
        """Bytes [start, start + size) of a block; none when it is not here or damaged."""
        path = self._path(name, number)
        try:
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError:
            return None
        try:
            held_bytes = os.fstat(fd).st_size
            if path in self._checked:
                data = os.pread(fd, min(size, held_bytes - _CRC_BYTES - start), start)
            else:
                whole = self._check(path, os.pread(fd, held_bytes, 0))
                data = b"" if whole is None else whole[start : start + size]
            os.utime(fd)
        except OSError:
            return None
        finally:
            os.close(fd)
        return data if len(data) == size else None

    def write(self, name: str, number: int, data: bytes) -> None:
        """Keep a block; when it cannot be kept, a warning says so once."""
        if not self._usable:
            return
        path = self._path(name, number)
        partial = path.with_name(f"{_PARTIAL}{os.getpid()}-{path.name}")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            partial.write_bytes(data + zlib.crc32(data).to_bytes(_CRC_BYTES, "little"))
            partial.replace(path)
        except OSError as error:
            self._usable = False
            _log.warning(
                "no blocks are kept in %s: %s; reads go on without", self._folder, error.strerror
            )
            with contextlib.suppress(OSError):
                partial.unlink()
            return
        self._unlooked_bytes += len(data)
        if self._unlooked_bytes >= self._max_bytes // 32:
            self._unlooked_bytes = 0
            self._make_room()

    def _path(self, name: str, number: int) -> Path:
        digest = hashlib.sha256(f"{name}\0{number}".encode()).hexdigest()[:40]
        return self._folder / digest[:2] / digest

    def _check(self, path: Path, content: bytes) -> bytes | None:
        data, crc = content[:-_CRC_BYTES], content[-_CRC_BYTES:]
        if zlib.crc32(data).to_bytes(_CRC_BYTES, "little") != crc:
            _log.warning("the cached block %s is damaged; it is read again", path)
            path.unlink(missing_ok=True)
            return None
        self._checked[path] = None
        if len(self._checked) > _MAX_REMEMBERED:
            self._checked.popitem(last=False)
        return data

    def _make_room(self) -> None:
        with contextlib.suppress(OSError), open(self._folder / "lock", "ab") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return  # another process is at it
            files = sorted(self._files())
            held = sum(size for _, size, _ in files)
            limit = min(self._max_bytes, (held + shutil.disk_usage(self._folder).free) // 2)
            if held <= limit:
                return
            for _, size, path in files:
                with contextlib.suppress(OSError):
                    os.unlink(path)
                    held -= size
                if held <= limit * _KEPT_SHARE:
                    return

    def _files(self) -> Iterator[tuple[int, int, str]]:
        """(time of last use, size, path) of every block, and of what killed writers left."""
        for folder in os.scandir(self._folder):
            if folder.is_dir(follow_symlinks=False):
                for file in os.scandir(folder):
                    with contextlib.suppress(FileNotFoundError):
                        stat = file.stat(follow_symlinks=False)
                        yield stat.st_mtime_ns, stat.st_size, file.path
