"""`carillon data diff`: what differs between two versions of a set.

Items are matched by key. The media are compared by the SHA-256 of the items tables, the text beside
them by the checksum that the index holds of the whole sample: nothing of the shards is read.
Memory: some 200 bytes an item of both versions. Left out: items that changed their key.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from carillon.engine.data.explore.item_tables import Shard, items_of, shards_of
from carillon.engine.data.explore.stats import stats
from carillon.engine.data.explore.terminal import print_tables, table
from carillon.engine.data.shard_index import IndexReader
from carillon.engine.data.shards import Dataset, open_dataset

if TYPE_CHECKING:
    from rich.table import Table

SHOWN_KEYS = 20
CHANGES = ("added", "removed", "media", "text", "split")

EXAMPLES = """examples:
  carillon data diff data/photos data/photos-2
  carillon data diff data/photos data/photos-2 --json     with all keys
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `carillon data diff`."""
    parser.add_argument("before", metavar="BEFORE", help="a data set's folder")
    parser.add_argument("after", metavar="AFTER", help="the other version's folder")
    parser.add_argument("--json", action="store_true", help="print JSON, with all keys")
    parser.add_argument(
        "--keys",
        type=int,
        default=SHOWN_KEYS,
        metavar="N",
        help=f"keys shown of each change (default {SHOWN_KEYS})",
    )


def main(args: argparse.Namespace) -> int:
    """Run `carillon data diff`. Raises UserError."""
    found = diff(open_dataset(args.before), open_dataset(args.after))
    if args.json:
        print(json.dumps(found, indent=1))
    else:
        print_tables(*_tables(found, max(args.keys, 0)))
    return 0


def diff(before: Dataset, after: Dataset) -> dict[str, Any]:
    """The keys of each change, sorted, and counts before and after.

    Raises UserError when a table or index cannot be read.
    """
    joined = _identities(before).join(
        _identities(after), "key", join_type="full outer", right_suffix="_after"
    )
    is_new, is_gone = pc.is_null(joined["split"]), pc.is_null(joined["split_after"])
    both = pc.invert(pc.or_(is_new, is_gone))
    same_media = pc.equal(joined["sha256"], joined["sha256_after"])
    same_sample = pc.equal(joined["crc32"], joined["crc32_after"])
    moved = pc.not_equal(joined["split"], joined["split_after"])
    masks = {
        "added": is_new,
        "removed": is_gone,
        "media": pc.and_(both, pc.invert(same_media)),
        "text": pc.and_(both, pc.and_(same_media, pc.invert(same_sample))),
        "split": pc.and_(both, moved),
    }
    keys = {name: sorted(joined["key"].filter(mask).to_pylist()) for name, mask in masks.items()}
    changed = {*keys["media"], *keys["text"], *keys["split"]}
    was, now = stats(before, caption_samples=0), stats(after, caption_samples=0)
    return {
        "before": _named(before),
        "after": _named(after),
        "unchanged": int(pc.sum(both).as_py() or 0) - len(changed),
        "counts": {name: len(listed) for name, listed in keys.items()},
        "keys": keys,
        "languages": _compared(was["languages"], now["languages"]),
        "licences": _compared(was["licences"], now["licences"]),
        "modalities": _compared(was["modalities"], now["modalities"]),
    }


def _named(dataset: Dataset) -> dict[str, Any]:
    num_samples = sum(len(split) for split in dataset.splits.values())
    return {
        "name": dataset.name,
        "fingerprint": dataset.fingerprint,
        "path": str(dataset.path),
        "num_samples": num_samples,
    }


def _identities(dataset: Dataset) -> pa.Table:
    """Key, split, SHA-256 of the media and checksum of the whole sample of every item."""
    parts = []
    for shard in shards_of(dataset):
        items = items_of(shard, ("key", "sha256"))
        names = pa.array([shard.split] * items.num_rows, pa.string())
        # Of an unreadable sample nothing is known: it equals none.
        known = pc.coalesce(items["sha256"], pa.scalar(""))
        parts.append(
            pa.table(
                {"key": items["key"], "split": names, "sha256": known, "crc32": _checksums(shard)}
            )
        )
    return pa.concat_tables(parts)


def _checksums(shard: Shard) -> pa.Array:
    """Of a plain tar, whose index lies elsewhere, of the JSON and the members' names."""
    if shard.files.items is None:
        return pa.array(_read_checksums(shard), pa.int64())
    index = IndexReader(
        shard.dataset.path / shard.files.index,
        num_rows=shard.files.num_samples,
        shard_size_bytes=shard.files.size_bytes,
    )
    found = np.fromiter(
        (index.row(row).crc32 for row in range(shard.files.num_samples)), dtype=np.int64
    )
    return pa.array(found)


def _read_checksums(shard: Shard) -> list[int]:
    import zlib

    from carillon.engine.data.explore.item_tables import metas_of

    rows = range(shard.start, shard.start + shard.files.num_samples)
    said = (
        json.dumps([one.members, one.meta, one.error], sort_keys=True)
        for one in metas_of(shard, rows)
    )
    return [zlib.crc32(text.encode("utf-8", "surrogatepass")) for text in said]


def _compared(before: Mapping[str, int], after: Mapping[str, int]) -> dict[str, list[int]]:
    names = sorted({*before, *after}, key=lambda name: (-before.get(name, 0), name))
    return {name: [before.get(name, 0), after.get(name, 0)] for name in names}


def _tables(found: Mapping[str, Any], num_keys: int) -> list[Table]:
    before, after = found["before"], found["after"]
    sides = [
        (side, one["name"], one["num_samples"], one["fingerprint"][:16], one["path"])
        for side, one in (("before", before), ("after", after))
    ]
    rows: list[tuple[object, ...]] = [("unchanged", found["unchanged"], "")]
    titles = {"media": "other media", "text": "other text", "split": "other split"}
    for name in CHANGES:
        keys = found["keys"][name]
        listed = ", ".join(keys[:num_keys]) + (", ..." if len(keys) > num_keys else "")
        rows.append((titles.get(name, name), len(keys), listed))
    made = [
        table("versions", ("", "name", "items", "fingerprint", "folder"), sides),
        table("items", ("", "items", "keys"), rows),
    ]
    for title, what in (
        ("languages", "language"),
        ("licences", "licence"),
        ("modalities", "modality"),
    ):
        counts = [(name, was, now, now - was) for name, (was, now) in found[title].items()]
        made.append(table(title, (what, "items before", "after", "change"), counts))
    return made
