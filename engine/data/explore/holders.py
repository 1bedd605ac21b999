"""Which other sets of the registry still hold items that were erased from one.

Asked are the sets that it was made from and those made from it. An item is the same by its key or
by the bytes of its media.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from carillon.engine.config import UserError
from carillon.engine.data.explore.item_tables import items_of, shards_of
from carillon.engine.data.explore.selection import Found
from carillon.engine.data.shards import open_dataset
from carillon.engine.data.tombstones import NO_MEDIA_SHA256


def holders_of(
    lineage: Mapping[str, Any], new_fingerprint: str, items: Sequence[Found]
) -> list[dict[str, Any]]:
    """The related sets that hold some of the items, or of which nobody can say."""
    keys = {one.key for one in items}
    sums = {one.sha256 for one in items} - {"", NO_MEDIA_SHA256}
    found = []
    for relative in [*lineage["parents"], *lineage["children"]]:
        if relative["fingerprint"] == new_fingerprint:
            continue
        num_items, note = _held(relative, keys, sums)
        if num_items != 0:
            named = {name: relative[name] for name in ("name", "fingerprint", "folder")}
            found.append({**named, "num_items": num_items, "note": note})
    return found


def _held(relative: Mapping[str, Any], keys: set[str], sums: set[str]) -> tuple[int | None, str]:
    try:
        dataset = open_dataset(relative["folder"])
        if dataset.fingerprint != relative["fingerprint"]:
            return None, "another version stands in its folder"
        rows = (
            row
            for shard in shards_of(dataset)
            for row in items_of(shard, ("key", "sha256")).to_pylist()
        )
        return sum(row["key"] in keys or row["sha256"] in sums for row in rows), "holds them still"
    except UserError as error:
        return None, f"cannot be read: {error}"
