import os
from pathlib import Path

import pytest

from carillon.engine.data.block_cache import BlockCache

BLOCK = bytes(1000)


def held(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob("*/*"))


def test_parts_of_blocks(tmp_path: Path) -> None:
    cache = BlockCache(tmp_path, 10**6)
    assert cache.read("x", 0, 0, 5) is None
    cache.write("x", 0, b"0123456789")
    cache.write("x", 1, b"abc")
    for other in (cache, BlockCache(tmp_path, 10**6)):
        assert other.read("x", 0, 2, 3) == b"234"
        assert other.read("x", 0, 4, 3) == b"456"
        assert other.read("x", 1, 0, 3) == b"abc"
        assert other.read("x", 1, 0, 4) is None, "shorter than what is asked for"
        assert other.read("y", 0, 0, 1) is None


def test_the_oldest_go_and_those_in_use_stay(tmp_path: Path) -> None:
    cache = BlockCache(tmp_path, 50_000)
    for number in range(200):
        cache.write("x", number, BLOCK)
        for file in tmp_path.rglob("*"):  # time passes
            if file.is_file() and file.name != "lock":
                stat = file.stat()
                os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns - 10**9))
        assert cache.read("x", 0, 0, 1000) == BLOCK
        assert held(tmp_path) <= 50_000 + 50_000 // 32 + 1004
    present = [number for number in range(200) if cache.read("x", number, 0, 1) is not None]
    assert present[0] == 0
    assert present[1:] == list(range(201 - len(present), 200))
    assert len(present) > 40


def test_what_killed_writers_left_goes_too(tmp_path: Path) -> None:
    (tmp_path / "ab").mkdir()
    stale = tmp_path / "ab" / ".partial-1-x"
    stale.write_bytes(bytes(60_000))
    os.utime(stale, (0, 0))
    cache = BlockCache(tmp_path, 50_000)
    cache.write("x", 0, BLOCK)
    assert not stale.exists()
    assert cache.read("x", 0, 0, 5) == bytes(5)


def test_a_disk_that_cannot_be_written_costs_no_block(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("where the folder should be")
    cache = BlockCache(tmp_path / "file", 10**6)
    for number in range(3):
        cache.write("x", number, BLOCK)
        assert cache.read("x", number, 0, 5) is None
    assert caplog.text.count("reads go on without") == 1


def test_a_size_of_nothing_keeps_nothing(tmp_path: Path) -> None:
    cache = BlockCache(tmp_path / "none", 0)
    cache.write("x", 0, BLOCK)
    assert not (tmp_path / "none").exists()
