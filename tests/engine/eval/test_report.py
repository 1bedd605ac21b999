"""loss.png and retrieval.png from real inputs."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from carillon.engine.config import UserError
from carillon.engine.eval.report import RetrievalPicture, draw_loss, read_metrics, retrieval_rows
from carillon.engine.eval.scoring import encode_set
from carillon.engine.eval.sets import RetrievalSetConfig
from carillon.engine.index.encoder import run_encoder
from carillon.engine.train.run import LoadedRun


def _metrics(path: Path, *, with_recall: bool) -> Path:
    lines = [{"step": s, "loss": 5.0 / s, "lr": 1e-3 * s} for s in range(1, 40)]
    if with_recall:
        for direction in ("image_to_text", "text_to_image"):
            lines += [
                {"step": s, f"retrieval/validation/{direction}/r@10": s / 50} for s in (10, 20)
            ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 41, "lo')
    return path


def test_metrics_are_read_by_name_and_a_cut_line_is_ignored(tmp_path: Path) -> None:
    series = read_metrics(_metrics(tmp_path / "metrics.jsonl", with_recall=True))
    assert series["loss"][0] == list(range(1, 40))
    assert series["loss"][1][:2] == [5.0, 2.5]
    assert series["retrieval/validation/image_to_text/r@10"] == ([10, 20], [0.2, 0.4])


def test_loss_png_has_a_panel_for_each_kind_of_number(tmp_path: Path) -> None:
    widths = []
    for with_recall in (False, True):
        metrics = _metrics(tmp_path / "metrics.jsonl", with_recall=with_recall)
        with Image.open(draw_loss(metrics, tmp_path / "loss.png")) as picture:
            pixels = np.asarray(picture.convert("RGB")).astype(int)
        widths.append(pixels.shape[1])
        assert (pixels.max(axis=2) - pixels.min(axis=2) > 60).sum() > 500  # coloured curves
    assert widths[1] == pytest.approx(1.5 * widths[0], rel=0.01)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["loss.png", "metrics.jsonl"]


def test_loss_png_without_a_loss_is_refused(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "lr": 0.1}\n')
    with pytest.raises(UserError, match="no loss yet"):
        draw_loss(tmp_path / "metrics.jsonl", tmp_path / "loss.png")


def test_retrieval_rows_show_the_best_pictures_and_mark_the_right_ones(run: LoadedRun) -> None:
    one = RetrievalSetConfig(split="shades", one_text_each=True)
    encoded = encode_set(run_encoder(run), one, run.config.data, seed=0)
    rows, left_out = retrieval_rows(encoded, one)
    assert not left_out
    assert [row.label for row in rows] == ["en", "fr"]
    for row in rows:
        scores = [found.score for found in row.found]
        assert scores == sorted(scores, reverse=True)
        assert len(scores) == 5
        assert [found.is_right for found in row.found] == [True, False, False, False, False]
    assert rows[0].found[0].caption == rows[0].query


def test_languages_without_a_font_are_named(
    run: LoadedRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from carillon.engine.eval import report

    monkeypatch.setattr(report, "is_covered", lambda text, folders: text.isascii())
    one = RetrievalSetConfig()
    encoded = encode_set(run_encoder(run), one, run.config.data, seed=0)
    picture = RetrievalPicture(tmp_path / "retrieval.png")
    picture.draw_first("validation", encoded, one)
    assert "leaves out ar" in picture.notes[0]
    assert picture.path.is_file()
