"""The command that prints the settings; that docs/settings.md is its output is tested there."""

from pathlib import Path

import pytest

from carillon.engine.cli import main


def test_section_is_printed_alone(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["config", "settings", "data.augment"]) == 0
    printed = capsys.readouterr().out
    headings = [line for line in printed.splitlines() if line.startswith("## ")]
    assert headings == ["## `data.augment.image`", "## `data.augment.text`"]
    assert "| `flip` | true / false | `false` | yes |" in printed


def test_one_setting_is_printed_alone(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["config", "settings", "distributed.precision"]) == 0
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| `")]
    assert len(rows) == 1
    assert rows[0].startswith('| `precision` | fp32 / bf16 / fp8 | `"bf16"` | yes |')


def test_page_is_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = tmp_path / "settings.md"
    assert main(["config", "settings", "--out", str(page)]) == 0
    assert capsys.readouterr().out == ""
    text = page.read_text()
    assert "## `evaluation.retrieval.<name>`" in text
    assert (
        "| `num_workers` | whole number >= 0, <= 1024 | `1` | no |" in text
    )  # not part of the hash


def test_unknown_section_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["config", "settings", "dat"]) == 2
    assert "no setting or section 'dat'" in capsys.readouterr().err


def test_page_that_cannot_be_written_is_one_message(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["config", "settings", "--out", str(tmp_path / "absent" / "page.md")]) == 2
    assert "cannot be written: No such file or directory" in capsys.readouterr().err
