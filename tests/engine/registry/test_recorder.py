"""A run's recorder: strict at the start, and after it never in training's way."""

import logging
import sqlite3
from collections.abc import Iterator
from pathlib import Path

import pytest
from sqlalchemy import select

from carillon.engine.data.config import JoinConfig, SetConfig
from carillon.engine.data.shard_writer import ShardWriter
from carillon.engine.data.shards import Dataset, open_dataset
from carillon.engine.data.training_data import OpenedSet
from carillon.engine.registry.database import RegistryError
from carillon.engine.registry.lineage import sets_of
from carillon.engine.registry.recorder import RunRecorder
from carillon.engine.registry.store import Registry
from carillon.engine.registry.tables import CheckpointRow, TrainingRunRow


@pytest.fixture
def recorder(dataset: Dataset, location: Path, tmp_path: Path) -> RunRecorder:
    started = start(location, dataset, tmp_path)
    return RunRecorder(Registry.open(location, lock_timeout_s=0.05), started.run_id)


@pytest.fixture
def warnings_of_carillon(caplog: pytest.LogCaptureFixture) -> Iterator[pytest.LogCaptureFixture]:
    """The project's logger may have been set up not to propagate."""
    logger = logging.getLogger("carillon")
    logger.addHandler(caplog.handler)
    yield caplog
    logger.removeHandler(caplog.handler)


def start(location: Path, dataset: Dataset, folder: Path) -> RunRecorder:
    return RunRecorder.start(
        location,
        sets=[OpenedSet("", SetConfig(path="data/tiny"), dataset, dataset.splits["train"])],
        name="tiny-c",
        config_hash="c",
        params={"lr": 0.1},
        artifacts_uri=folder / "runs" / "tiny-c",
    )


def lock(location: Path) -> sqlite3.Connection:
    other = sqlite3.connect(location, isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    return other


def test_rows_of_a_run(recorder: RunRecorder, location: Path, dataset: Dataset) -> None:
    recorder.progress(5, {"loss": 1.0})
    recorder.checkpoint(5, uri="/c", content_hash="ab", val_metrics={"r": 0.5})
    recorder.finish("finished")
    with recorder.registry.reading() as session:
        run = session.get_one(TrainingRunRow, recorder.run_id)
        assert (run.status, run.step, run.metrics) == ("finished", 5, {"loss": 1.0})
        assert run.end_time is not None
        (read,) = sets_of(session, recorder.run_id)
        assert (read.dataset.fingerprint, read.link.split) == (dataset.fingerprint, "train")
        assert session.scalars(select(CheckpointRow.content_hash)).all() == ["ab"]


def test_all_sets_of_a_mixture_are_the_runs(
    dataset: Dataset, location: Path, tmp_path: Path
) -> None:
    """Also one that joins later; started again with fewer, the run has those alone."""
    with ShardWriter(tmp_path / "second", name="second", source={}) as writer:
        writer.write("key", {"jpg": b"x"}, {})
    second = open_dataset(tmp_path / "second")
    first = OpenedSet("a", SetConfig(path="a"), dataset, dataset.splits["held_out"])
    joining = JoinConfig(path="b", from_position=70)
    later = OpenedSet("b", joining, second, second.splits["train"])
    found = []
    for sets in ([first, later], [later]):
        recorder = RunRecorder.start(
            location, sets=sets, name="m", config_hash="c", params={}, artifacts_uri=tmp_path / "m"
        )
        with recorder.registry.reading() as session:
            links = sets_of(session, recorder.run_id)
            found.append(
                [(one.link.name, one.dataset.name, one.link.split) for one in links]
                + [one.link.from_position for one in links]
            )
    b = ("b", "second", "train")
    assert found == [[("a", "tiny", "held_out"), b, 0, 70], [b, 70]]


def test_start_needs_a_registry_that_works(dataset: Dataset, tmp_path: Path) -> None:
    with pytest.raises(RegistryError, match="has no folder"):
        start(tmp_path / "absent" / "registry.sqlite", dataset, tmp_path)


def test_writes_that_fail_wait_and_are_made_later(
    recorder: RunRecorder, location: Path, warnings_of_carillon: pytest.LogCaptureFixture
) -> None:
    other = lock(location)
    recorder.progress(5, {"loss": 3.0})
    recorder.checkpoint(5, uri="/c5", content_hash="ab")
    recorder.progress(6, {"loss": 2.0})
    assert "locked by another process" in warnings_of_carillon.text
    assert "2 writes wait, training goes on" in warnings_of_carillon.text
    other.execute("ROLLBACK")
    other.close()
    recorder.checkpoint(10, uri="/c10", content_hash="cd")
    with recorder.registry.reading() as session:
        steps = session.scalars(select(CheckpointRow.step).order_by(CheckpointRow.id)).all()
        assert steps == [5, 10]
        run = session.get_one(TrainingRunRow, recorder.run_id)
        assert (run.step, run.metrics) == (10, {"loss": 2.0})


def test_what_is_missing_at_the_end_is_named(
    recorder: RunRecorder, location: Path, warnings_of_carillon: pytest.LogCaptureFixture
) -> None:
    other = lock(location)
    recorder.checkpoint(5, uri="/c5", content_hash="ab")
    recorder.finish("finished")
    other.close()
    assert "the registry lacks this run's checkpoint 5, end" in warnings_of_carillon.text


def test_vanished_registry_does_not_stop_the_run(recorder: RunRecorder, location: Path) -> None:
    location.write_bytes(b"garbage" * 1000)
    for step in range(3):
        recorder.progress(step, {"loss": 1.0})
    recorder.finish("failed")
