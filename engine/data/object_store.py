"""S3, Google Cloud Storage and Azure by fsspec, with deadlines, retries and plain reasons.

fsspec's file systems run on an event loop in a thread of their own; every call here waits for it
with a deadline, so that a store that stalls cannot hold a reader. Their own retries are turned off
where that can be set, since the ones here are bounded as a whole. An instance belongs to the
process that made it (fsspec refuses it after a fork), so store.py keeps one a process.
Status: S3 is tested against moto's server; gcsfs and adlfs have not met their services yet.
"""

from __future__ import annotations

import asyncio
import errno
from collections.abc import Mapping
from functools import partial
from threading import Lock
from typing import Any

from carillon.engine.config import UserError
from carillon.engine.data import store
from carillon.engine.data.retry import with_retries
from carillon.engine.data.store import Facts, Store, StoreError, try_limit_s

_TAGS = ("ETag", "etag", "generation", "md5Hash", "LastModified", "last_modified", "mtime")
_LIBRARIES = ("botocore", "aiobotocore", "aiohttp", "s3fs", "gcsfs", "adlfs", "azure", "google")
_UNSET = ("Credential", "Token", "Profile", "Region", "Validation", "Authentication")
_OPTIONS: Mapping[str, Mapping[str, Any]] = {
    "s3": {
        "config_kwargs": {
            "connect_timeout": 10,
            "read_timeout": 30,
            "retries": {"total_max_attempts": 1},
        },
    },
}


class ObjectStore(Store):
    """One kind of object store. Raises UserError when its library is not installed."""

    def __init__(self, scheme: str, extra: str) -> None:
        import fsspec

        try:
            kind = fsspec.get_filesystem_class(scheme)
        except ImportError as error:
            raise UserError(
                f"{scheme}:// needs a library that is not installed: "
                f"pip install 'carillon-engine[{extra}]' ({error})"
            ) from None
        options = _OPTIONS.get(scheme, {})
        self._make = partial(
            kind, asynchronous=False, skip_instance_cache=True, use_listings_cache=False, **options
        )
        self._made: Any = None
        self._making = Lock()

    def facts(self, url: str) -> Facts:
        found = self._call(url, 0, "_info")
        if found.get("type") == "directory":
            raise StoreError("it is a folder", missing=True)
        return _facts(found)

    def read(self, url: str, start: int, stop: int) -> bytes:
        data: bytes = self._call(url, stop - start, "_cat_file", start=start, end=stop)
        if len(data) != stop - start:
            raise StoreError(f"{len(data):,} bytes came where {stop - start:,} were asked for")
        return data

    def list(self, url: str) -> dict[str, Facts | None]:
        found = self._call(url.rstrip("/"), 0, "_ls", detail=True)
        names = {entry["name"].rstrip("/").rpartition("/")[2]: entry for entry in found}
        return {
            name: None if entry["type"] == "directory" else _facts(entry)
            for name, entry in names.items()
            if name and entry["name"].rstrip("/") != url.partition("://")[2].rstrip("/")
        }

    def _call(self, url: str, num_bytes: int, method: str, **arguments: Any) -> Any:
        from fsspec.asyn import sync

        def attempt(left_s: float) -> Any:
            files = self._files()
            path = files._strip_protocol(url)
            limit_s = try_limit_s(num_bytes, left_s)
            return sync(files.loop, getattr(files, method), path, timeout=limit_s, **arguments)

        try:
            return with_retries(attempt, _passing, store.POLICY)
        except Exception as error:
            raise _explained(error) from None

    def _files(self) -> Any:
        with self._making:
            if self._made is None:
                self._made = self._make()
                self._made.retries = 1  # s3fs tries as often by itself
        return self._made


def _facts(entry: Mapping[str, Any]) -> Facts:
    tag = next((entry[name] for name in _TAGS if entry.get(name)), "")
    return Facts(int(entry["size"] or 0), str(tag))


def _passing(error: Exception) -> bool:
    """Whether trying again may help; what is no error of a store is not hidden."""
    if isinstance(error, (FileNotFoundError, PermissionError, IsADirectoryError)):
        return False
    if _is_unset(error):
        return False
    if isinstance(error, OSError):
        return error.errno != errno.EINVAL  # the request as such
    return isinstance(error, asyncio.TimeoutError) or _of_library(error)


def _explained(error: Exception) -> Exception:
    silent = "no answer in time" if isinstance(error, TimeoutError) else type(error).__name__
    said = f"{str(error) or silent:.300}"
    if isinstance(error, FileNotFoundError):
        return StoreError("no such object, folder or bucket; check the name", missing=True)
    if isinstance(error, PermissionError) or _is_unset(error):
        return StoreError(
            f"the store refuses: {said}; check the credentials and their rights",
            is_down=_is_unset(error),
        )
    if _passing(error):
        tries = f"{store.POLICY.max_tries} tries within {store.POLICY.deadline_s:g} s"
        return StoreError(
            f"the store does not answer as it should, after up to {tries}: {said}", is_down=True
        )
    if isinstance(error, OSError):
        return StoreError(f"the store refuses: {said}")
    return error


def _is_unset(error: Exception) -> bool:
    name = type(error).__name__
    return _of_library(error) and any(word in name for word in _UNSET)


def _of_library(error: Exception) -> bool:
    return type(error).__module__.partition(".")[0] in _LIBRARIES
