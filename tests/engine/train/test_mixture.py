"""A run on several sets: what it reads and logs, and a set that joins it under way."""

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import select

from carillon.engine.registry.lineage import sets_of
from carillon.engine.registry.store import Registry
from carillon.engine.registry.tables import TrainingRunRow

Setup = Any  # conftest's


@pytest.fixture(scope="module")
def mixture(
    pictures: Path, make_pictures: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> list[str]:
    """Overrides: the small set and a second of 20 pictures, three in four from the first."""
    second = make_pictures(tmp_path_factory.mktemp("sets") / "second", num=20, first=500)
    return [
        "data.path=null",
        f"data.mixture.first={{path: {pictures}, weight: 3}}",
        f"data.mixture.second={{path: {second}, weight: 1}}",
        "evaluation.in_training.every=0",
    ]


def read_by(setup: Setup) -> list[list[str]]:
    return [line["keys"] for line in setup.lines("sample_keys.jsonl")]


def test_a_set_joins_a_run_under_way(
    make_setup: Any,
    mixture: list[str],
    make_pictures: Callable[..., Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    setup = make_setup()
    assert setup.train(*mixture) == 0
    whole = read_by(setup)
    names = Counter(key.partition("/")[0] for keys in whole for key in keys)
    assert set(names) == {"first", "second"}
    assert 45 < names["first"] < 75  # three in four of 80
    last = setup.metrics()[-1]
    assert last["epoch/first"] == pytest.approx(names["first"] / 60)
    assert last["epoch/second"] == pytest.approx(names["second"] / 20)

    third = make_pictures(tmp_path / "third", num=12, first=900)
    joins = f"data.joins.third={{path: {third}, weight: 4, from_position: 56}}"
    cut = setup.killed_after(5, tmp_path / "cut")  # 40 samples read
    assert cut.train(*mixture, joins) == 0
    assert cut.run.name == setup.run.name
    found = read_by(cut)[-5:]
    assert found[:2] == whole[5:7]  # samples 40 to 55 are what they would have been
    late = Counter(key.partition("/")[0] for keys in found[2:] for key in keys)
    assert 4 <= late["third"] <= 20  # half of 24
    assert cut.metrics()[-1]["epoch/third"] == pytest.approx(late["third"] / 12)
    with Registry.open(cut.run.parent / "registry.sqlite").reading() as session:
        row = session.scalars(
            select(TrainingRunRow).where(TrainingRunRow.artifacts_uri == str(cut.run))
        ).one()
        read = [(one.link.name, one.link.from_position) for one in sets_of(session, row.id)]
    assert read == [("first", 0), ("second", 0), ("third", 56)]
    capsys.readouterr()

    again = cut.killed_after(5, tmp_path / "again")
    assert again.train(*mixture, joins.replace("56", "39")) == 2
    assert "third joins at 39, but the run has read 40 samples" in capsys.readouterr().err
    assert cut.train(*mixture) == 2
    assert "third joined at 56 and the run has read from it" in capsys.readouterr().err


def test_what_a_mixture_cannot_be_scored_on_is_told(
    make_setup: Any, mixture: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert make_setup().train(*mixture[:3], "evaluation.in_training.every=5") == 2
    assert "the run reads a mixture of first, second" in capsys.readouterr().err
