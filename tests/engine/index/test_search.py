"""`carillon search`: the right pictures, the cache, and every query that cannot be served."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from carillon.engine.cli import main
from carillon.engine.config import UserError
from carillon.engine.data.shards import open_dataset
from carillon.engine.index.search import check_query, picture_store, search_run, top_k
from carillon.engine.index.store import StoreBatch, open_store, write_store
from carillon.engine.train.run import LoadedRun

# Opening a checkpoint without process groups is what these commands do; torch warns of it.
pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


@pytest.mark.parametrize(
    ("query", "name"), [("rouge", "red"), ("أزرق", "blue"), ("green", "green")]
)
def test_the_named_colour_is_found_in_any_language(run: LoadedRun, query: str, name: str) -> None:
    dataset = open_dataset(run.config.data.path or "")
    hits = search_run(run, query, 5, dataset, dataset.splits["train"])
    assert {hit.key for hit in hits[:2]} == {f"{name}0", f"{name}1"}
    assert [hit.rank for hit in hits] == [1, 2, 3, 4, 5]
    assert [hit.score for hit in hits] == sorted((hit.score for hit in hits), reverse=True)
    assert hits[0].caption == name


def test_a_picture_finds_its_like(run: LoadedRun) -> None:
    dataset = open_dataset(run.config.data.path or "")
    pink = np.full((40, 30, 3), (255, 128, 192), np.uint8)
    hits = search_run(run, pink, 2, dataset, dataset.splits["train"])
    assert {hit.key for hit in hits} == {"pink0", "pink1"}


def test_the_store_is_made_once_and_made_again_for_another_checkpoint(run: LoadedRun) -> None:
    dataset = open_dataset(run.config.data.path or "")
    split = dataset.splits["shades"]
    first = picture_store(run, dataset, split)
    made = (first.path / "zarr.json").stat().st_mtime_ns
    assert (picture_store(run, dataset, split).path / "zarr.json").stat().st_mtime_ns == made
    group = zarr.open_group(first.path, mode="r+", zarr_format=3)
    group.attrs["checkpoint_hash"] = "of another checkpoint"
    again = picture_store(run, dataset, split)
    assert open_store(again.path).attributes["checkpoint_hash"] == run.checkpoint_hash
    (again.path / "zarr.json").write_text("{")  # no longer to be known as a store
    assert len(picture_store(run, dataset, split)) == len(again)


@given(seed=st.integers(0, 1000), k=st.integers(1, 30), block=st.integers(1, 40))
@settings(max_examples=20, deadline=None)
def test_top_k_is_the_sorted_list(
    tmp_path_factory: pytest.TempPathFactory, seed: int, k: int, block: int
) -> None:
    generator = np.random.default_rng(seed)
    vectors = generator.integers(-2, 3, size=(30, 3)).astype(np.float32)  # ties on purpose
    out = tmp_path_factory.mktemp("s") / "s.zarr"
    batch = StoreBatch(vectors, list(range(30)), {"ids": [str(i) for i in range(30)]})
    store = write_store(out, [batch], {"modality": "image"}, dims=3)
    query = torch.from_numpy(generator.integers(-2, 3, size=3).astype(np.float32))
    scores, places = top_k(store, query, k)
    everything = (vectors @ query.numpy()).tolist()
    expected = sorted(range(30), key=lambda i: (-everything[i], i))[:k]
    assert places == expected
    assert scores == [everything[i] for i in expected]
    joined = np.concatenate(list(store.blocks(block)))
    np.testing.assert_array_equal(joined, vectors)


@pytest.mark.parametrize(
    ("query", "message"),
    [
        ("", "the query is empty"),
        (" \t\n", "the query is empty"),
        ("x" * 1_000_000, "1,000,000 characters; at most 8,192"),
        ("a\x00b", "U\\+0000"),
        ("a\x1b[31mb", "U\\+001B"),
        ("\ud800", "U\\+D800"),
    ],
)
def test_queries_that_cannot_be_served(query: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        check_query(query)


def test_a_query_keeps_its_script() -> None:
    for query in ("un chien qui court", "كلب يجري", "दौड़ता कुत्ता", "👩\u200d🚀", "奔跑的狗"):
        assert check_query(f" {query} ") == query


def test_search_prints_a_list_and_writes_a_grid(
    run: LoadedRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    grid = tmp_path / "grid.png"
    assert main(["search", str(run.path), "rose", "--k", "3", "--out", str(grid)]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) == 4
    assert "pink" in printed[0]
    assert printed[-1] == f"pictures: {grid}"
    with Image.open(grid) as picture:
        assert picture.format == "PNG"
    assert main(["search", str(run.path), "rose", "--k", "3", "--json", "--out", str(grid)]) == 0
    result = json.loads(capsys.readouterr().out)
    assert [hit["rank"] for hit in result["hits"]] == [1, 2, 3]
    assert result["grid"] == str(grid)


def test_a_damaged_cache_is_made_again(run: LoadedRun, capsys: pytest.CaptureFixture[str]) -> None:
    dataset = open_dataset(run.config.data.path or "")
    split = dataset.splits["train"]
    before = search_run(run, "rouge", 3, dataset, split)
    chunk = picture_store(run, dataset, split).path / "vectors/c/0/0"
    chunk.write_bytes(chunk.read_bytes()[:100])
    assert search_run(run, "rouge", 3, dataset, split) == before
    assert "is damaged: vectors cannot be read" in (said := capsys.readouterr().err)
    assert said.endswith("; it is made again\n")


@pytest.mark.parametrize(
    ("file", "old", "new"),
    [
        ("zarr.json", '"ids_offsets"', '"idr_offsets"'),
        ("zarr.json", '"carillon-embeddings"', '"carillon-embeddingr"'),
        ("zarr.json", '"num_rows"', '"num_rovs"'),
        ("vectors/zarr.json", "    16\n  ],", "    17\n  ],"),
        ("ids_offsets/zarr.json", '"shape"', '"shapf"'),
    ],
)
def test_a_cache_with_changed_metadata_is_made_again(
    run: LoadedRun, capsys: pytest.CaptureFixture[str], file: str, old: str, new: str
) -> None:
    dataset = open_dataset(run.config.data.path or "")
    split = dataset.splits["train"]
    before = search_run(run, "rouge", 3, dataset, split)
    changed = picture_store(run, dataset, split).path / file
    text = changed.read_text()
    assert old in text
    changed.write_text(text.replace(old, new, 1))
    capsys.readouterr()
    assert search_run(run, "rouge", 3, dataset, split) == before
    (said,) = capsys.readouterr().err.splitlines()
    assert said.endswith("; it is made again")
    assert search_run(run, "rouge", 3, dataset, split) == before
    assert not capsys.readouterr().err


def test_a_picture_damaged_since_it_was_embedded_is_listed_as_such(
    run: LoadedRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = tmp_path / "colours"
    shutil.copytree(run.config.data.path or "", copy)
    search = ["search", str(run.path), "rouge", "--data", str(copy), "--split", "train"]
    search += ["--k", "3", "--out", str(tmp_path / "grid.png")]
    assert main(search) == 0
    assert "unreadable" not in capsys.readouterr().out
    for shard in copy.glob("train-*.tar"):
        content = bytearray(shard.read_bytes())
        at = content.index(b"\x89PNG")
        while at >= 0:
            content[at + 30] ^= 1
            at = content.find(b"\x89PNG", at + 1)
        shard.write_bytes(content)
    assert main(search) == 0
    assert capsys.readouterr().out.count("(unreadable: its bytes in train-") == 3


def test_what_cannot_be_searched_is_one_message(
    run: LoadedRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "no.jpg").write_bytes(b"not a picture")
    for arguments, message in (
        (["x", "--k", "0"], "at least 1"),
        (["x", "--k", "-3"], "at least 1"),
        (["x", "--k", "17"], "the set has only 16 pictures"),
        ([], "give either a query or --image"),
        (["x", "--image", "y"], "give either a query or --image"),
        (["--image", str(tmp_path / "missing.jpg")], "cannot be read"),
        (["--image", str(tmp_path / "no.jpg")], "no.jpg"),
        (["x", "--out", "/proc/grid.png"], "cannot be written"),
    ):
        assert main(["search", str(run.path), *arguments]) == 2, arguments
        captured = capsys.readouterr()
        assert message in captured.err
        assert "Traceback" not in captured.err
    assert main(["search", str(tmp_path / "no-run"), "x"]) == 2
