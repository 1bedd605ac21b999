"""Installed programs that build the sets: found, run under limits, or asked for by package name.

A program that is missing is one message that names the Debian package with it. What a program says
goes to memory or to a file, never more than allowed; one that takes too long is ended.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO

from carillon.engine.config import UserError

_CHUNK_BYTES = 1 << 20
_TAIL_CHARS = 500


def find_program(name: str, package: str) -> str:
    """The path of a program. Raises UserError that names the package to install."""
    found = shutil.which(name)
    if found is None:
        raise UserError(f"{name} was not found. Install it: `apt-get install {package}`")
    return found


def cache_folder(kind: str) -> Path:
    """Where what was fetched is kept between builds; not made yet."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "carillon" / kind


def run_program(
    command: Sequence[str | Path],
    *,
    stdin: bytes = b"",
    timeout_s: float,
    folder: Path | None = None,
) -> bytes:
    """Run to the end and return what it wrote.

    Raises UserError with its last words when it fails or takes longer.
    """
    name = Path(command[0]).name
    try:
        done = subprocess.run(
            command, input=stdin, capture_output=True, timeout=timeout_s, check=False, cwd=folder
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise UserError(f"{name} failed: {error}") from None
    if done.returncode != 0:
        raise UserError(f"{name} failed ({done.returncode}): {_tail(done.stderr or done.stdout)}")
    return done.stdout


def stream_program(
    command: Sequence[str | Path], out: BinaryIO, *, max_bytes: int, timeout_s: float
) -> None:
    """Run to the end with what it writes in `out`, a chunk at a time.

    Raises UserError when it fails, takes longer, or writes more than `max_bytes`.
    """
    name = Path(command[0]).name
    with tempfile.TemporaryFile() as said:
        try:
            process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=said
            )
        except OSError as error:
            raise UserError(f"{name} failed: {error}") from None
        limit = threading.Timer(timeout_s, process.kill)
        limit.start()
        try:
            size_bytes = _copy(process, out, max_bytes)
        finally:
            process.kill()  # does nothing to one that has ended
            code = process.wait()
            timed_out = not limit.is_alive()
            limit.cancel()
        if size_bytes > max_bytes:
            raise UserError(f"{name} wrote more than {max_bytes >> 20:,} MB: {command[-1]}")
        if timed_out:
            raise UserError(f"{name} took longer than {timeout_s:g} s: {command[-1]}")
        if code != 0:
            said.seek(0)
            raise UserError(f"{name} failed ({code}): {_tail(said.read())}")


def _copy(process: subprocess.Popen[bytes], out: BinaryIO, max_bytes: int) -> int:
    assert process.stdout is not None
    size_bytes = 0
    with process.stdout:
        while chunk := process.stdout.read(_CHUNK_BYTES):
            size_bytes += len(chunk)
            if size_bytes > max_bytes:
                return size_bytes
            out.write(chunk)
        process.wait()
    return size_bytes


def _tail(said: bytes) -> str:
    return said.decode("utf-8", "replace").strip()[-_TAIL_CHARS:] or "no message"
