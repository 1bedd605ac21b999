"""Processes that look into media: one that dies or stalls costs its medium alone."""

import io
import os
import time
from typing import Any

import pytest
from PIL import Image

from carillon.engine.data import ingest_inspection
from carillon.engine.data.ingest_inspection import Inspected, Inspectors


def png(size: tuple[int, int] = (12, 8)) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", size, (10, 200, 30)).save(buffer, "PNG")
    return buffer.getvalue()


def fragile(data: bytes, max_size: int | None) -> Inspected:
    """Dies or stalls when it is asked to."""
    if data == b"die":
        os._exit(3)
    if data == b"stall":
        time.sleep(600)
    if data == b"fill":
        bytearray(ingest_inspection.MEMORY_BYTES)
    return Inspected("png", {"width": len(data)}, data)


SERVE = ingest_inspection._serve


def serve_fragile(pipe: Any) -> None:
    ingest_inspection.inspect = fragile
    SERVE(pipe)


@pytest.fixture
def inspectors(monkeypatch: pytest.MonkeyPatch) -> Any:
    from multiprocessing import get_context

    monkeypatch.setattr(ingest_inspection, "get_context", lambda _: get_context("fork"))
    monkeypatch.setattr(ingest_inspection, "_serve", serve_fragile)
    made = Inspectors(2, timeout_s=1.0)
    yield made
    made.close()


@pytest.mark.parametrize(
    ("data", "reason"),
    [(b"die", "crashed"), (b"stall", "took more than 1 s"), (b"fill", "needs too much memory")],
)
def test_hostile_bytes_cost_themselves_alone(inspectors: Any, data: bytes, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        inspectors.inspect(data, None)
    for size in range(3):
        assert inspectors.inspect(bytes(size), None).facts == {"width": size}


def test_real_processes_decode_and_shrink() -> None:
    inspectors = Inspectors(1)
    data = png((40, 10))
    assert inspectors.inspect(data, None) == Inspected("png", {"width": 40, "height": 10}, data)
    small = inspectors.inspect(data, 20)
    assert (small.suffix, small.facts) == ("jpg", {"width": 20, "height": 5})
    assert Image.open(io.BytesIO(small.data)).size == (20, 5)
    with pytest.raises(ValueError, match="it starts with b'%PDF"):
        inspectors.inspect(b"%PDF-1.7", None)
    inspectors.close()
