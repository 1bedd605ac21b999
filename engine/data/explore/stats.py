"""`carillon data stats`: what is in a set, from its items tables, without reading its media.

Lengths of captions stand in no table: they are those of the JSON of at most so many samples, evenly
spread over the set. Memory: 24 bytes an item, for exact medians.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from carillon.engine.config import UserError
from carillon.engine.data.explore.item_tables import Shard, items_of, metas_of, shards_of
from carillon.engine.data.explore.terminal import print_tables, size, table
from carillon.engine.data.shards import Dataset, open_dataset

if TYPE_CHECKING:
    from rich.table import Table

CAPTION_SAMPLES = 10_000
UNSTATED = "unstated"
_MEASURES = ("size_bytes", "width", "height", "duration_s")

EXAMPLES = """examples:
  carillon data stats data/emoji
  carillon data stats data/emoji --json
  carillon data stats data/emoji --caption-samples 0      without the lengths of captions
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `carillon data stats`."""
    parser.add_argument("dataset", metavar="DATASET", help="a data set's folder")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument(
        "--caption-samples",
        type=int,
        default=CAPTION_SAMPLES,
        metavar="N",
        help=f"samples whose captions are measured (default {CAPTION_SAMPLES:,})",
    )


def main(args: argparse.Namespace) -> int:
    """Run `carillon data stats`. Raises UserError."""
    found = stats(open_dataset(args.dataset), caption_samples=args.caption_samples)
    if args.json:
        print(json.dumps(found, indent=1))
    else:
        print_tables(*_tables(found))
    return 0


def stats(dataset: Dataset, *, caption_samples: int = CAPTION_SAMPLES) -> dict[str, Any]:
    """Counts and distributions of a set. Raises UserError when a table cannot be read."""
    if caption_samples < 0:
        raise UserError(f"--caption-samples {caption_samples}: it must be 0 or more")
    counts = _Counts()
    for shard in shards_of(dataset):
        counts.add(shard, items_of(shard, _Counts.COLUMNS))
    return {
        "name": dataset.name,
        "fingerprint": dataset.fingerprint,
        "path": str(dataset.path),
        "num_samples": sum(len(split) for split in dataset.splits.values()),
        "unreadable": counts.unreadable,
        "splits": {
            name: {
                "samples": files.num_samples,
                "shards": len(files.shards),
                "size_bytes": sum(shard.size_bytes for shard in files.shards),
            }
            for name, files in dataset.manifest.splits.items()
        },
        "modalities": _by_count(counts.modalities),
        "languages": _by_count(counts.languages),
        "licences": _by_count(counts.licences),
        **{name: _distribution(np.concatenate(counts.measures[name])) for name in _MEASURES},
        "captions": _captions(dataset, caption_samples),
    }


class _Counts:
    """Sums over the shards."""

    COLUMNS = ("modalities", "languages", "licence", *_MEASURES)

    def __init__(self) -> None:
        self.modalities: Counter[str] = Counter()
        self.languages: Counter[str] = Counter()
        self.licences: Counter[str] = Counter()
        self.measures: dict[str, list[Any]] = {name: [np.zeros(0)] for name in _MEASURES}
        self.unreadable = 0

    def add(self, shard: Shard, items: pa.Table) -> None:
        unreadable = items["size_bytes"].null_count
        self.unreadable += unreadable
        self.modalities.update(_values(items["modalities"].combine_chunks().flatten()))
        self.languages.update(_values(items["languages"].combine_chunks().flatten()))
        self.licences.update(_values(items["licence"].drop_null()))
        self.licences[UNSTATED] += items["licence"].null_count - unreadable
        for name in _MEASURES:
            self.measures[name].append(items[name].drop_null().to_numpy().astype(np.float64))


def _values(column: pa.ChunkedArray) -> Mapping[str, int]:
    counted = column.value_counts()
    return {one["values"]: one["counts"] for one in counted.to_pylist()}


def _by_count(counts: Mapping[str, int]) -> dict[str, int]:
    held = [(name, num) for name, num in counts.items() if num]
    return dict(sorted(held, key=lambda pair: (-pair[1], pair[0])))


def _distribution(values: Any) -> dict[str, float] | None:
    if not len(values):
        return None
    low, median, high, most = np.percentile(values, (0, 50, 95, 100)).tolist()
    total = float(values.sum())
    numbers = {"min": low, "median": median, "p95": high, "max": most, "total": total}
    return {"items": len(values), **{name: round(number, 3) for name, number in numbers.items()}}


def _captions(dataset: Dataset, wanted: int) -> dict[str, Any]:
    """Lengths in characters by language, of samples at even distances."""
    lengths: dict[str, list[int]] = {}
    total = sum(len(split) for split in dataset.splits.values())
    chosen = np.unique(np.linspace(0, max(total - 1, 0), min(wanted, total), dtype=np.int64))
    begin = num_read = 0
    for shard in shards_of(dataset):
        end = begin + shard.files.num_samples
        here = chosen[(chosen >= begin) & (chosen < end)] - begin + shard.start
        for one in metas_of(shard, here.tolist()):
            num_read += one.error is None
            for language, texts in (one.meta.get("captions") or {}).items():
                lengths.setdefault(language, []).extend(map(len, texts))
        begin = end
    ordered = sorted(lengths.items(), key=lambda pair: (-len(pair[1]), pair[0]))
    measured = {language: _distribution(np.array(chars)) for language, chars in ordered}
    return {"samples_read": num_read, "characters": measured}


def _tables(found: Mapping[str, Any]) -> list[Table]:
    total = found["num_samples"]
    about = [("fingerprint", found["fingerprint"]), ("folder", found["path"])]
    about += [("samples", total)]
    if found["unreadable"]:
        about.append(("unreadable", found["unreadable"]))
    made = [
        table(f"data set {found['name']}", ("", ""), about),
        table(
            "splits",
            ("split", "samples", "shards", "size"),
            [
                (name, one["samples"], one["shards"], size(one["size_bytes"]))
                for name, one in found["splits"].items()
            ],
        ),
    ]
    for title, what in (("modalities", "modality"), ("languages", "language")):
        made.append(_share_table(title, what, found[title], total))
    made.append(_share_table("licences", "licence", found["licences"], total))
    measures = [(name, *found[name].values()) for name in _MEASURES if found[name]]
    columns = ("items", "min", "median", "p95", "max", "total")
    made.append(table("sizes and durations", ("", *columns), measures))
    captions = found["captions"]
    if captions["characters"]:
        title = f"characters of captions, in {captions['samples_read']:,} of {total:,} samples"
        rows = [(language, *one.values()) for language, one in captions["characters"].items()]
        made.append(table(title, ("language", "captions", *columns[1:]), rows))
    return made


def _share_table(title: str, what: str, counts: Mapping[str, int], total: int) -> Table:
    rows: Sequence[Sequence[object]] = [
        (name, num, f"{num / total:.1%}") for name, num in counts.items()
    ]
    return table(title, (what, "items", "share"), rows)
