"""`carillon ingest`: the command around ingest.py."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

from carillon.engine.config import UserError
from carillon.engine.data.fetch import USER_AGENT
from carillon.engine.data.ingest import MIN_JUDGED, ingest
from carillon.engine.data.ingest_items import Columns
from carillon.engine.data.ingest_loading import FetchOptions
from carillon.engine.data.ingest_options import IngestOptions
from carillon.engine.data.ingest_order import Pace
from carillon.engine.data.ingest_work import REJECTED_NAME
from carillon.engine.data.samples import UNKNOWN_LANGUAGE
from carillon.engine.registry.command import open_registry
from carillon.engine.registry.register import register_items

EXAMPLES = """examples:
  carillon ingest photos/ --out data/photos --language en --licence CC-BY-4.0
  carillon ingest pairs.csv --out data/pairs --validation-share 0.1
  carillon ingest urls.parquet --out data/web --max-bad-share 0.5 --per-host-per-second 2
  carillon ingest s3://bucket/talks --out data/talks --language en
  carillon ingest old-00.tar old-01.tar --out data/old
  carillon ingest t.tsv --out data/t --caption-column de=legende --caption-column fr=titre
a folder holds pictures, sounds and videos with the same name's .txt, .json, .srt or .vtt beside
them, or is a Hugging Face datasets folder; a table holds one row a text or a medium, with paths
relative to the table's own folder, or URLs. The same command goes on after a kill.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `carillon ingest`."""
    add = parser.add_argument
    add(
        "sources",
        nargs="+",
        metavar="SOURCE",
        help="folder, csv, tsv, jsonl, parquet, tar or datasets folder; a path, or s3://, gs://, "
        "az:// and https:// URLs",
    )
    add("--out", type=Path, required=True, metavar="DATASET", help="folder to write")
    add("--name", help="name of the set (default: the folder's)")
    _add_columns(add)
    add("--licence", help="licence of items that state none, as an SPDX name")
    add("--licence-source", metavar="TEXT", help="where that licence is stated: a URL, a file")
    add(
        "--validation-share",
        type=float,
        default=0.0,
        help="share held out as the split validation, by a hash of the key (default 0)",
    )
    add(
        "--max-bad-share",
        type=float,
        default=0.1,
        help=f"stop when more than this share is rejected, from {MIN_JUDGED:,} items on "
        "(default 0.1)",
    )
    add("--max-size", type=int, help="shrink pictures whose longer side has more pixels")
    add("--allow-outside", action="store_true", help="permit paths outside a source's folder")
    add(
        "--workers", type=int, default=os.cpu_count() or 1, help="processes (default: one per core)"
    )
    _add_fetching(add)
    add("--overwrite", action="store_true", help="replace an existing data set")
    add("--restart", action="store_true", help="begin anew where an unfinished ingest is kept")
    add(
        "--registry",
        metavar="LOCATION",
        help="enter the set and its items there: a SQLite file or postgresql+psycopg://...",
    )


def _add_columns(add: Any) -> None:
    add("--image-column", metavar="NAME", help="column with the path or URL of the medium")
    add(
        "--caption-column",
        action="append",
        default=[],
        metavar="[LANG=]NAME",
        help="column with captions, optionally with their language; may be repeated",
    )
    add(
        "--transcript-column",
        action="append",
        default=[],
        metavar="[LANG=]NAME",
        help="column with what is said in the sound, likewise",
    )
    add("--language-column", metavar="NAME", help="column with the texts' language")
    add(
        "--language",
        default=UNKNOWN_LANGUAGE,
        help="language of texts that state none (default und)",
    )


def _add_fetching(add: Any) -> None:
    add("--connections", type=int, default=32, help="items that are fetched at a time (default 32)")
    add("--per-host", type=int, default=8, help="of one host at a time (default 8)")
    add(
        "--per-host-per-second",
        type=float,
        default=10.0,
        metavar="N",
        help="requests to one host that start in a second (default 10)",
    )
    add(
        "--tries", type=int, default=4, help="times a URL is tried, with growing pauses (default 4)"
    )
    add(
        "--timeout", type=float, default=60.0, metavar="S", help="seconds for one item (default 60)"
    )
    add("--max-item-mb", type=int, default=256, help="largest item that is taken (default 256)")
    add("--user-agent", default=USER_AGENT, help="how servers are told who asks")
    add(
        "--allow-host",
        action="append",
        default=[],
        metavar="HOST",
        help="fetch from this host, address or network although it is inside; may be repeated",
    )


def main(args: argparse.Namespace) -> int:
    """Run `carillon ingest` and print what was taken. Raises UserError."""
    # Opened before the work, so that a registry that cannot be used costs none of it.
    registry = None if args.registry is None else open_registry(args.registry)
    dataset, num_rejected = ingest(
        args.sources,
        args.out,
        name=args.name,
        columns=Columns(
            image=args.image_column,
            captions=tuple(args.caption_column),
            transcripts=tuple(args.transcript_column),
            language=args.language_column,
            default_language=args.language,
        ),
        options=_options(args),
    )
    if registry is not None:
        register_items(registry, dataset)
    print(f"{dataset.path}  fingerprint {dataset.fingerprint[:16]}")
    for name, split in dataset.manifest.splits.items():
        kinds = ", ".join(f"{kind} {n:,}" for kind, n in sorted(split.modalities.items()))
        texts = ", ".join(f"{code} {n:,}" for code, n in sorted(split.languages.items()))
        print(f"  {name:12} {split.num_samples:7,} items: {kinds}; texts: {texts or 'none'}")
    if num_rejected:
        print(f"  {num_rejected:,} items were rejected: see {dataset.path / REJECTED_NAME}")
    return 0


def _options(args: argparse.Namespace) -> IngestOptions:
    if args.workers < 1:
        raise UserError(f"--workers {args.workers}: at least one process is needed")
    return IngestOptions(
        licence=args.licence,
        licence_source=args.licence_source,
        validation_share=args.validation_share,
        max_bad_share=args.max_bad_share,
        max_size=args.max_size,
        allow_outside=args.allow_outside,
        workers=args.workers,
        overwrite=args.overwrite,
        restart=args.restart,
        fetch=FetchOptions(
            allow_hosts=tuple(args.allow_host),
            user_agent=args.user_agent,
            timeout_s=args.timeout,
            tries=args.tries,
            max_item_bytes=args.max_item_mb << 20,
        ),
        pace=Pace(
            connections=args.connections,
            per_host=args.per_host,
            per_host_per_s=args.per_host_per_second,
        ),
    )
