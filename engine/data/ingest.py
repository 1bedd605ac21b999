"""`carillon ingest`: media and their texts from anywhere into a data set of tar shards.

Sources are read as streams in a fixed order (ingest_sources.py), many items are loaded at a time
(ingest_order.py), and results are written in the order of the sources, so the same input gives the
same bytes. Media are looked into in processes of their own and stored with their original bytes,
unless a picture is larger than --max-size. Keys follow from the source's name and the path inside
it, so they do not change when a folder moves or other items join; the validation split is a hash of
the key. What cannot be used is listed with its reason in rejected.jsonl. An ingest that was killed
goes on by the same command (ingest_work.py).
Left out: finding duplicates and filtering, which is curation.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from carillon.engine.config import UserError
from carillon.engine.data.fetch import USER_AGENT, Fetcher
from carillon.engine.data.ingest_inspection import Inspectors
from carillon.engine.data.ingest_items import Columns, Entry, Item, check_language
from carillon.engine.data.ingest_loading import FetchOptions, Loaded, Loader
from carillon.engine.data.ingest_order import Pace, in_order
from carillon.engine.data.ingest_sources import read_source, source_name, source_version
from carillon.engine.data.ingest_work import REJECTED_NAME, Work
from carillon.engine.data.publish import check_target
from carillon.engine.data.samples import UNKNOWN_LANGUAGE
from carillon.engine.data.shard_writer import DEFAULT_SHARD_BYTES, is_data_set
from carillon.engine.data.shards import Dataset, SampleError, ShardWriter, open_dataset
from carillon.engine.data.store import is_remote

if TYPE_CHECKING:
    from rich.progress import Progress

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

_MIN_JUDGED = 1000  # entries, rejected ones included, before --max-bad-share is judged on the way
_SAVE_EVERY_S = 10.0


@dataclass(frozen=True, kw_only=True)
class IngestOptions:
    """What to do with the items once they are read; `workers` of 0 looks into media in-process."""

    licence: str | None = None
    licence_source: str | None = None
    validation_share: float = 0.0
    max_bad_share: float = 0.1
    max_size: int | None = None
    max_shard_bytes: int = DEFAULT_SHARD_BYTES
    allow_outside: bool = False
    workers: int = 0
    overwrite: bool = False
    restart: bool = False
    save_every_s: float = _SAVE_EVERY_S
    fetch: FetchOptions = field(default_factory=FetchOptions)
    pace: Pace = field(default_factory=Pace)


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
        help=f"stop when more than this share is rejected, from {_MIN_JUDGED:,} items on "
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
    if args.registry is not None:
        _register(dataset, args.registry)
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


def _register(dataset: Dataset, location: str) -> None:
    from carillon.engine.registry.register import register_items
    from carillon.engine.registry.store import Registry

    register_items(Registry.open(location), dataset)


def ingest(
    sources: Sequence[str],
    out: Path,
    *,
    name: str | None = None,
    columns: Columns | None = None,
    options: IngestOptions | None = None,
) -> tuple[Dataset, int]:
    """Build a data set from `sources`; returns it and the number of rejected items.

    Raises UserError for sources that cannot be read, bad options, too many bad items, or an `out`
    that exists or cannot be written. What took more than seconds is kept, and the same call goes
    on from it.
    """
    options = options or IngestOptions()
    columns = columns or Columns()
    _check(options, columns)
    _check_apart(out, sources)
    check_target(out, "data set", is_data_set, overwrite=options.overwrite)
    with Work(out, _same_bytes(sources, columns, options), restart=options.restart) as work:
        source = {
            "kind": "ingest",
            "sources": [source_name(given) for given in sources],
            "validation_share": options.validation_share,
            "max_size": options.max_size,
        }
        with ShardWriter(
            out,
            name=name or out.absolute().name,
            source=source,
            max_shard_bytes=options.max_shard_bytes,
            overwrite=options.overwrite,
            work=work.set_folder,
            saved=work.saved_writer,
        ) as writer:
            _fill(writer, work, sources, columns, options)
            if work.num_rejected:
                writer.attach(REJECTED_NAME, work.rejections())
        num_rejected = work.num_rejected
    return open_dataset(out), num_rejected


def _fill(
    writer: ShardWriter,
    work: Work,
    sources: Sequence[str],
    columns: Columns,
    options: IngestOptions,
) -> None:
    """Write what the sources hold; whatever stops it, what is done is kept."""
    entries = work.pending(_entries(sources, columns, options, work.scratch))
    inspectors = Inspectors(options.workers)
    loader = Loader(
        options.fetch,
        inspectors,
        max_size=options.max_size,
        default_language=columns.default_language,
    )
    results = in_order(entries, loader.load, options.pace)
    saved_s = time.monotonic()
    try:
        with _progress(work) as progress:
            for entry, result in results:
                reason = (
                    result if isinstance(result, str) else _store(writer, entry, result, options)
                )
                work.take(entry, reason)
                if time.monotonic() - saved_s >= options.save_every_s:
                    work.save(writer.save())
                    saved_s = time.monotonic()
                _judge(work, options, at_end=False)
                _show(progress, work)
        _judge(work, options, at_end=True)
    finally:
        results.close()
        inspectors.close()
        if work.is_kept and work.num_done > work.num_resumed:
            work.save(writer.save())


def _same_bytes(sources: Sequence[str], columns: Columns, options: IngestOptions) -> dict[str, Any]:
    """All that the bytes of the set follow from, by the name that a message gives it."""
    return {
        "the sources": [source_version(given) for given in sources],
        "--image-column": columns.image,
        "--caption-column": columns.captions,
        "--transcript-column": columns.transcripts,
        "--language-column": columns.language,
        "--language": columns.default_language,
        "--licence": options.licence,
        "--licence-source": options.licence_source,
        "--validation-share": options.validation_share,
        "--max-size": options.max_size,
        "--max-item-mb": options.fetch.max_item_bytes / 2**20,
        "--allow-outside": options.allow_outside,
        "the size of shards": options.max_shard_bytes,
    }


def _check(options: IngestOptions, columns: Columns) -> None:
    for flag, share in (
        ("--validation-share", options.validation_share),
        ("--max-bad-share", options.max_bad_share),
    ):
        if not 0 <= share <= 1:
            raise UserError(f"{flag} {share} is out of range; 0 to 1 is allowed")
    if options.max_size is not None and options.max_size < 1:
        raise UserError(f"--max-size {options.max_size}: at least one pixel is needed")
    pace, fetch = options.pace, options.fetch
    for flag, number, most in (
        ("--connections", pace.connections, 1024),
        ("--per-host", pace.per_host, 1024),
        ("--per-host-per-second", pace.per_host_per_s, 100_000),
        ("--tries", fetch.tries, 100),
        ("--timeout", fetch.timeout_s, 86_400),
        ("--max-item-mb", fetch.max_item_bytes / 2**20, 4000),
    ):
        if not 0 < number <= most:
            raise UserError(f"{flag} {number:g} is out of range; more than 0, at most {most:,}")
    try:
        Fetcher(allow=fetch.allow_hosts)
    except ValueError as error:
        raise UserError(f"--allow-host: {error}") from None
    if not fetch.user_agent.isprintable() or not fetch.user_agent.isascii():
        raise UserError(f"--user-agent {fetch.user_agent!r} must be printable ASCII")
    _check_languages(columns)


def _check_languages(columns: Columns) -> None:
    for flag, code in [
        ("--language", columns.default_language),
        *_stated("--caption-column", columns.captions),
        *_stated("--transcript-column", columns.transcripts),
    ]:
        try:
            check_language(code)
        except ValueError as error:
            raise UserError(f"{flag}: {error}") from None


def _stated(flag: str, columns: Sequence[str]) -> Iterator[tuple[str, str]]:
    """The languages that a column's name is given with."""
    for given in columns:
        stated, equals, _ = given.rpartition("=")
        if equals:
            yield flag, stated


