"""A whole run: what is kept, what is said of the rest, and that nothing else can change it."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow.parquet as pq
import pytest

from carillon.engine.config import UserError
from carillon.engine.data.curate.run import CurateOptions, curate
from carillon.engine.data.shards import Dataset, open_dataset
from carillon.engine.data.tombstones import TOMBSTONES_NAME, Tombstones, tombstones_of

STAGES = (
    {"type": "picture_size", "min_side": 100},
    {"type": "exact_duplicates"},
    {"type": "near_pictures"},
)


@pytest.fixture(scope="module")
def noisy(tools: SimpleNamespace, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve scenes, one of them again byte for byte, one cropped, one too small, in few shards."""
    samples = [tools.sample(f"scene{i:02}", i, licence="CC0-1.0") for i in range(12)]
    samples.append(tools.sample("again", 3))
    picture = tools.scene(5)
    w, h = picture.size
    cropped = (
        picture.crop((w // 20, h // 10, w * 19 // 20, h)).resize((w // 2, h // 2)).resize((w, h))
    )
    samples.append(
        ("cropped", {"jpg": tools.jpeg(cropped, 60)}, {"captions": {"de": ["ein Bild"]}})
    )
    small = tools.scene(40).resize((48, 48))
    samples.append(("small", {"jpg": tools.jpeg(small)}, {"captions": {"en": ["too small"]}}))
    out = tmp_path_factory.mktemp("sets") / "noisy"
    return tools.write_set(out, samples, shard_bytes=20_000)


def keys(dataset: Dataset) -> set[str]:
    return {split.key(row) for split in dataset.splits.values() for row in range(len(split))}


def removed(out: Path) -> dict[str, dict[str, Any]]:
    table = pq.read_table(out / "removed-000.parquet")
    return {row["key"]: row for row in table.to_pylist()}


def content(out: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in out.iterdir()}


def test_a_run_keeps_one_of_each_and_says_why(
    noisy: Path, tools: SimpleNamespace, tmp_path: Path
) -> None:
    out = tmp_path / "clean"
    dataset, _ = curate(tools.pipeline(*STAGES), [str(noisy)], out)
    assert keys(dataset) == {f"scene{i:02}" for i in range(12)}
    gone = removed(out)
    assert {key: row["stage"] for key, row in gone.items()} == {
        "again": "exact_duplicates",
        "cropped": "near_pictures",
        "small": "picture_size",
    }
    assert gone["small"]["reason"] == "shorter side 48 is below 100"
    assert gone["again"]["match"] == "scene03"
    assert gone["cropped"]["match"] == "scene05"
    assert json.loads(gone["cropped"]["scores"])["near_pictures"]["correlation"] > 0.93
    assert json.loads(gone["small"]["scores"])["picture_size"]["shorter_side"] == 48
    assert [path.name for path in tmp_path.iterdir()] == ["clean"], "a state was left behind"


def test_the_manifest_names_parents_pipeline_and_counts(
    noisy: Path, tools: SimpleNamespace, tmp_path: Path
) -> None:
    dataset, _ = curate(tools.pipeline(*STAGES, name="mine"), [str(noisy)], tmp_path / "clean")
    source = dataset.manifest.source
    assert source["kind"] == "curate"
    assert source["parents"] == [{"name": "noisy", "fingerprint": open_dataset(noisy).fingerprint}]
    assert len(source["pipeline_hash"]) == 64
    assert source["pipeline"]["stages"][0]["min_side"] == 100
    assert (source["items"], source["kept"], source["quarantined"]) == (15, 12, 0)
    assert source["dropped"] == {"picture_size": 1, "exact_duplicates": 1, "near_pictures": 1}


def test_the_number_of_workers_changes_no_byte(
    noisy: Path, tools: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("carillon.engine.data.curate.state.PART_ROWS", 2)
    for workers in (1, 2):
        (tmp_path / str(workers)).mkdir()
        curate(
            tools.pipeline(*STAGES),
            [str(noisy)],
            tmp_path / str(workers) / "clean",
            options=CurateOptions(workers=workers),
        )
    one, two = (content(tmp_path / str(n) / "clean") for n in (1, 2))
    assert one == two


def test_a_threshold_decides(noisy: Path, tools: SimpleNamespace, tmp_path: Path) -> None:
    loose = tools.pipeline({"type": "picture_size", "min_side": 40})
    dataset, _ = curate(loose, [str(noisy)], tmp_path / "clean")
    assert keys(dataset) == keys(open_dataset(noisy))


def test_flags_and_scores_stand_in_the_items(
    noisy: Path, tools: SimpleNamespace, tmp_path: Path
) -> None:
    stages = (
        {"type": "picture_size", "min_side": 100, "action": "flag"},
        {"type": "blur", "action": "annotate", "name": "focus"},
        {"type": "near_pictures", "action": "flag"},
    )
    dataset, _ = curate(tools.pipeline(*stages), [str(noisy)], tmp_path / "clean")
    split = dataset.splits["train"]
    metas = {sample.key: sample.meta["curation"] for sample in map(split.read, range(len(split)))}
    assert len(metas) == 15
    assert metas["small"]["flags"] == {"picture_size": "shorter side 48 is below 100"}
    assert metas["scene00"]["scores"]["focus"]["sharpness"] > 0
    assert "flags" not in metas["scene00"]
    assert metas["cropped"]["flags"]["near_pictures"].endswith("with scene05")
    told = removed(tmp_path / "clean")
    assert {key: row["outcome"] for key, row in told.items()} == dict.fromkeys(
        ("small", "again", "cropped"), "flagged"
    )


def test_two_sets_become_one_and_the_first_has_precedence(
    tools: SimpleNamespace, tmp_path: Path
) -> None:
    one = tools.write_set(tmp_path / "one", [tools.sample("a", 1), tools.sample("b", 2)])
    two = tools.write_set(tmp_path / "two", [tools.sample("a", 3), tools.sample("c", 2)])
    dataset, _ = curate(
        tools.pipeline({"type": "exact_duplicates"}), [str(one), str(two)], tmp_path / "both"
    )
    assert keys(dataset) == {"a", "b", f"a-{open_dataset(two).fingerprint[:8]}"}
    assert removed(tmp_path / "both")["c"]["match"] == "b"
    assert [parent["name"] for parent in dataset.manifest.source["parents"]] == ["one", "two"]


def test_what_stands_in_an_evaluation_set_leaves(tools: SimpleNamespace, tmp_path: Path) -> None:
    train = tools.write_set(tmp_path / "train", [tools.sample(f"t{i}", i) for i in range(6)])
    smaller = tools.scene(4).resize((120, 120))  # kept, were it not of an evaluation set
    exam = [("exam", {"jpg": tools.jpeg(smaller, 70)}, {"captions": {"en": ["other words"]}})]
    held_out = tools.write_set(tmp_path / "exams", exam)
    dataset, curated = curate(
        tools.pipeline({"type": "near_pictures", "action": "flag"}),
        [str(train)],
        tmp_path / "clean",
        against=[str(held_out)],
    )
    assert keys(dataset) == {"t0", "t1", "t2", "t3", "t5"}
    assert "with the evaluation item exam" in removed(tmp_path / "clean")["t4"]["reason"]
    assert curated.num_rows == 6
    assert dataset.manifest.source["against"][0]["name"] == "exams"


def test_a_damaged_shard_is_told_before_anything_is_written(
    noisy: Path, tools: SimpleNamespace, tmp_path: Path
) -> None:
    copy = tmp_path / "copy"
    copy.mkdir()
    for path in noisy.iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    tar = sorted(copy.glob("*.tar"))[0]
    data = bytearray(tar.read_bytes())
    data[3000] ^= 1
    tar.write_bytes(bytes(data))
    with pytest.raises(UserError, match=r"1 samples do not match their checksums.*Nothing was"):
        curate(tools.pipeline(*STAGES), [str(copy)], tmp_path / "clean")
    assert not (tmp_path / "clean").exists()
    going_on = tools.pipeline(*STAGES, damaged="quarantine")
    dataset, curated = curate(going_on, [str(copy)], tmp_path / "clean")
    assert dataset.manifest.source["quarantined"] == 1
    assert [r["outcome"] for r in removed(tmp_path / "clean").values()].count("quarantined") == 1
    assert curated.num_rows == 15


def test_too_many_bad_items_end_the_run(tools: SimpleNamespace, tmp_path: Path) -> None:
    good = [tools.sample(f"good{i}", i) for i in range(3)]
    bad = [("bad", {"jpg": b"\xff\xd8\xff not a picture"}, {"captions": {"en": ["x"]}})]
    mixed = tools.write_set(tmp_path / "mixed", [*good, *bad])
    stages = ({"type": "blur"},)
    with pytest.raises(UserError, match=r"1 of 4 items cannot be used, above max_bad_share 0\.1"):
        curate(tools.pipeline(*stages), [str(mixed)], tmp_path / "clean")
    dataset, _ = curate(
        tools.pipeline(*stages, max_bad_share=0.5), [str(mixed)], tmp_path / "clean"
    )
    assert keys(dataset) == {"good0", "good1", "good2"}
    assert removed(tmp_path / "clean")["bad"]["outcome"] == "quarantined"


@pytest.mark.parametrize("inside", ["noisy", "noisy/clean", "."])
def test_a_version_is_never_written_into_its_source(
    noisy: Path, tools: SimpleNamespace, inside: str
) -> None:
    before = content(noisy)
    out = noisy.parent / inside
    with pytest.raises(UserError, match="Nothing was removed"):
        curate(tools.pipeline(*STAGES), [str(noisy)], out, options=CurateOptions(overwrite=True))
    assert content(noisy) == before


def test_a_pipeline_that_keeps_nothing_writes_nothing(
    noisy: Path, tools: SimpleNamespace, tmp_path: Path
) -> None:
    strict = tools.pipeline({"type": "picture_size", "min_side": 5000})
    with pytest.raises(UserError, match="keeps no item at all"):
        curate(strict, [str(noisy)], tmp_path / "clean")
    assert not (tmp_path / "clean").exists()


RUN = """
import sys, time
from pathlib import Path
from carillon.engine.data.curate import state
from carillon.engine.data.curate.run import CurateOptions, curate
from carillon.engine.data.curate.pipeline import load_pipeline
state.PART_ROWS = 2
if __name__ == "__main__":
    print("begun", flush=True)
    curate(load_pipeline(sys.argv[1]), [sys.argv[2]], Path(sys.argv[3]),
           options=CurateOptions(workers=1), progress=lambda done, _: print(done, flush=True))
    print("published", flush=True)
"""


def test_a_killed_run_goes_on_without_scoring_again(
    noisy: Path, tools: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, out = tmp_path / "pipeline.yaml", tmp_path / "clean"
    config.write_text("stages: [{type: picture_size, min_side: 100}, {type: near_pictures}]\n")
    script = tmp_path / "run.py"
    script.write_text(RUN)
    command = [sys.executable, str(script), str(config), str(noisy), str(out)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if line.strip() == "6":
                os.kill(process.pid, signal.SIGKILL)
                break
    assert process.wait() == -signal.SIGKILL
    assert not out.exists()
    (folder,) = tmp_path.glob(".clean.curation-*")
    deadline = time.monotonic() + 20
    while list(folder.glob("*.partial")) and time.monotonic() < deadline:
        time.sleep(0.05)  # the worker ends by itself
    before = {path.name: path.stat().st_mtime_ns for path in folder.glob("*.arrow")}
    assert len(before) >= 3
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert int(done.stdout.split()[1]) >= 6, "parts were scored again"
    monkeypatch.setattr("carillon.engine.data.curate.state.PART_ROWS", 2)
    stages = ({"type": "picture_size", "min_side": 100}, {"type": "near_pictures"})
    (tmp_path / "b").mkdir()
    curate(tools.pipeline(*stages), [str(noisy)], tmp_path / "b" / "clean")
    assert content(out) == content(tmp_path / "b" / "clean")
    assert not folder.exists()


def test_a_run_killed_while_it_writes_leaves_nothing_behind(
    noisy: Path, tools: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The unfinished folder is its own; that of another program stays."""
    config, out = tmp_path / "pipeline.yaml", tmp_path / "clean"
    config.write_text("stages: [{type: picture_size, min_side: 100}]\n")
    script = tmp_path / "run.py"
    script.write_text(RUN.replace("    print", "    " + KILL_IN_PASS_3 + "\n    print", 1))
    foreign = tmp_path / ".clean.partial-foreign"
    foreign.mkdir()
    command = [sys.executable, str(script), str(config), str(noisy), str(out)]
    done = subprocess.run(command, capture_output=True, check=False)
    assert done.returncode == -signal.SIGKILL
    assert len(list(tmp_path.glob(".clean.partial-*"))) == 2
    assert not out.exists()
    monkeypatch.setattr("carillon.engine.data.curate.state.PART_ROWS", 2)
    curate(tools.pipeline({"type": "picture_size", "min_side": 100}), [str(noisy)], out)
    assert [path.name for path in tmp_path.glob(".clean*")] == [foreign.name]
    assert out.exists()


KILL_IN_PASS_3 = (
    "import os, signal; from carillon.engine.data import shard_writer; "
    "shard_writer.publish_folder = lambda *_: os.kill(os.getpid(), signal.SIGKILL)"
)


def test_what_was_erased_does_not_come_back(
    noisy: Path, tools: SimpleNamespace, tmp_path: Path
) -> None:
    parent = shutil.copytree(noisy, tmp_path / "parent")
    dataset = open_dataset(parent)
    tombstones = Tombstones().with_erasure(
        dataset="noisy",
        fingerprint=dataset.fingerprint,
        erased_at="2026-11-25T00:00:00Z",
        reason="request",
        requested_by="Ada",
        items=[("scene02", "0" * 64)],
    )
    (parent / TOMBSTONES_NAME).write_bytes(tombstones.content())
    out = tmp_path / "out"
    found, _ = curate(tools.pipeline(*STAGES), [str(parent)], out)
    assert "scene02" not in keys(found)
    assert removed(out)["scene02"]["stage"] == "tombstones"
    assert "must not come back" in removed(out)["scene02"]["reason"]
    assert found.manifest.source["erased"] == 1
    assert tombstones_of([out]).erasures == tombstones.erasures
