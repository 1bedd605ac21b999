"""Draws the kernels' results: one picture an operator, time and extra memory over size.

`python benchmarks/plots.py` reads benchmarks/results and writes a PNG beside each JSON. Both axes
are logarithmic. Ours is the thick line; colours are Okabe and Ito's, which differ for the
colour-blind too, and each peer has a marker of its own.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, FixedLocator, LogLocator, NullLocator
from table import RESULTS, read

COLOURS = ("#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#0072B2")
MARKERS = ("s", "^", "D", "v", "P", "X")
SMALLEST_MB = 0.1  # what is less cannot be told from nothing
Row = dict[str, Any]


def draw(op: str, result: dict[str, Any]) -> Figure:
    """A column a case; below each other the times of the passes and the memory of the last.

    A case or a pass that was measured at one size only is left to the table.
    """
    rows = result["rows"]
    cases = [name for name in _each(rows, "case") if len(_each(rows, "size", case=name)) > 1]
    passes = sorted(
        {
            name
            for name in _each(rows, "pass")
            if any(len(_each(rows, "size", case=case, **{"pass": name})) > 1 for case in cases)
        },
        key=len,
    )
    peers = list(dict.fromkeys(peer for row in rows for peer in row["ratio"]))
    height, width = len(passes) + 1, len(cases)
    size = (3.6 * width, 2.6 * height + 1)
    figure, axes = plt.subplots(height, width, figsize=size, squeeze=False, sharex="col")
    for column, case in enumerate(cases):
        of_case = [row for row in rows if row["case"] == case]
        axes[0][column].set_title(case, fontsize=11)
        for axis, name in zip(axes[:-1, column], passes, strict=True):
            _lines(axis, [row for row in of_case if row["pass"] == name], peers, "seconds")
        last = [row for row in of_case if row["pass"] == passes[-1]]
        _lines(axes[-1][column], last, peers, "extra_mb")
        _name_sizes(axes[-1][column], sorted({row["size"] for row in of_case}))
        axes[-1][column].set_xlabel(of_case[0]["unit"])
    for axis, name in zip(axes[:, 0], passes, strict=False):
        axis.set_ylabel(f"time, {name}")
    axes[-1][0].set_ylabel(f"extra memory (MiB),\n{passes[-1]}")
    _say_around(figure, op, result)
    figure.tight_layout(rect=(0, 0.02, 1, 1 - 0.4 / figure.get_figheight()))
    return figure


def _each(rows: Sequence[Row], key: str, **wanted: str) -> list[Any]:
    """The values of a key, each once, among the rows that have what is wanted."""
    chosen = (row for row in rows if all(row[name] == value for name, value in wanted.items()))
    return list(dict.fromkeys(row[key] for row in chosen))


def _lines(axis: Axes, rows: Sequence[Row], peers: Sequence[str], what: str) -> None:
    axis.set_xscale("log", base=2)
    axis.set_yscale("log")
    for index, name in enumerate(["ours", *peers]):
        points = sorted((row["size"], row[what][name]) for row in rows if name in row[what])
        if not points:
            continue
        sizes, values = zip(*points, strict=True)
        if what == "extra_mb":
            values = tuple(max(value, SMALLEST_MB) for value in values)
        ours = name == "ours"
        axis.plot(
            sizes,
            values,
            label=name,
            color="black" if ours else COLOURS[index - 1],
            marker="o" if ours else MARKERS[index - 1],
            linewidth=3 if ours else 1.4,
            markersize=7 if ours else 5,
            zorder=3 if ours else 2,
        )
    if not axis.lines:
        axis.text(0.5, 0.5, "not measured", ha="center", transform=axis.transAxes, color="#555555")
        axis.yaxis.set_major_locator(NullLocator())
    else:
        low, high = axis.get_ylim()
        widen = max(1.0, (10 / (high / low)) ** 0.5)  # at least a decade: small differences look so
        low, high = axis.set_ylim(low / widen, high * widen)
        steps = (1.0,) if high / low > 100 else (1.0, 2.0, 5.0)
        axis.yaxis.set_major_locator(LogLocator(subs=steps))
    axis.yaxis.set_minor_locator(NullLocator())
    axis.yaxis.set_major_formatter(EngFormatter("s") if what == "seconds" else "{x:,g}")
    axis.grid(True, which="major", color="#dddddd", linewidth=0.8)


def _name_sizes(axis: Axes, sizes: Sequence[int]) -> None:
    axis.xaxis.set_major_locator(FixedLocator(sizes))
    axis.xaxis.set_minor_locator(NullLocator())
    crowded = len(sizes) > 4
    axis.set_xticks(sizes, [f"{size:,}" for size in sizes], rotation=30 if crowded else 0)


def _say_around(figure: Figure, op: str, result: dict[str, Any]) -> None:
    """The title, the legend, and where and when it was measured."""
    handles: dict[str, Any] = {}
    for axis in figure.axes:
        drawn, texts = axis.get_legend_handles_labels()
        handles |= dict(zip(texts, drawn, strict=True))
    figure.legend(handles.values(), handles.keys(), loc="upper center", ncols=8, frameon=False)
    figure.text(0.01, 0.99, op, va="top", fontsize=13, weight="bold")
    hardware, threads = result["hardware"], result["rows"][0]["num_threads"]
    where = f"{hardware['cpu']}, {threads} of {hardware['cores']} cores"
    what = f"torch {result['versions']['torch']}, {result['date']}, commit {result['commit'][:7]}"
    figure.text(0.995, 0.005, f"{where}, {what}", ha="right", fontsize=8, color="#555555")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the JSON files")
    results = parser.parse_args().results
    for op, result in read(results).items():
        draw(op, result).savefig(results / f"{op}.png", dpi=110)
        print(results / f"{op}.png")


if __name__ == "__main__":
    main()
