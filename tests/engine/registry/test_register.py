"""`carillon data register`: items one by one, taken up where a cut run stopped."""

import argparse
import hashlib
from pathlib import Path

import pytest
from sqlalchemy import select

from carillon.engine.cli import main
from carillon.engine.data.shards import Dataset
from carillon.engine.registry import register
from carillon.engine.registry.register import register_items
from carillon.engine.registry.store import Registry
from carillon.engine.registry.tables import DataItemRow


def test_items_have_checksum_language_and_captions(registry: Registry, dataset: Dataset) -> None:
    assert register_items(registry, dataset) == (6, 0)
    with registry.reading() as session:
        items = {row.uri: row for row in session.scalars(select(DataItemRow))}
        assert set(items) == {*(f"train/key{i}" for i in range(5)), "held_out/key5"}
        assert items["train/key3"].checksum == hashlib.sha256(b"xxxx").hexdigest()
        assert items["train/key3"].meta["captions"]["fr"] == ["texte 3"]
        assert items["train/key3"].language is None  # two languages
        assert items["held_out/key5"].language == "de"


def test_registering_again_goes_on_where_it_stopped(
    registry: Registry, dataset: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(register, "BATCH_ROWS", 2)
    whole, calls = register._write, 0

    def cut(*arguments: object) -> None:
        nonlocal calls
        calls += 1
        if calls == 2:
            raise KeyboardInterrupt
        whole(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(register, "_write", cut)
    with pytest.raises(KeyboardInterrupt):
        register_items(registry, dataset)
    assert register_items(registry, dataset) == (6, 0)
    assert register_items(registry, dataset) == (6, 0)


def test_damaged_sample_is_counted_and_left_out(registry: Registry, dataset: Dataset) -> None:
    shard = dataset.path / dataset.manifest.splits["train"].shards[0].file
    content = bytearray(shard.read_bytes())
    content[content.index(b"xxxxx")] = 0
    shard.write_bytes(content)
    assert register_items(registry, dataset) == (5, 1)


def test_command(dataset: Dataset, location: Path, capsys: pytest.CaptureFixture[str]) -> None:
    parser = argparse.ArgumentParser()
    register.add_arguments(parser)
    arguments = [str(dataset.path), "--registry", str(location)]
    assert register.main(parser.parse_args(arguments)) == 0
    assert f"fingerprint {dataset.fingerprint[:12]}" in capsys.readouterr().out
    assert register.main(parser.parse_args([*arguments, "--items"])) == 0
    assert "6 items registered, 0 unreadable" in capsys.readouterr().out


def test_the_folder_of_the_default_registry_is_made(
    dataset: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Other folders are not: they would be typing errors."""
    monkeypatch.chdir(tmp_path)
    assert main(["data", "register", str(dataset.path)]) == 0
    assert (tmp_path / "runs" / "registry.sqlite").is_file()
    assert main(["data", "register", str(dataset.path), "--registry", "absent/r.sqlite"]) == 2
    assert not (tmp_path / "absent").exists()
