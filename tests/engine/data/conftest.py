"""Servers on this machine (benchmarks/local_servers.py), and a cache of each test's own."""

import runpy
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

SERVERS = runpy.run_path(str(Path(__file__).resolve().parents[3] / "benchmarks/local_servers.py"))


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Indexes and blocks go to a folder of the test."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture(scope="session")
def _s3_server() -> Iterator[str]:
    with SERVERS["s3_server"]() as address:
        yield address


@pytest.fixture
def s3(_s3_server: str, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A client of a store with the empty bucket `bucket`, which s3:// leads to."""
    import boto3

    for name, value in SERVERS["s3_environment"](_s3_server).items():
        monkeypatch.setenv(name, value)
    urllib.request.urlopen(f"{_s3_server}/moto-api/reset", data=b"").close()
    client = boto3.client("s3")
    client.create_bucket(Bucket="bucket")
    forget_stores()
    return client


def forget_stores() -> None:
    """A store keeps the settings that it was made with."""
    from carillon.engine.data import store

    store._object_store.cache_clear()


@pytest.fixture
def web() -> Iterator[Any]:
    with SERVERS["web_server"]() as server:
        yield server
