"""What an item does to the process that reads it ends with that item in quarantine."""

import importlib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow.parquet as pq
import pytest

from carillon.engine.config import UserError
from carillon.engine.data.curate.pipeline import Pipeline
from carillon.engine.data.curate.run import CurateOptions, curate

# Spawned workers import it by name, from the path that they are given.
HOSTILE = """
import os, signal, time
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar
from carillon.engine.data.curate.stage import Finding, Stage

@dataclass(frozen=True, kw_only=True)
class Hostile(Stage):
    type: str = "hostile"
    score_names: ClassVar[tuple[str, ...]] = ()

    def examine(self, item):
        what = item.meta.get("do")
        if what == "crash":
            os.abort()
        if what == "once":  # as when someone kills processes one by one
            mark = Path(__file__).with_name("killed-once")
            if not mark.exists():
                mark.touch()
                os.kill(os.getpid(), signal.SIGKILL)
        if what == "hang":
            time.sleep(600)
        if what == "memory":
            return Finding(meta={"size": len(bytearray(64 << 30))})
        if what == "raise":
            raise RuntimeError("no such thing")
        return Finding()
"""


@pytest.fixture
def hostile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    folder = tmp_path / "modules"
    folder.mkdir()
    (folder / "hostile_stage.py").write_text(HOSTILE)
    monkeypatch.syspath_prepend(str(folder))
    return importlib.import_module("hostile_stage").Hostile


def test_items_that_crash_hang_or_fill_the_memory_are_quarantined(
    hostile: Any, tools: SimpleNamespace, tmp_path: Path
) -> None:
    actions = ["", "crash", "", "hang", "memory", "raise", "", "once"]
    samples = [tools.sample(f"item{i}", i, do=what) for i, what in enumerate(actions)]
    source = tools.write_set(tmp_path / "source", samples)
    pipeline = Pipeline(stages=(hostile(),), max_bad_share=0.9, item_timeout_s=6)
    options = CurateOptions(workers=2, memory_limit_bytes=4 << 30)
    dataset, _ = curate(pipeline, [str(source)], tmp_path / "clean", options=options)
    split = dataset.splits["train"]
    assert [split.key(row) for row in range(len(split))] == ["item0", "item2", "item6", "item7"]
    rows = pq.read_table(tmp_path / "clean" / "removed-000.parquet").to_pylist()
    reasons = {row["key"]: row["reason"] for row in rows}
    assert {row["outcome"] for row in rows} == {"quarantined"}
    assert reasons["item1"] == "two processes that read it ended, the last with code -6"
    assert reasons["item3"] == "it took longer than item_timeout_s, so it is not read again"
    assert reasons["item4"].startswith("MemoryError")
    assert reasons["item5"] == "RuntimeError: no such thing"


def test_workers_that_cannot_even_start_end_the_run(
    hostile: Any, tools: SimpleNamespace, tmp_path: Path
) -> None:
    source = tools.write_set(tmp_path / "source", [tools.sample("one", 1)])
    (tmp_path / "modules" / "hostile_stage.py").write_text("import os; os._exit(7)")
    with pytest.raises(UserError, match="workers end with code 7 before they read an item"):
        curate(Pipeline(stages=(hostile(),)), [str(source)], tmp_path / "clean")
    assert not (tmp_path / "clean").exists()
