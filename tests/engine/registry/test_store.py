"""Rows written by runs and evaluations: repeated calls, concurrent writers, a writer killed."""

import os
import signal
import sqlite3
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from sqlalchemy import func, select

from carillon.engine.data.shards import Dataset
from carillon.engine.registry.database import RegistryError
from carillon.engine.registry.store import Registry, RunDataset, storable
from carillon.engine.registry.tables import (
    Base,
    CheckpointRow,
    DatasetRow,
    EvaluationRow,
    TrainingRunRow,
)

HASH = "ab" * 32


def start(registry: Registry, folder: Path, *, config: str = "c1", fresh: bool = False) -> int:
    return registry.start_run(
        "tiny", config_hash=config, params={"a": 1}, artifacts_uri=folder / "tiny", fresh=fresh
    )


def count(registry: Registry, table: type[Base]) -> int:
    with registry.reading() as session:
        return session.scalar(select(func.count()).select_from(table)) or 0


def status(registry: Registry, run_id: int) -> str:
    with registry.reading() as session:
        return session.get_one(TrainingRunRow, run_id).status


def test_dataset_is_one_row_with_its_shards(registry: Registry, dataset: Dataset) -> None:
    first = registry.record_dataset(dataset)
    assert registry.record_dataset(dataset) == first
    with registry.reading() as session:
        row = session.get_one(DatasetRow, first)
        assert row.fingerprint == dataset.fingerprint
        assert row.source_uri == str(dataset.path)
        shard = row.details["splits"]["train"]["shards"][0]
    assert shard["sha256"] == dataset.manifest.splits["train"].shards[0].sha256
    assert shard["num_samples"] == 5


def test_resumed_run_keeps_its_row(registry: Registry, tmp_path: Path) -> None:
    run = start(registry, tmp_path)
    registry.update_run(run, 10, {"loss": 2.0, "best_r@1": 0.1})
    registry.finish_run(run, "interrupted")
    assert start(registry, tmp_path) == run
    assert status(registry, run) == "running"
    registry.update_run(run, 20, {"loss": 1.0})
    with registry.reading() as session:
        row = session.get_one(TrainingRunRow, run)
        assert (row.step, row.end_time) == (20, None)
        assert row.metrics == {"loss": 1.0, "best_r@1": 0.1}
        assert row.start_time.tzinfo is not None


@pytest.mark.parametrize("change", [{"fresh": True}, {"config": "c2"}])
def test_run_started_anew_supersedes(
    registry: Registry, tmp_path: Path, change: dict[str, object]
) -> None:
    run = start(registry, tmp_path)
    anew = start(registry, tmp_path, **change)  # type: ignore[arg-type]
    assert anew != run
    assert (status(registry, run), status(registry, anew)) == ("superseded", "running")


def test_run_of_an_unknown_dataset_is_refused(registry: Registry, tmp_path: Path) -> None:
    with pytest.raises(RegistryError, match="no data set abc is registered"):
        registry.start_run(
            "x", config_hash="c", params={}, artifacts_uri=tmp_path, datasets=[RunDataset("abc")]
        )
    assert count(registry, TrainingRunRow) == 0


def test_checkpoint_of_a_step_is_one_row(registry: Registry, tmp_path: Path) -> None:
    run = start(registry, tmp_path)
    uri = tmp_path / "step-10"
    first = registry.add_checkpoint(run, 10, uri=uri, content_hash=HASH)
    again = registry.add_checkpoint(run, 10, uri=uri, content_hash=HASH, val_metrics={"r": 0.5})
    assert first == again
    registry.add_evaluation(HASH, "retrieval", {"R@1": 0.1})
    registry.add_evaluation(HASH, "retrieval", {"R@1": 0.2})
    with registry.reading() as session:
        assert session.get_one(CheckpointRow, first).val_metrics == {"r": 0.5}
        assert [row.metrics for row in session.scalars(select(EvaluationRow))] == [{"R@1": 0.2}]
    registry.add_checkpoint(run, 10, uri=uri, content_hash="cd" * 32)
    assert (count(registry, CheckpointRow), count(registry, EvaluationRow)) == (1, 0)


def test_evaluation_of_an_unknown_checkpoint_is_refused(registry: Registry) -> None:
    with pytest.raises(RegistryError, match="no checkpoint abababababab is registered"):
        registry.add_evaluation(HASH, "retrieval", {})


def test_a_run_ends_only_in_an_end(registry: Registry, tmp_path: Path) -> None:
    run = start(registry, tmp_path)
    with pytest.raises(ValueError, match="finished, failed, interrupted; got 'running'"):
        registry.finish_run(run, "running")


def test_storable_holds_what_json_cannot() -> None:
    given = {
        "nan": float("nan"),
        "inf": np.float32("inf"),
        "numpy": np.int64(3),
        "tensor": torch.tensor(0.5),
        "nested": ({1: "a\0b"}, True, None),
        "path": Path("x"),
    }
    assert storable(given) == {
        "nan": None,
        "inf": None,
        "numpy": 3,
        "tensor": 0.5,
        "nested": [{"1": "a\\0b"}, True, None],
        "path": "x",
    }


_WRITER = """
import sys
from carillon.engine.registry.store import Registry
location, writer = sys.argv[1:]
registry = Registry.open(location)
run = registry.start_run(writer, config_hash="c", params={}, artifacts_uri="/runs/" + writer)
for step in range(25):
    registry.add_checkpoint(run, step, uri="/r", content_hash=f"{writer}-{step}")
"""


def test_concurrent_writers_lose_nothing(registry: Registry, location: Path) -> None:
    processes = [
        subprocess.Popen([sys.executable, "-c", _WRITER, str(location), f"writer{i}"])
        for i in range(3)
    ]
    assert [process.wait() for process in processes] == [0, 0, 0]
    assert (count(registry, TrainingRunRow), count(registry, CheckpointRow)) == (3, 75)


_ENDLESS_WRITER = """
import sys
from carillon.engine.registry.store import Registry
registry = Registry.open(sys.argv[1])
run = registry.start_run("r", config_hash="c", params={}, artifacts_uri="/r")
step = 0
while True:
    registry.add_checkpoint(run, step, uri="/r", content_hash=str(step))
    print(step, flush=True)
    step += 1
"""


def test_killed_writer_leaves_every_acknowledged_row(location: Path) -> None:
    command = [sys.executable, "-c", _ENDLESS_WRITER, str(location)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        acknowledged = -1
        while acknowledged < 40:
            acknowledged = int(process.stdout.readline())
        os.kill(process.pid, signal.SIGKILL)
        for line in process.stdout:
            acknowledged = int(line)
    registry = Registry.open(location)
    # One more row may be there: committed, and killed before it was said.
    assert count(registry, CheckpointRow) in (acknowledged + 1, acknowledged + 2)
    connection = sqlite3.connect(location)
    assert connection.execute("PRAGMA integrity_check").fetchone() == ("ok",)
    connection.close()
