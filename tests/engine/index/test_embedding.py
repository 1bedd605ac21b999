"""`carillon embed` on a small run."""

from pathlib import Path

import numpy as np
import pytest
import torch

from carillon.engine.cli import main
from carillon.engine.data.shards import open_dataset
from carillon.engine.index.encoder import run_encoder
from carillon.engine.index.store import open_store
from carillon.engine.train.run import LoadedRun

# Opening a checkpoint without process groups is what these commands do; torch warns of it.
pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


def test_pictures_of_a_split(
    run: LoadedRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "pictures.zarr"
    assert main(["embed", str(run.path), "--out", str(out), "--batch-size", "3"]) == 0
    assert "16 image vectors of 16 dims" in capsys.readouterr().out
    store = open_store(out)
    dataset = open_dataset(run.config.data.path or "")
    split = dataset.splits["train"]
    assert store.strings("ids") == [split.key(row) for row in range(16)]
    assert store.attributes["data_fingerprint"] == dataset.fingerprint
    assert store.attributes["checkpoint_hash"] == run.checkpoint_hash
    assert store.attributes["normalised"] is True
    (block,) = store.blocks()
    (batch,) = run_encoder(run).pictures(split, range(16))
    np.testing.assert_allclose(block, batch.vectors.numpy(), atol=1e-5)


def test_captions_of_a_split(run: LoadedRun, tmp_path: Path) -> None:
    out = tmp_path / "texts.zarr"
    arguments = ["--modality", "text", "--split", "shades", "--out", str(out)]
    assert main(["embed", str(run.path), *arguments]) == 0
    store = open_store(out)
    assert len(store) == 8 * 3  # two English captions and a French one each
    captions, languages = store.strings("captions"), store.strings("languages")
    assert set(languages) == {"en", "fr"}
    place = captions.index("a blue square")
    assert (store.strings("ids")[place], languages[place]) == ("blue-shade", "en")
    (block,) = store.blocks()
    alone = run_encoder(run).texts(["a blue square"])[0]
    torch.testing.assert_close(torch.from_numpy(block[place]), alone, rtol=0, atol=1e-5)


def test_what_cannot_be_done_is_one_message(
    run: LoadedRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "taken").mkdir()
    for arguments, message in (
        (["--out", str(tmp_path / "taken")], "exists"),
        (["--split", "no"], "it has train, shades"),
        (["--batch-size", "0"], "at least 1"),
        (["--checkpoint", "7"], "give latest, best or one of the steps 150"),
        (["--data", str(tmp_path / "nowhere")], "nowhere"),
    ):
        assert main(["embed", str(run.path), *arguments]) == 2
        assert message in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["taken"]
