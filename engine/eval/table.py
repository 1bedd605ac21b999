"""Prints evaluation results as tables: one per set and direction, a row per language.

Recall cells hold percent and the 95% interval; the chance columns say what a random ranking of the
same gallery gets. Left out: colours by quality, which would need a judgement.
"""

from collections.abc import Mapping
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from carillon.engine.eval.retrieval import NDCG_AT, RECALL_AT
from carillon.engine.eval.scoring import DIRECTIONS

_ARROWS = {"image_to_text": "image \u2192 text", "text_to_image": "text \u2192 image"}
# Wide enough for a row outside a terminal, where nobody can widen the window.
_WIDTH = 126


def print_tables(results: Mapping[str, Any], console: Console | None = None) -> None:
    """Print all tables of an `evaluate` result."""
    console = console or Console()
    if not console.is_terminal:
        console = Console(file=console.file, width=_WIDTH)
    for name, one in results["retrieval"].items():
        for direction in DIRECTIONS:
            console.print(retrieval_table(name, one, direction))
        if one["num_bad"]:
            console.print(f"{one['num_bad']} bad samples left out, first: {one['bad'][0]}")
    if results["zeroshot"]:
        console.print(zeroshot_table(results["zeroshot"]))
    for name, one in results["zeroshot"].items():
        classes = ", ".join(f"{c} {100 * value:.0f}%" for c, value in one["per_class"].items())
        console.print(f"{name} by class: {classes}", highlight=False, markup=False)


def retrieval_table(name: str, one: Mapping[str, Any], direction: str) -> Table:
    """Rows: languages, the mean of the core ones where there are any, and the mean of all."""
    title = f"{name} ({one['dataset']}: {one['split']}), {_ARROWS[direction]}"
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("language")
    recalls = (f"R@{k} % (95%)" for k in RECALL_AT)
    scores = ("MRR", f"nDCG@{NDCG_AT}", "chance@10", "x chance")
    for heading in ("queries", "gallery", *recalls, *scores):
        table.add_column(heading, justify="right")
    for language, directions in one["languages"].items():
        row = directions[direction]
        counts = [f"{row['num_queries']:,}", f"{row['num_gallery']:,}"]
        table.add_row(language, *counts, *_cells(row))
    table.add_section()
    if one["core_mean"] and len(one["core_languages"]) < len(one["languages"]):
        label = f"{len(one['core_languages'])} core"
        table.add_row(label, "", "", *_cells(one["core_mean"][direction]))
    label = f"mean of {len(one['languages'])}"
    table.add_row(label, "", "", *_cells(one["mean"][direction]))
    return table


def _cells(row: Mapping[str, Any]) -> list[str]:
    recalls = [_percent(row[f"r@{k}"]) for k in RECALL_AT]
    ten = row["r@10"]
    return [
        *recalls,
        f"{row['mrr']['value']:.3f}",
        f"{row[f'ndcg@{NDCG_AT}']['value']:.3f}",
        f"{100 * ten['chance']:.2f}%",
        f"{ten['times_chance']:.1f}",
    ]


def _percent(entry: Mapping[str, float]) -> str:
    value = f"{100 * entry['value']:.1f}"
    if "low" not in entry:
        return value
    return f"{value} ({100 * entry['low']:.1f}-{100 * entry['high']:.1f})"


def zeroshot_table(sets: Mapping[str, Any]) -> Table:
    """One row per zero-shot set."""
    table = Table(title="zero-shot classification", title_justify="left", box=box.SIMPLE_HEAD)
    for heading in ("set", "images", "classes", "top-1 % (95%)", "top-5 % (95%)", "chance"):
        table.add_column(heading, justify="left" if heading == "set" else "right")
    for name, one in sets.items():
        top5 = _percent(one["top5"]) if one["top5"] else "-"
        counts = [f"{one['num_images']:,}", str(one["num_classes"])]
        chance = f"{100 * one['top1']['chance']:.1f}%"
        table.add_row(name, *counts, _percent(one["top1"]), top5, chance)
    return table
