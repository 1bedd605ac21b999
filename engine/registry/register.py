"""`carillon data register`: a data set's row, and on request one row per item.

Items are asked for by name, since a set may have a billion.
Rows are written in batches, a transaction each, in the order of the shards; memory stays flat. A
run that is cut short is taken up where it stopped: rows that are there are not written again.
An item's checksum is that of items.py, so every byte is read once.
"""

import argparse
from collections.abc import Iterator, Mapping
from itertools import islice
from typing import Any

from sqlalchemy import func, insert, select

from carillon.engine.data.items import media_sha256, modalities_of
from carillon.engine.data.samples import SampleError
from carillon.engine.data.shards import Dataset, Split, open_dataset
from carillon.engine.registry.command import add_registry, open_registry
from carillon.engine.registry.store import Registry, storable
from carillon.engine.registry.tables import DataItemRow, utc_now

BATCH_ROWS = 1000

EXAMPLES = """examples:
  carillon data register data/emoji               one row for the set, its shards in it
  carillon data register data/emoji --items       and one row per item
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `carillon data register`."""
    add_registry(parser)
    parser.add_argument("dataset", metavar="DATASET", help="a data set's folder")
    parser.add_argument("--items", action="store_true", help="one row per item as well")


def main(args: argparse.Namespace) -> int:
    """Runs `carillon data register`; raises RegistryError."""
    dataset = open_dataset(args.dataset)
    registry = open_registry(args.registry)
    registry.record_dataset(dataset)
    print(f"{dataset.name}: registered, fingerprint {dataset.fingerprint[:12]}")
    if args.items:
        rows, bad = register_items(registry, dataset)
        print(f"{rows:,} items registered, {bad:,} unreadable samples left out")
    return 0


def register_items(registry: Registry, dataset: Dataset) -> tuple[int, int]:
    """Writes one row per readable sample; returns (rows of the set, samples that were bad).

    Raises:
        RegistryError: the registry cannot be written; whole batches written so far stay.
    """
    dataset_id = registry.record_dataset(dataset)
    counter = {"bad": 0}
    items = (
        item
        for name, split in dataset.splits.items()
        for item in _items(dataset_id, name, split, counter)
    )
    while batch := list(islice(items, BATCH_ROWS)):
        _write(registry, dataset_id, batch)
    with registry.reading() as session:
        count = session.scalar(
            select(func.count())
            .select_from(DataItemRow)
            .where(DataItemRow.dataset_id == dataset_id)
        )
    return count or 0, counter["bad"]


def _write(registry: Registry, dataset_id: int, batch: list[dict[str, Any]]) -> None:
    with registry.writing() as session:
        uris = [item["uri"] for item in batch]
        there = set(
            session.scalars(
                select(DataItemRow.uri)
                .where(DataItemRow.dataset_id == dataset_id)
                .where(DataItemRow.uri.in_(uris))
            )
        )
        missing = [item for item in batch if item["uri"] not in there]
        if missing:
            session.execute(insert(DataItemRow), missing)


def _items(
    dataset_id: int, split_name: str, split: Split, counter: dict[str, int]
) -> Iterator[dict[str, Any]]:
    for row in range(len(split)):
        try:
            sample = split.read(row)
        except SampleError:
            counter["bad"] += 1
            continue
        yield {
            "dataset_id": dataset_id,
            "uri": f"{split_name}/{sample.key}",
            "modality": "-".join(modalities_of(sample.members, sample.meta)),
            "language": only_language(sample.meta),
            "checksum": media_sha256(sample.members),
            "created_at": utc_now(),
            "meta": storable(sample.meta),
        }


def only_language(meta: Mapping[str, Any]) -> str | None:
    """The language of an item's captions; none where they have several, all stand in `meta`."""
    languages = list(meta.get("captions", {}))
    return languages[0] if len(languages) == 1 else None
