"""Files by name and byte range from a local folder, a web server and S3; stores that fail."""

import json
import multiprocessing
import runpy
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from carillon.engine.cli import main as carillon
from carillon.engine.config import UserError
from carillon.engine.data import block_cache, object_store, store
from carillon.engine.data.retry import RetryPolicy
from carillon.engine.data.shards import Dataset, ShardWriter, open_dataset
from carillon.engine.data.store import BLOCK_BYTES, StoreError, open_blob, read_whole, store_of
from carillon.engine.train.run_config import load_config

BYTES = bytes(range(256)) * 12_000  # three blocks, the last one short
QUICK = RetryPolicy(max_tries=3, first_pause_s=0.01, longest_pause_s=0.02, deadline_s=5)


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store, "POLICY", QUICK)


@pytest.fixture(params=["local", "web", "s3"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """Where BYTES lie."""
    if request.param == "local":
        (tmp_path / "x.bin").write_bytes(BYTES)
        return str(tmp_path / "x.bin")
    if request.param == "web":
        web = request.getfixturevalue("web")
        web.routes["/set/x.bin"] = BYTES
        return str(web.url("/set/x.bin"))
    s3 = request.getfixturevalue("s3")
    s3.put_object(Bucket="bucket", Key="set/x.bin", Body=BYTES)
    return "s3://bucket/set/x.bin"


RANGES = [(0, 10), (5, 0), (BLOCK_BYTES - 3, 7), (BLOCK_BYTES, BLOCK_BYTES), (100, 2_500_000)]
RANGES += [(len(BYTES) - 4, 4), (len(BYTES) - 4, 100), (len(BYTES), 5), (0, 10**9)]


def test_ranges_are_those_of_the_file(place: str) -> None:
    for _ in range(2):  # from the store, and from the cache
        blob = open_blob(place)
        assert blob.size_bytes == len(BYTES)
        for offset, size in RANGES:
            assert blob.read(offset, size) == BYTES[offset : offset + size], (offset, size)
    assert read_whole(place, max_bytes=len(BYTES)) == BYTES


def test_blocks_are_fetched_once(web: Any) -> None:
    web.routes["/x.bin"] = BYTES
    blob = open_blob(web.url("/x.bin"))
    for _ in range(3):
        for offset in range(0, len(BYTES), 100_000):
            assert blob.read(offset, 1000) == BYTES[offset : offset + 1000]
    assert len(web.seen) == 1 + 3, "the facts and each block"
    open_blob(web.url("/x.bin")).read(0, len(BYTES))
    assert len(web.seen) == 4 + 1, "the facts again"


@pytest.mark.parametrize("new", [BYTES[::-1], BYTES + b"more"])
def test_an_object_that_changed_is_another_one(s3: Any, new: bytes) -> None:
    s3.put_object(Bucket="bucket", Key="x", Body=BYTES)
    assert open_blob("s3://bucket/x").read(0, 100) == BYTES[:100]
    s3.put_object(Bucket="bucket", Key="x", Body=new)
    assert open_blob("s3://bucket/x").read(0, 100) == new[:100]


def test_a_changed_object_is_noticed_by_its_etag(web: Any) -> None:
    def version(data: bytes) -> Any:
        def route(request: Any) -> None:
            first, last = map(int, request.headers["Range"][6:].split("-"))
            headers = {"Content-Range": f"bytes {first}-{last}/4", "ETag": f'"{data!r}"'}
            request.answer(data[first : last + 1], status=206, headers=headers)

        return route

    for data in (b"aaaa", b"bbbb"):
        web.routes["/x"] = version(data)
        assert open_blob(web.url("/x")).read(0, 4) == data


def test_a_damaged_block_is_read_again(web: Any, caplog: pytest.LogCaptureFixture) -> None:
    web.routes["/x"] = BYTES
    assert open_blob(web.url("/x")).read(0, 3) == BYTES[:3]
    (file,) = (block_cache.cache_root() / "blocks").glob("*/*")
    content = bytearray(file.read_bytes())
    content[1] ^= 1
    file.write_bytes(content)
    store._block_cache.cache_clear()  # as another process, which has not seen the block
    assert open_blob(web.url("/x")).read(0, 3) == BYTES[:3]
    assert "is damaged; it is read again" in caplog.text
    store._block_cache.cache_clear()
    assert open_blob(web.url("/x")).read(0, 3) == BYTES[:3]


def child_reads(url: str, queue: Any) -> None:
    queue.put([open_blob(url).read(offset, 50) for offset in range(0, 200, 50)])


def test_a_forked_child_reads_by_connections_of_its_own(
    s3: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CARILLON_BLOCK_CACHE_GB", "0")
    s3.put_object(Bucket="bucket", Key="x", Body=BYTES)
    blob = open_blob("s3://bucket/x")
    assert blob.read(0, 10) == BYTES[:10]
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    child = context.Process(target=child_reads, args=("s3://bucket/x", queue))
    child.start()
    assert queue.get(timeout=60) == [BYTES[at : at + 50] for at in range(0, 200, 50)]
    child.join()
    assert blob.read(10, 10) == BYTES[10:20]


def small_set(folder: Path) -> Dataset:
    picture = folder / "p.png"
    with ShardWriter(folder / "set", name="small", source={}, max_shard_bytes=20_000) as writer:
        for number in range(40):
            Image.new("RGB", (8, 8), (number, 0, 0)).save(picture)
            meta = {"captions": {"en": [f"number {number}"]}}
            writer.write(f"k{number}", {"png": picture.read_bytes()}, meta)
    return open_dataset(folder / "set")


def upload(s3: Any, folder: Path) -> None:
    for path in folder.iterdir():
        s3.put_object(Bucket="bucket", Key=f"set/{path.name}", Body=path.read_bytes())


def test_a_data_set_is_read_from_s3_as_from_a_folder(s3: Any, tmp_path: Path) -> None:
    local = small_set(tmp_path)
    upload(s3, local.path)
    for url in ("s3://bucket/set", "s3://bucket/set/"):
        remote = open_dataset(url)
        assert (remote.place, remote.fingerprint) == ("s3://bucket/set", local.fingerprint)
        here, there = local.splits["train"], remote.splits["train"]
        assert len(local.manifest.splits["train"].shards) > 2
        assert [there.read(row) for row in range(40)] == [here.read(row) for row in range(40)]
    with pytest.raises(UserError, match="is remote, and a local data set is needed"):
        _ = remote.path


def test_training_from_s3_has_the_losses_of_training_from_a_folder(s3: Any, tmp_path: Path) -> None:
    root = Path(__file__).resolve().parents[3]
    tiny = runpy.run_path(str(root / "tests" / "recipes" / "tiny_set.py"))
    recipe = str(root / "recipes" / "emoji_quickstart.yaml")
    upload(s3, tiny["write_set"](tmp_path / "set", load_config(recipe, [])))
    losses = []
    for name, place in (("far", "s3://bucket/set"), ("near", str(tmp_path / "set"))):
        given = [f"data.path={place}", f"logging.output={tmp_path / name}", *tiny["SMALL"]]
        assert carillon(["train", recipe, *given, "evaluation.bootstrap_samples=10"]) == 0
        (metrics,) = (tmp_path / name).glob("*/metrics.jsonl")
        lines = map(json.loads, metrics.read_text().splitlines())
        losses.append([line["loss"] for line in lines if "loss" in line])
    assert losses[0] == losses[1]
    assert len(losses[0]) == 2


def test_a_data_set_is_read_from_a_web_server(web: Any, tmp_path: Path) -> None:
    local = small_set(tmp_path)
    for path in local.path.iterdir():
        web.routes[f"/set/{path.name}"] = path.read_bytes()
    remote = open_dataset(web.url("/set"))
    here, there = local.splits["train"], remote.splits["train"]
    assert [there.read(row) for row in range(40)] == [here.read(row) for row in range(40)]


def test_plain_tars_behind_urls_are_indexed_once(s3: Any, web: Any, tmp_path: Path) -> None:
    local = small_set(tmp_path)
    (local.path / "dataset.json").unlink()
    here = open_dataset(local.path).splits["all"]
    upload(s3, local.path)
    num_tars = len(list(local.path.glob("*.tar")))
    for path in local.path.glob("*.tar"):
        web.routes[f"/set/{path.name}"] = path.read_bytes()
    pattern = f"train-{{000000..{num_tars - 1:06d}}}.tar"
    for given in ("s3://bucket/set", f"s3://bucket/set/{pattern}", web.url(f"/set/{pattern}")):
        there = open_dataset(given).splits["all"]
        assert [there.read(row) for row in range(40)] == [here.read(row) for row in range(40)]
    num_requests = len(web.seen)
    open_dataset(web.url(f"/set/{pattern}"))
    assert len(web.seen) == num_requests + num_tars, "each tar's facts"


def test_what_is_missing_or_altered_in_a_store(s3: Any, tmp_path: Path) -> None:
    local = small_set(tmp_path)
    upload(s3, local.path)
    for url, message in {
        "s3://bucket/nothing": r"s3://bucket/nothing cannot be read: no such object",
        "s3://bucket/x.tar": r"x\.tar cannot be read: no such object.* check the name",
        "s3://no-bucket/set": r"no-bucket/set cannot be read: no such object, folder or bucket",
        "ftp://host/set": r"ftp:// cannot be read; s3://, gs://,.* and local paths",
    }.items():
        with pytest.raises(UserError, match=message):
            open_dataset(url)
    s3.put_object(Bucket="bucket", Key="set/train-000001.tar", Body=b"cut")
    with pytest.raises(UserError, match=r"train-000001\.tar is truncated or altered: 3 bytes"):
        open_dataset("s3://bucket/set")
    s3.delete_object(Bucket="bucket", Key="set/train-000001.tar")
    with pytest.raises(UserError, match=r"set/train-000001\.tar is missing"):
        open_dataset("s3://bucket/set")


def test_an_altered_shard_on_a_web_server_is_found_when_it_is_opened(
    web: Any, tmp_path: Path
) -> None:
    local = small_set(tmp_path)
    for path in local.path.iterdir():
        web.routes[f"/set/{path.name}"] = path.read_bytes()
    web.routes["/set/train-000001.tar"] = b"cut"
    remote = open_dataset(web.url("/set"))
    split = remote.splits["train"]
    assert split.read(0).key == "k0"
    with pytest.raises(UserError, match="truncated or altered"):
        split.read(remote.manifest.splits["train"].shards[0].num_samples)
    last = remote.manifest.splits["train"].shards[-1].file
    del web.routes[f"/set/{last}"]
    with pytest.raises(UserError, match=rf"{last} cannot be read: HTTP status 404"):
        split.read(39)


@pytest.fixture
def silent() -> Iterator[int]:
    """The port of a server that takes connections and says nothing."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen(64)
        yield server.getsockname()[1]


@pytest.fixture
def gone() -> Iterator[int]:
    """A port that nobody listens at."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        yield server.getsockname()[1]


@pytest.mark.parametrize("fault", ["silent", "gone"])
@pytest.mark.parametrize("kind", ["web", "s3"])
def test_a_store_that_vanished_or_stalls_is_told(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, kind: str, fault: str
) -> None:
    """Neither hangs, and the message says what was tried."""
    monkeypatch.setattr(store, "_TRY_S", 0.2)
    port = request.getfixturevalue(fault)
    url = f"http://127.0.0.1:{port}/set"
    if kind == "s3":
        request.getfixturevalue("s3")
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{port}")
        url = "s3://bucket/set"
    with pytest.raises(UserError, match=r"/set cannot be read: .* 3 tries"):
        open_dataset(url)


def test_a_store_that_vanishes_while_it_is_read(
    web: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CARILLON_BLOCK_CACHE_GB", "0")
    local = small_set(tmp_path)
    for path in local.path.iterdir():
        web.routes[f"/set/{path.name}"] = path.read_bytes()
    split = open_dataset(web.url("/set")).splits["train"]
    assert split.read(0).key == "k0"
    for path in web.routes:
        web.routes[path] = lambda request: request.answer(b"", status=503)
    with pytest.raises(UserError, match="cannot be read: HTTP status 503, after 3 tries"):
        split.read(1)


def test_a_failure_that_passes_costs_a_try(web: Any) -> None:
    left = [2]

    def route(request: Any) -> None:
        left[0] -= 1
        request.answer(b"", status=503) if left[0] >= 0 else request.give(BYTES)

    web.routes["/x"] = route
    assert open_blob(web.url("/x")).read(0, 5) == BYTES[:5]
    assert len(web.seen) == 4


def test_errors_of_the_program_are_not_taken_for_those_of_a_store(s3: Any) -> None:
    with pytest.raises(AttributeError):
        store_of("s3://bucket/x")._call("s3://bucket/x", 0, "_nothing")  # type: ignore[attr-defined]


def test_a_missing_library_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    import fsspec

    def lacking(scheme: str) -> None:
        raise ImportError("Please install gcsfs to access Google Storage")

    monkeypatch.setattr(fsspec, "get_filesystem_class", lacking)
    with pytest.raises(UserError, match=r"pip install 'carillon-engine\[gcs\]'"):
        object_store.ObjectStore("gs", "gcs")


def test_credentials_that_are_not_there(s3: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", "/nonexistent")
    monkeypatch.setenv("AWS_CONFIG_FILE", "/nonexistent")
    with pytest.raises(StoreError, match=r"refuses: .*credentials"):
        open_blob("s3://bucket/x")
