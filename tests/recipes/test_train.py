"""The script that torchrun starts passes its words on as the `train` command."""

import runpy
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "recipes" / "train.py"


@pytest.mark.parametrize(
    "words",
    [
        ["--config", "x.yaml", "a=1", "--fresh", "b=2"],
        ["a=1", "--fresh", "b=2", "--config", "x.yaml"],
        ["--config=x.yaml", "--fresh", "a=1", "b=2"],
    ],
)
def test_overrides_may_stand_anywhere(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    passed: list[list[str]] = []
    monkeypatch.setattr("carillon.engine.cli.main", lambda given: passed.append(given) or 0)
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), *words])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(SCRIPT), run_name="__main__")
    assert end.value.code == 0
    assert passed == [["train", "x.yaml", "a=1", "b=2", "--fresh"]]
