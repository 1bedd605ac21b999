"""`carillon data show`: items of a set as a page, HTML or PNG by the name of the file.

Which: rows or keys that are named, or so many of those that fit the conditions, drawn by a seed, so
that the same command shows the same items. A damaged item is shown with its reason.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from carillon.engine.config import UserError
from carillon.engine.data.explore.cards import Card, card_of
from carillon.engine.data.explore.selection import keyed, parse_conditions, select
from carillon.engine.data.publish import publish_file
from carillon.engine.data.shards import Dataset, open_dataset
from carillon.engine.eval.text_layout import shown

DEFAULT_NUM, MAX_NUM, MAX_NUM_PNG = 24, 1000, 200

EXAMPLES = """examples:
  carillon data show data/emoji --out emoji.html
  carillon data show data/emoji --out emoji.png --num 12 --languages en,ar,ja
  carillon data show data/emoji --out dogs.html --where text~dog --where language=fr
  carillon data show data/emoji --out some.png --split train --rows 0-5,17
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `carillon data show`."""
    add = parser.add_argument
    add("dataset", metavar="DATASET", help="a data set's folder, or plain tars")
    add("--out", type=Path, required=True, metavar="FILE", help="page to write, .html or .png")
    add("--key", action="append", default=[], metavar="KEY", help="show this item (repeatable)")
    add("--rows", metavar="ROWS", help="rows of a split, such as 0-5,17")
    add("--split", help="the split of --rows, or the only one to draw from")
    add(
        "--where",
        action="append",
        default=[],
        metavar="FIELD=VALUE",
        help="only items of which this holds: =, !=, ~ (contains), <, <=, >, >= (repeatable)",
    )
    add("--num", type=int, default=DEFAULT_NUM, help=f"how many (default {DEFAULT_NUM})")
    add("--seed", type=int, default=0, help="draws other ones (default 0)")
    add("--languages", metavar="LIST", help="show texts in these languages alone, such as en,fr")
    add("--columns", type=int, default=4, help="columns of a PNG (default 4)")


def main(args: argparse.Namespace) -> int:
    """Run `carillon data show`. Raises UserError."""
    if args.out.suffix.lower() not in (".html", ".png"):
        raise UserError(f"--out {args.out}: name a file that ends in .html or .png")
    for option, value, most in (("num", args.num, MAX_NUM), ("columns", args.columns, 20)):
        if not 1 <= value <= most:
            raise UserError(f"--{option} {value}: 1 to {most:,} are allowed")
    dataset = open_dataset(args.dataset)
    places, how = _chosen(args, dataset)
    if args.out.suffix.lower() == ".png" and len(places) > MAX_NUM_PNG:
        raise UserError(f"{len(places):,} items: a PNG has at most {MAX_NUM_PNG}; name an .html")
    languages = [name for name in (args.languages or "").split(",") if name]
    cards = [card_of(dataset, split, row, languages) for split, row in places]
    total = sum(len(split) for split in dataset.splits.values())
    about = f"{len(cards):,} of {total:,} items, {how}; fingerprint {dataset.fingerprint[:16]}"
    missing = _write(args.out, dataset.name, about, cards, args.columns)
    damaged = sum(card.error is not None for card in cards)
    print(f"{args.out}: {shown(about)}" + (f"; {damaged:,} cannot be read" if damaged else ""))
    if missing:
        print(
            f"no font of this machine draws {missing:,} of the page's characters: install one "
            "(Noto Sans has every script), or give an .html file"
        )
    return 0


def _write(out: Path, name: str, about: str, cards: Sequence[Card], columns: int) -> int:
    """Write the page; returns how many characters could not be drawn."""
    if out.suffix.lower() == ".png":
        from carillon.engine.data.explore.png_page import png_page

        page = png_page(name, about, cards, columns=columns)
        publish_file(out, page.png, parents=True)
        return len(page.missing)
    from carillon.engine.data.explore.html_page import html_page

    publish_file(out, html_page(name, about, cards), parents=True)
    return 0


def _chosen(args: argparse.Namespace, dataset: Dataset) -> tuple[list[tuple[str, int]], str]:
    """Splits and rows, and how they were chosen."""
    if sum(map(bool, (args.key, args.rows, args.where))) > 1:
        raise UserError("give one of --key, --rows and --where")
    if args.split is not None and args.split not in dataset.splits:
        raise UserError(f"--split {args.split}: the set has {', '.join(dataset.splits)}")
    if args.key:
        found = keyed(dataset, args.key)
        return [(one.split, one.row) for one in found], "by key"
    if args.rows:
        split = args.split or next(iter(dataset.splits))
        rows = _rows(args.rows, len(dataset.splits[split]))
        return [(split, row) for row in rows], f"rows {args.rows} of {split}"
    if args.where:
        only = [f"split={args.split}"] if args.split else []
        fitting = select(dataset, parse_conditions([*args.where, *only])).found
        if not fitting:
            raise UserError(f"no item of {dataset.path} fits {' and '.join(args.where)}")
        chosen = _drawn(len(fitting), args.num, args.seed)
        how = f"of {len(fitting):,} with {' and '.join(args.where)}"
        return [(fitting[i].split, fitting[i].row) for i in chosen], how
    names = [args.split] if args.split else list(dataset.splits)
    ends = np.cumsum([len(dataset.splits[name]) for name in names])
    places = []
    for row in _drawn(int(ends[-1]), args.num, args.seed):
        number = int(np.searchsorted(ends, row, side="right"))
        places.append((names[number], row - (int(ends[number - 1]) if number else 0)))
    return places, f"drawn by seed {args.seed}"


def _drawn(total: int, num: int, seed: int) -> list[int]:
    """`num` different numbers below `total` in order, without a table of all of them."""
    if seed < 0:
        raise UserError(f"--seed {seed}: it must be 0 or more")
    generator = np.random.default_rng(seed)
    if total <= 4 * num:
        return sorted(generator.permutation(total)[:num].tolist())
    drawn: dict[int, None] = {}
    while len(drawn) < num:
        drawn.setdefault(int(generator.integers(total)))
    return sorted(drawn)


def _rows(text: str, length: int) -> list[int]:
    rows: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d{1,18})(?:-(\d{1,18}))?\s*", part)
        if match is None:
            raise UserError(f"--rows {text}: give rows and ranges, such as 0-5,17")
        first, last = int(match[1]), int(match[2] or match[1])
        if not first <= last < length:
            raise UserError(f"--rows {text}: the split has rows 0 to {length - 1:,}")
        if last - first + len(rows) >= MAX_NUM:
            raise UserError(f"--rows {text}: at most {MAX_NUM:,} items make a page")
        rows += range(first, last + 1)
    return rows
