"""Looks into media in processes of their own, which hostile bytes may crash, stall or fill.

A process gets bytes and answers with a line of JSON, and with new bytes where a picture was made
smaller. It has limits of memory and of time. One that dies or stalls is ended and its medium is
tried once more in a fresh one, since it may not have been the culprit; then it is refused.
With no process the work is done here, without those limits.
"""

from __future__ import annotations

import io
import json
import queue
import resource
from multiprocessing import get_context
from multiprocessing.connection import Connection
from typing import Any, NamedTuple

from carillon.engine.data.decode.header import read_header

MEMORY_BYTES = 6 << 30
TIMEOUT_S = 60.0


class Inspected(NamedTuple):
    """A medium that can be used: its suffix by content, what it says of itself, its bytes."""

    suffix: str
    facts: dict[str, Any]
    data: bytes


class Inspectors:
    """A number of processes, each for one caller at a time; to be closed."""

    def __init__(self, num_processes: int, *, timeout_s: float = TIMEOUT_S) -> None:
        self._timeout_s = timeout_s
        self._in_process = num_processes == 0
        self._idle: queue.LifoQueue[_Process | None] = queue.LifoQueue()
        for _ in range(num_processes):
            self._idle.put(None)

    def inspect(self, data: bytes, max_size: int | None) -> Inspected:
        """Raises ValueError when the medium cannot be used."""
        if self._in_process:
            return inspect(data, max_size)
        failure = ""
        for _ in range(2):
            process = self._idle.get() or _Process()
            kept: _Process | None = None
            try:
                answer = process.ask(data, max_size, self._timeout_s)
                kept = process
            except _Died as error:
                failure = str(error)
                continue
            finally:
                if kept is None:
                    process.end()
                self._idle.put(kept)
            if isinstance(answer, str):
                raise ValueError(answer)
            return answer
        raise ValueError(failure)

    def close(self) -> None:
        """End the processes that are idle; none may be in use."""
        while not self._idle.empty():
            process = self._idle.get()
            if process is not None:
                process.end()


def inspect(data: bytes, max_size: int | None) -> Inspected:
    """What a process does. Raises ValueError."""
    suffix, facts = read_header(data)
    sides = (facts.get("width", 0), facts.get("height", 0))
    if max_size is not None and suffix not in ("mp4", "webm") and max(sides) > max_size:
        return _shrunk(data, max_size)
    return Inspected(suffix, facts, data)


def _shrunk(data: bytes, max_size: int) -> Inspected:
    from PIL import Image

    from carillon.engine.data.decode.image import decode_rgb

    image = decode_rgb(data)
    image.thumbnail((max_size, max_size), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=92, subsampling=0)
    return Inspected("jpg", {"width": image.width, "height": image.height}, buffer.getvalue())


class _Died(Exception):
    pass


class _Process:
    def __init__(self) -> None:
        context = get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs,), daemon=True)
        self._process.start()
        theirs.close()

    def ask(self, data: bytes, max_size: int | None, timeout_s: float) -> Inspected | str:
        """The answer, or why the medium cannot be used. Raises _Died."""
        try:
            self._pipe.send_bytes(json.dumps({"max_size": max_size}).encode())
            self._pipe.send_bytes(data)
            if not self._pipe.poll(timeout_s):
                raise _Died(f"its decoder took more than {timeout_s:g} s and was stopped")
            answer = json.loads(self._pipe.recv_bytes())
            if "error" in answer:
                return str(answer["error"])
            made = self._pipe.recv_bytes() if answer["is_new"] else data
        except (OSError, EOFError):
            raise _Died("its decoder crashed, or needed too much memory") from None
        return Inspected(answer["suffix"], answer["facts"], made)

    def end(self) -> None:
        self._process.kill()
        self._process.join()
        self._pipe.close()


def _serve(pipe: Connection) -> None:
    """Answers until the other end is closed."""
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    try:
        while True:
            asked = json.loads(pipe.recv_bytes())
            data = pipe.recv_bytes()
            try:
                found = inspect(data, asked["max_size"])
            except (ValueError, MemoryError) as error:
                said = str(error) or "it needs too much memory"
                pipe.send_bytes(json.dumps({"error": said}).encode())
                continue
            answer = {
                "suffix": found.suffix,
                "facts": found.facts,
                "is_new": found.data is not data,
            }
            pipe.send_bytes(json.dumps(answer).encode())
            if answer["is_new"]:
                pipe.send_bytes(found.data)
    except (EOFError, OSError, KeyboardInterrupt):
        return
