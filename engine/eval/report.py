"""The two pictures of a run: loss.png from metrics.jsonl, retrieval.png from an evaluated set.

retrieval.png is not a selection of good answers: language number n shows picture number n of the
set's fixed order. Languages are left out only where no font on the machine can draw their query.
Left out: live plots, for which TensorBoard is there.
"""

import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from carillon.engine.config import UserError
from carillon.engine.data.decode.image import decode_image
from carillon.engine.data.publish import publish_file
from carillon.engine.eval.fonts import is_covered
from carillon.engine.eval.picture import Found, Row, picture_grid
from carillon.engine.eval.retrieval import unit_rows
from carillon.engine.eval.scoring import EncodedSet, LanguageTask, language_task
from carillon.engine.eval.sets import RetrievalSetConfig

MAX_ROWS = 8
NUM_FOUND = 5


def read_metrics(path: str | Path) -> dict[str, tuple[list[int], list[float]]]:
    """Steps and values by name from metrics.jsonl; a last line cut short by a kill is ignored."""
    series: dict[str, tuple[list[int], list[float]]] = {}
    for line in Path(path).read_text(encoding="utf-8").splitlines(keepends=True):
        if not line.endswith("\n"):
            continue
        values = json.loads(line)
        step = int(values.pop("step"))
        for name, value in values.items():
            if isinstance(value, (int, float)):
                steps, numbers = series.setdefault(name, ([], []))
                steps.append(step)
                numbers.append(float(value))
    return series


def draw_loss(metrics: str | Path, path: str | Path) -> Path:
    """Draw losses, learning rate and, where there are any, retrieval means over steps.

    Raises: UserError when the metrics hold no loss, or the picture cannot be written.
    """
    series = read_metrics(metrics)
    if "loss" not in series:
        raise UserError(f"{metrics} holds no loss yet")
    recalls = {name: s for name, s in series.items() if name.endswith("/r@10")}
    losses = {"training": series["loss"]}
    if "validation/loss" in series:
        losses["held out"] = series["validation/loss"]
    panels: list[tuple[str, Mapping[str, Any]]] = [("loss", losses)]
    if "lr" in series:
        panels.append(("learning rate", {"lr": series["lr"]}))
    if recalls:
        panels.append(("recall at 10", {_label(name): s for name, s in recalls.items()}))
    return _draw_panels(panels, Path(path))


def _label(name: str) -> str:
    return name.removeprefix("retrieval/").removesuffix("/r@10").replace("_", " ")


def _draw_panels(panels: Sequence[tuple[str, Mapping[str, Any]]], path: Path) -> Path:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.2 * len(panels), 3.4), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, (title, lines) in zip(
        figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True
    ):
        for label, (steps, values) in lines.items():
            marker = "o" if len(steps) < 30 else ""
            axes.plot(steps, values, marker=marker, markersize=3, linewidth=1.4, label=label)
        axes.set_title(title, fontsize=10, loc="left")
        axes.set_xlabel("step", fontsize=9)
        axes.tick_params(labelsize=8)
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        if len(lines) > 1:
            axes.legend(fontsize=7, frameon=False)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=150)
    publish_file(path, buffer.getvalue())
    return path


class RetrievalPicture:
    """Draws the first set that an evaluation hands it, and keeps what the user should be told."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.notes: list[str] = []

    def draw_first(self, name: str, encoded: EncodedSet, one: RetrievalSetConfig) -> None:
        if self.notes:
            return
        rows, left_out = retrieval_rows(encoded, one)
        if left_out:
            self.notes.append(
                f"retrieval.png leaves out {', '.join(left_out)}: no font here draws them "
                "(on Debian, fonts-noto-core and fonts-noto-cjk do)"
            )
        if rows:
            picture_grid(self.path, rows, f"{name}: the first {NUM_FOUND} of each query")
            self.notes.append(f"queries and what they found: {self.path}")


def retrieval_rows(
    encoded: EncodedSet, one: RetrievalSetConfig, font_folders: Sequence[str | Path] = ()
) -> tuple[list[Row], list[str]]:
    """Rows for a picture grid, core languages first, and the languages without a font."""
    languages = list(encoded.chosen.by_language)
    ordered = sorted(languages, key=lambda code: (code not in one.core_languages, code))
    rows: list[Row] = []
    left_out: list[str] = []
    for language in ordered:
        if len(rows) == MAX_ROWS:
            break
        task = language_task(encoded, language, one.one_text_each)
        number = len(rows) % len(task.texts)
        if is_covered(task.texts[number], font_folders):
            rows.append(_row(encoded, task, number, language))
        else:
            left_out.append(language)
    return rows, left_out


def _row(encoded: EncodedSet, task: LanguageTask, number: int, language: str) -> Row:
    text = task.texts[number]
    vector = encoded.texts[[encoded.text_place[text]]]
    gallery = encoded.pictures[[encoded.place[i] for i in task.items]]
    scores = (unit_rows(vector, "queries") @ unit_rows(gallery, "gallery").T)[0]
    best = scores.topk(min(NUM_FOUND, len(scores)))
    found = [
        Found(
            image=_pixels(encoded, task.items[place]),
            score=score,
            caption=encoded.chosen.items[task.items[place]].captions[language][0],
            is_right=bool(task.picture_groups[place] == task.text_groups[number]),
        )
        for score, place in zip(best.values.tolist(), best.indices.tolist(), strict=True)
    ]
    return Row(text, found, language)


def _pixels(encoded: EncodedSet, item: int) -> np.ndarray:
    media = encoded.chosen.split.read(encoded.chosen.items[item].row).medium("image")
    return decode_image(media, min_side=256)
