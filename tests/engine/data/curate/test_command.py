"""carillon curate: what it prints, what it enters in the registry, and how it ends."""

import json
import resource
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from sqlalchemy import select

from carillon.engine.cli import main
from carillon.engine.data.shards import open_dataset
from carillon.engine.registry.store import Registry
from carillon.engine.registry.tables import DatasetLinkRow, DatasetRow


@pytest.fixture
def source(tools: SimpleNamespace, tmp_path: Path) -> Path:
    samples = [tools.sample(f"s{i}", i) for i in range(4)]
    return tools.write_set(tmp_path / "source", [*samples, tools.sample("twin", 1)])


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "p.yaml"
    path.write_text("name: tiny\nstages: [{type: exact_duplicates}]\n")
    return path


def test_a_run_tells_what_it_did_and_enters_the_lineage(
    source: Path, recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, registry = tmp_path / "out", tmp_path / "r.sqlite"
    words = ["curate", str(recipe), str(source), "--out", str(out), "--registry", str(registry)]
    assert main([*words, "--workers", "1"]) == 0
    said = capsys.readouterr().out
    assert "kept 4 of 5; quarantined 0" in said
    assert "dropped by exact_duplicates: 1" in said
    with Registry.open(registry).reading() as session:
        child, parent = (
            session.scalar(
                select(DatasetRow).where(DatasetRow.fingerprint == open_dataset(path).fingerprint)
            )
            for path in (out, source)
        )
        link = session.scalar(select(DatasetLinkRow))
        assert child is not None
        assert parent is not None
        assert link is not None
        assert (link.dataset_id, link.parent_id, link.relation) == (child.id, parent.id, "curate")
        assert link.details["pipeline_hash"] == child.details["source"]["pipeline_hash"]
    assert main([*words, "--workers", "1"]) == 2
    assert "exists; give another place" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "give PIPELINE, DATASET and --out, or --stages"),
        (["P"], "give PIPELINE, DATASET and --out, or --stages"),
        (["P", "absent", "--out", "OUT"], "absent"),
        (["absent.yaml", "SOURCE", "--out", "OUT"], "absent.yaml cannot be read"),
        (["P", "SOURCE", "--out", "OUT", "--workers", "0"], "--workers 0"),
        (["P", "SOURCE", "SOURCE", "--out", "OUT"], "hold the same bytes; give one"),
        (["P", "SOURCE", "--out", "OUT", "--worker-memory-gb", "0"], "must be above 0"),
    ],
)
def test_what_cannot_be_run_ends_with_2_and_leaves_nothing(
    source: Path,
    recipe: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    words: list[str],
    message: str,
) -> None:
    names = {"P": str(recipe), "SOURCE": str(source), "OUT": str(tmp_path / "out")}
    before = {path.name for path in tmp_path.iterdir()}
    given = [names.get(word, word) for word in words]
    assert main(["curate", *given, "--no-registry"]) == 2
    assert message in capsys.readouterr().err
    assert {path.name for path in tmp_path.iterdir()} == before


def test_evaluation_sets_need_a_stage_that_compares(
    source: Path, tools: SimpleNamespace, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    exams = tools.write_set(tmp_path / "exams", [tools.sample("e", 50)])
    recipe = tmp_path / "p.yaml"
    recipe.write_text("stages: [{type: picture_size}]\n")
    words = ["curate", str(recipe), str(source), "--out", str(tmp_path / "out")]
    assert main([*words, "--no-registry", "--against", str(exams)]) == 2
    assert "the pipeline has none; add for example" in capsys.readouterr().err


def test_ray_that_is_not_installed_is_named(
    source: Path,
    recipe: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(
        "carillon.engine.data.curate.ray_scorer.importlib.util.find_spec", lambda name: None
    )
    words = ["curate", str(recipe), str(source), "--out", str(tmp_path / "out"), "--ray", "local"]
    assert main(words) == 2
    assert 'pip install "carillon-engine[ray]"' in capsys.readouterr().err


def test_a_registry_that_cannot_be_used_is_told_before_the_work(
    source: Path, recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["curate", str(recipe), str(source), "--out", str(tmp_path / "out")]
    assert main([*words, "--registry", str(tmp_path / "absent" / "r.sqlite")]) == 2
    assert "has no folder" in capsys.readouterr().err
    assert list(tmp_path.glob("*out*")) == []


def test_stages_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["curate", "--stages"]) == 0
    said = capsys.readouterr().out
    assert "near_pictures: Keeps one of the pictures that show the same." in said


@pytest.mark.parametrize("limit_bytes", [4_200, 20_000])
def test_a_full_disk_ends_in_one_message_and_nothing_half(
    source: Path, recipe: Path, tmp_path: Path, limit_bytes: int
) -> None:
    """A limit of a file's size stands for the disk: at scores, and at the new version."""
    out = tmp_path / "out"
    command = [sys.executable, "-m", "carillon.engine.cli", "curate", str(recipe), str(source)]
    command += ["--out", str(out), "--no-registry", "--workers", "1"]

    def limited() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit_bytes, limit_bytes))

    done = subprocess.run(command, preexec_fn=limited, capture_output=True, text=True, check=False)
    assert done.returncode == 2, done.stderr
    assert "cannot be written: File too large" in done.stderr
    assert "Traceback" not in done.stderr
    assert not out.exists()
    assert [p.name for p in tmp_path.glob(".out.partial*")] == []
    assert list(tmp_path.glob(".out.curation-*/*.partial")) == []
    again = subprocess.run(command, capture_output=True, text=True, check=False)
    assert again.returncode == 0, again.stderr
    content = json.loads((out / "dataset.json").read_bytes())
    assert content["source"]["kept"] == 4
    assert list(tmp_path.glob(".out*")) == []
