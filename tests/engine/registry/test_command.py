"""`carillon runs`: what the tables say."""

from pathlib import Path

import pytest

from carillon.engine.cli import main
from carillon.engine.data.shards import Dataset
from carillon.engine.registry.store import Registry, RunDataset

HASH = "ab12cd34" * 8


@pytest.fixture
def trained(registry: Registry, dataset: Dataset, tmp_path: Path) -> Registry:
    registry.record_dataset(dataset)
    run = registry.start_run(
        "emoji-3f9a",
        config_hash="0123456789abcdef",
        params={},
        artifacts_uri=tmp_path / "emoji-3f9a",
        datasets=[RunDataset(dataset.fingerprint, split="train")],
        git_commit="f00dbeef" * 5,
    )
    registry.add_checkpoint(run, 70, uri="/c", content_hash=HASH, val_metrics={"R@1": 0.25})
    registry.add_evaluation(HASH, "retrieval[small]", {"MRR": 0.125, "by_language": {"en": {}}})
    registry.update_run(run, 80, {"loss": 1.23456, "best_R@1": 0.25})
    registry.finish_run(run, "interrupted")
    return registry


def output(location: Path, capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert main(["runs", *arguments, "--registry", str(location)]) == 0
    return capsys.readouterr().out


@pytest.mark.usefixtures("trained")
@pytest.mark.parametrize("action", [[], ["list"]])
def test_list_has_a_line_per_run(
    location: Path, capsys: pytest.CaptureFixture[str], action: list[str]
) -> None:
    text = output(location, capsys, *action)
    (line,) = [line for line in text.splitlines() if "emoji-3f9a" in line]
    cells = [cell.strip() for cell in line.strip("│").split("│")]
    assert cells[:5] == ["emoji-3f9a", "interrupted", "80", "1.235", "best_R@1 0.25"]
    assert cells[6:] == ["0:00:00", "0123456789ab", "f00dbeeff0"]


@pytest.mark.usefixtures("trained")
def test_show_has_data_sets_checkpoints_and_evaluations(
    location: Path, capsys: pytest.CaptureFixture[str], dataset: Dataset
) -> None:
    text = output(location, capsys, "show", "emoji")
    assert "ab12cd34ab12" in text
    assert dataset.fingerprint[:12] in text
    assert "R@1 0.25" in text
    assert "retrieval[small]" in text  # not read as markup
    assert "MRR 0.125" in text


@pytest.mark.usefixtures("trained")
def test_lineage_prints_whole_hashes(
    location: Path, capsys: pytest.CaptureFixture[str], dataset: Dataset
) -> None:
    text = output(location, capsys, "lineage", HASH[:8])
    assert HASH in text
    assert dataset.fingerprint in text
    assert dataset.manifest.splits["train"].shards[0].sha256 in text


@pytest.mark.usefixtures("trained")
def test_unknown_run_and_missing_registry_exit_2(
    location: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["runs", "show", "absent", "--registry", str(location)]) == 2
    assert "no run 'absent' is registered" in capsys.readouterr().err
    assert main(["runs", "--registry", str(location.with_name("other"))]) == 2
    assert "there is no registry" in capsys.readouterr().err
    assert not location.with_name("other").exists()
