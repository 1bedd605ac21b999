"""From a checkpoint's hash or folder back to shards that open_dataset agrees with."""

import hashlib
from pathlib import Path

import pytest

from carillon.engine.data.shard_writer import ShardWriter
from carillon.engine.data.shards import Dataset, open_dataset
from carillon.engine.registry.database import RegistryError
from carillon.engine.registry.lineage import ancestors_of, trace
from carillon.engine.registry.store import Registry, RunDataset

HASH = "ab12cd34" * 8


@pytest.fixture
def trained(registry: Registry, dataset: Dataset, tmp_path: Path) -> Registry:
    registry.record_dataset(dataset)
    run = registry.start_run(
        "tiny",
        config_hash="cfg",
        params={},
        artifacts_uri=tmp_path / "tiny",
        datasets=[RunDataset(dataset.fingerprint, split="train")],
        git_commit="f00d",
    )
    registry.add_checkpoint(run, 5, uri=tmp_path / "tiny" / "step-5", content_hash=HASH)
    registry.add_checkpoint(run, 6, uri=tmp_path / "tiny" / "step-6", content_hash="ab12ff" * 10)
    registry.add_evaluation(HASH, "retrieval", {"R@1": 0.5})
    return registry


def test_hash_prefix_and_folder_lead_to_the_bytes(
    trained: Registry, dataset: Dataset, tmp_path: Path
) -> None:
    for checkpoint in (HASH, HASH[:8], str(tmp_path / "tiny" / "step-5")):
        found = trace(trained, checkpoint)
        assert found.checkpoint.content_hash == HASH
        assert (found.run.config_hash, found.run.git_commit) == ("cfg", "f00d")
        (read,) = found.datasets
        assert (read.dataset.fingerprint, read.link.split) == (dataset.fingerprint, "train")
        assert [row.suite_name for row in found.evaluations] == ["retrieval"]
        assert {shard.split for shard in read.shards} == {"train", "held_out"}
        for shard in read.shards:
            content = (Path(read.dataset.source_uri) / shard.file).read_bytes()
            assert hashlib.sha256(content).hexdigest() == shard.sha256


def test_a_set_leads_to_those_that_it_was_made_from(
    trained: Registry, dataset: Dataset, tmp_path: Path
) -> None:
    """Raw to middle to the one that was trained on; entering the links twice changes nothing."""
    sets = []
    for name in ("raw", "middle"):
        with ShardWriter(tmp_path / name, name=name, source={}) as writer:
            writer.write(name, {"jpg": name.encode()}, {})
        sets.append(open_dataset(tmp_path / name))
    raw, middle = sets
    for _ in range(2):
        trained.record_derived(middle, [raw], relation="ingest", details={})
        trained.record_derived(dataset, [middle], relation="curate", details={"pipeline": "p"})
    found = trace(trained, HASH).datasets[0].ancestors
    assert [(one.steps, one.relation, one.dataset.fingerprint) for one in found] == [
        (1, "curate", middle.fingerprint),
        (2, "ingest", raw.fingerprint),
    ]


def test_a_set_entered_by_itself_is_linked_by_its_manifest(
    trained: Registry, tmp_path: Path
) -> None:
    """As after a kill between a curated set and its rows; parents without a row are left out."""
    with ShardWriter(tmp_path / "raw", name="raw", source={}) as writer:
        writer.write("raw", {"jpg": b"raw"}, {})
    raw = open_dataset(tmp_path / "raw")
    parents = [{"fingerprint": raw.fingerprint}, {"fingerprint": "0" * 64}, {}, "odd"]
    with ShardWriter(
        tmp_path / "clean", name="clean", source={"kind": "curate", "parents": parents}
    ) as writer:
        writer.write("clean", {"jpg": b"clean"}, {})
    trained.record_dataset(raw)
    for _ in range(2):
        clean_id = trained.record_dataset(open_dataset(tmp_path / "clean"))
    with trained.reading() as session:
        found = ancestors_of(session, clean_id)
        assert [(one.relation, one.dataset.fingerprint) for one in found] == [
            ("curate", raw.fingerprint)
        ]


def test_a_folder_is_that_of_the_run_trained_anew(trained: Registry, tmp_path: Path) -> None:
    """--fresh moves the old run's folder aside; its rows stay, under the same name."""
    run = trained.start_run("tiny", config_hash="new", params={}, artifacts_uri=tmp_path / "tiny")
    newer, folder = "cd" * 32, tmp_path / "tiny" / "step-5"
    trained.add_checkpoint(run, 5, uri=folder, content_hash=newer)
    assert trace(trained, str(folder)).checkpoint.content_hash == newer
    assert trace(trained, str(folder)).run.config_hash == "new"
    assert trace(trained, HASH).run.config_hash == "cfg"


def test_unknown_and_ambiguous_checkpoints(trained: Registry, tmp_path: Path) -> None:
    run = trained.start_run("other", config_hash="c", params={}, artifacts_uri=tmp_path / "other")
    trained.add_checkpoint(run, 1, uri="/x", content_hash=HASH[:8] + "0" * 56)
    with pytest.raises(RegistryError, match="several checkpoints begin with 'ab12cd34'"):
        trace(trained, HASH[:8])
    for checkpoint in ("0123456789", "ab1", "%%%%%%%%", "/nowhere"):
        with pytest.raises(RegistryError, match="no checkpoint"):
            trace(trained, checkpoint)