def _check_apart(out: Path, sources: Sequence[str]) -> None:
    """A set is never written over, around or into what it is made of."""
    place = Path(os.path.realpath(out))  # resolve() raises for links that lead in a circle
    for given in sources:
        if is_remote(given):
            continue
        source = Path(os.path.realpath(given))
        if source == place:
            relation = "is"
        elif place in source.parents:
            relation = "contains"
        elif source in place.parents:
            relation = "lies inside"
        else:
            continue
        raise UserError(
            f"--out {out} {relation} the source {given}. Nothing was removed: give an --out apart "
            "from the sources."
        )


def _entries(
    sources: Sequence[str], columns: Columns, options: IngestOptions, scratch: Path
) -> Iterator[Entry]:
    for given in sources:
        try:
            yield from read_source(
                given, columns, scratch=scratch, allow_outside=options.allow_outside
            )
        except OSError as error:
            raise UserError(f"{given} cannot be read: {error.strerror or error}") from None


def split_of(key: str, validation_share: float) -> str:
    """`validation` for a share of the keys, by hash; else `train`."""
    position = int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big") / 2**64
    return "validation" if position < validation_share else "train"


def _store(writer: ShardWriter, item: Entry, loaded: Loaded, options: IngestOptions) -> str | None:
    """Write one item; the reason when its text or key cannot be stored."""
    assert isinstance(item, Item)
    meta: dict[str, Any] = {**item.extra, "source": item.origin, "media": loaded.media}
    texts = {"captions": item.captions, "transcripts": item.transcripts}
    meta |= {name: listed for name, listed in texts.items() if listed}
    if options.licence is not None and "licence" not in meta:
        meta["licence"] = options.licence
        if options.licence_source is not None:
            meta["licence_source"] = options.licence_source
    split = item.split or split_of(item.key, options.validation_share)
    try:
        writer.write(item.key, loaded.members, meta, split=split)
    except SampleError as error:
        return error.reason
    return None


