"""A small data set and an open registry."""

from pathlib import Path

import pytest

from carillon.engine.data.shard_writer import ShardWriter
from carillon.engine.data.shards import Dataset, open_dataset
from carillon.engine.registry.store import Registry


@pytest.fixture
def dataset(tmp_path: Path) -> Dataset:
    with ShardWriter(tmp_path / "set", name="tiny", source={"from": "a test"}) as writer:
        for i in range(5):
            captions = {"en": [f"text {i}"], "fr": [f"texte {i}"]}
            writer.write(f"key{i}", {"jpg": b"x" * (i + 1)}, {"captions": captions})
        writer.write("key5", {"jpg": b"six"}, {"captions": {"de": ["sechs"]}}, split="held_out")
    return open_dataset(tmp_path / "set")


@pytest.fixture
def location(tmp_path: Path) -> Path:
    return tmp_path / "registry.sqlite"


@pytest.fixture
def registry(location: Path) -> Registry:
    return Registry.open(location)
