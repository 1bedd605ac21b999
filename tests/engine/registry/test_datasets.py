"""Data sets in the registry: found, trained on, superseded."""

import logging
from pathlib import Path

import pytest

from carillon.engine.cli import main
from carillon.engine.data.config import SetConfig
from carillon.engine.data.shards import Dataset
from carillon.engine.data.training_data import OpenedSet
from carillon.engine.registry.database import RegistryError
from carillon.engine.registry.datasets import find_dataset, supersede, superseded, trained_on
from carillon.engine.registry.recorder import RunRecorder
from carillon.engine.registry.register import register_items
from carillon.engine.registry.store import Registry, RunDataset


def test_found_by_folder_and_fingerprint(registry: Registry, dataset: Dataset) -> None:
    registry.record_dataset(dataset)
    with registry.reading() as session:
        for given in (str(dataset.path), dataset.fingerprint, dataset.fingerprint[:6]):
            assert find_dataset(session, given).fingerprint == dataset.fingerprint
        for given in (dataset.fingerprint[:5], "/nowhere", "%%%%%%"):
            with pytest.raises(RegistryError, match="no data set"):
                find_dataset(session, given)


def test_runs_that_read_it(registry: Registry, dataset: Dataset, tmp_path: Path) -> None:
    dataset_id = registry.record_dataset(dataset)
    splits = [RunDataset(dataset.fingerprint, name, name) for name in ("train", "held_out")]
    run = registry.start_run(
        "r", config_hash="c", params={}, artifacts_uri=tmp_path, datasets=splits
    )
    registry.add_checkpoint(run, 5, uri="/c5", content_hash="ab" * 32)
    with registry.reading() as session:
        found = trained_on(session, dataset_id)
        assert [(one.run.name, one.link.split) for one in found] == [
            ("r", "train"),
            ("r", "held_out"),
        ]
        assert [row.step for row in found[0].checkpoints] == [5]


def test_superseding_removes_the_rows_of_items(registry: Registry, dataset: Dataset) -> None:
    register_items(registry, dataset)
    assert supersede(registry, dataset.fingerprint, ["train/key0", "held_out/key5", "no"]) == 2
    (first,) = superseded(registry, [dataset.fingerprint, "other"])
    assert supersede(registry, dataset.fingerprint, ["train/key0"]) == 0
    (again,) = superseded(registry, [dataset.fingerprint])
    assert first.superseded_at == again.superseded_at
    assert superseded(registry, ["other"]) == []


def test_training_on_a_superseded_set_is_told(
    registry: Registry,
    location: Path,
    dataset: Dataset,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    registry.record_dataset(dataset)
    supersede(registry, dataset.fingerprint, [])
    read = OpenedSet("", SetConfig(path="d"), dataset, dataset.splits["train"])
    logger = logging.getLogger("carillon")
    logger.addHandler(caplog.handler)
    RunRecorder.start(
        location, sets=[read], name="r", config_hash="c", params={}, artifacts_uri=tmp_path
    )
    logger.removeHandler(caplog.handler)
    assert "the data set tiny" in caplog.text
    assert "is superseded" in caplog.text


def test_lineage_command(
    registry: Registry, location: Path, dataset: Dataset, capsys: pytest.CaptureFixture[str]
) -> None:
    registry.record_dataset(dataset)
    given = ["data", "lineage", dataset.fingerprint[:8], "--registry", str(location)]
    assert main(given) == 0
    assert dataset.fingerprint in capsys.readouterr().out
    assert main(["data", "lineage", "absent", "--registry", str(location)]) == 2
    assert "no data set 'absent' is registered" in capsys.readouterr().err
