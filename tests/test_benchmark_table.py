"""The table of the kernels' results: every bar is judged, and what is missing is an error."""

import json
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"


@pytest.fixture
def table(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(BENCHMARKS)
    return import_module("table")


@pytest.fixture
def results(table: ModuleType, tmp_path: Path) -> Path:
    """Results that meet every bar: a peer takes four times as long and twenty times the memory."""
    for op in table.OPS:
        rows: dict[Any, dict[str, Any]] = {}
        for bar in (bar for bar in table.BARS if bar.op == op):
            rows.setdefault(bar.key, a_row(bar))
            for peer in bar.against:
                rows[bar.key]["ratio"][peer] = 4.0
                rows[bar.key]["seconds"][peer] = 0.04
                rows[bar.key]["extra_mb"][peer] = 2000.0
        if not rows:  # an operator without bars
            rows[op] = a_row(table.Bar(op=op, case="pictures", passes="forward", size=8))
        write(tmp_path, op, list(rows.values()))
    return tmp_path


def a_row(bar: Any) -> dict[str, Any]:
    named = {"op": bar.op, "case": bar.case, "pass": bar.passes, "size": bar.size, "unit": "rows"}
    figures = {"seconds": {"ours": 0.01}, "ratio": {}, "extra_mb": {"ours": 100.0}}
    rest = {"num_threads": 1, "floor_h100_s": 1e-6, "left_out": {"flex": "no backward here"}}
    return named | figures | rest


def write(folder: Path, op: str, rows: list[dict[str, Any]]) -> None:
    where = {"cpu": "a processor", "cores": 2, "load_average": 0.1}
    about = {"commit": "0123456789+", "date": "2026-01-31", "hardware": where}
    content = about | {"versions": {"torch": "2.13.0"}, "rows": rows}
    (folder / f"{op}.json").write_text(json.dumps(content))


def change(folder: Path, op: str, rows: Any) -> None:
    path = folder / f"{op}.json"
    write(folder, op, rows(json.loads(path.read_text())["rows"]))


def test_all_met(table: ModuleType, results: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert table.main(["--results", str(results), "--strict"]) == 0
    said = capsys.readouterr().out
    assert f"{len(table.BARS)} of {len(table.BARS)} bars met" in said
    assert "NOT met" not in said
    line = next(line for line in said.splitlines() if "8,192 rows" in line)
    columns = [column for column in line.split("  ") if column]
    assert [column.strip() for column in columns] == [
        *("contrastive", "softmax fp32", "forward+backward", "8,192 rows", "10 ms", "torch"),
        *("40 ms", "4.00", "100.0 MB", "2000.0 MB", "1 us", "4.00 >= 1.3 x torch", "met"),
        "2026-01-31 0123456+",
    ]
    assert "contrastive: without flex: no backward here" in said


@pytest.mark.parametrize(
    ("figure", "value", "said"),
    [
        ("ratio", {"torch": 1.29}, "1.29 >= 1.3 x torch"),
        ("extra_mb", {"ours": 202.0}, "10.1% <= 10% of the memory of torch"),
    ],
)
def test_a_bar_that_is_not_met_fails_when_asked(
    figure: str,
    value: dict[str, float],
    said: str,
    table: ModuleType,
    results: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def slower(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
        rows[0][figure] |= value
        return rows

    change(results, "contrastive", slower)
    assert table.main(["--results", str(results)]) == 0
    assert table.main(["--results", str(results), "--strict"]) == 1
    (line,) = {line for line in capsys.readouterr().out.splitlines() if "NOT met" in line}
    assert said in line


def test_a_bar_against_two_peers_takes_the_faster(table: ModuleType, results: Path) -> None:
    def one_faster(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
        rows[0]["ratio"]["scattering"] = 2.9
        return rows

    change(results, "moe_routing", one_faster)
    assert table.main(["--results", str(results), "--strict"]) == 1


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        (lambda rows: rows[1:], "no row for the bar of contrastive, softmax fp32"),
        (lambda rows: [{**rows[0], "ratio": {}}, *rows[1:]], "lacks torch, which its bar"),
        (lambda rows: [{"name": "of another form"}], "contrastive.json has no row"),
        (lambda rows: [], "contrastive.json has no row"),
    ],
)
def test_what_is_missing_is_an_error(
    rows: Any, said: str, table: ModuleType, results: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    change(results, "contrastive", rows)
    with pytest.raises(SystemExit) as stop:
        table.main(["--results", str(results)])
    assert stop.value.code == 2
    assert said in capsys.readouterr().err


def test_a_missing_file_is_an_error(
    table: ModuleType, results: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (results / "fp8_cast.json").unlink()
    with pytest.raises(SystemExit):
        table.main(["--results", str(results)])
    assert "fp8_cast.json" in capsys.readouterr().err
