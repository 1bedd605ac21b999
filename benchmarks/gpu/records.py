"""The records of a run: a file with one JSON object a line, which several processes append to."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

LOST_CONTEXT = 75  # exit code of a process whose GPU cannot be used further


def append(path: Path, event: str, /, **values: Any) -> None:
    """Adds a line by one write, so that lines of different processes stay whole."""
    line = json.dumps({"event": event} | values) + "\n"
    file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        os.write(file, line.encode())
    finally:
        os.close(file)


def read(path: Path, offset: int = 0) -> list[dict[str, Any]]:
    """The lines from `offset` on; one that is not whole, or damaged, is left out."""
    if not path.exists():
        return []
    with path.open("rb") as file:
        file.seek(offset)
        text = file.read()
    found = []
    for line in text[: text.rfind(b"\n") + 1].splitlines():
        try:
            found.append(json.loads(line))
        except ValueError:
            continue
    return found