def _judge(work: Work, options: IngestOptions, *, at_end: bool) -> None:
    """Raise UserError when more than the allowed share was rejected."""
    if not at_end and work.num_done < _MIN_JUDGED:
        return
    if work.num_rejected <= options.max_bad_share * work.num_done:
        return
    listed = "; ".join(f"{reason} ({n:,})" for reason, n in work.reasons.most_common(3))
    kept = (
        f" What was read is kept in {work.folder}: the same command with a larger --max-bad-share "
        "goes on, with --restart it begins anew."
        if work.is_kept
        else ""
    )
    raise UserError(
        f"{work.num_rejected:,} of {work.num_done:,} items are bad, above --max-bad-share "
        f"{options.max_bad_share:g}, so no data set was made. Reasons: {listed}. First: "
        f"{', '.join(work.first_rejected)}.{kept}"
    )


def _progress(work: Work) -> Progress:
    from rich.console import Console
    from rich.progress import (
        MofNCompleteColumn,
        Progress,
        SpinnerColumn,
        TextColumn,
        TimeElapsedColumn,
    )

    progress = Progress(
        SpinnerColumn(),
        TextColumn("{task.description}"),
        MofNCompleteColumn(),
        TextColumn("items, {task.fields[rejected]:,} rejected"),
        TimeElapsedColumn(),
        console=Console(stderr=True),
        disable=not sys.stderr.isatty(),
    )
    begun = f"going on after {work.num_resumed:,}" if work.num_resumed else "reading"
    progress.add_task(begun, total=None, completed=work.num_done, rejected=work.num_rejected)
    return progress


def _show(progress: Progress, work: Work) -> None:
    progress.update(progress.task_ids[0], completed=work.num_done, rejected=work.num_rejected)
