"""Media and their texts from anywhere into a data set of tar shards.

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

import hashlib
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from carillon.engine.config import UserError
from carillon.engine.data.ingest_inspection import Inspectors
from carillon.engine.data.ingest_items import Columns, Entry, Item
from carillon.engine.data.ingest_loading import Loaded, Loader
from carillon.engine.data.ingest_options import (
    IngestOptions,
    check_apart,
    check_options,
    same_bytes,
)
from carillon.engine.data.ingest_order import in_order
from carillon.engine.data.ingest_sources import read_source, source_name
from carillon.engine.data.ingest_work import REJECTED_NAME, Work
from carillon.engine.data.publish import check_target
from carillon.engine.data.shard_writer import is_data_set
from carillon.engine.data.shards import Dataset, SampleError, ShardWriter, open_dataset

if TYPE_CHECKING:
    from rich.progress import Progress

MIN_JUDGED = 1000  # entries, rejected ones included, before --max-bad-share is judged on the way


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
    check_options(options, columns)
    check_apart(out, sources)
    check_target(out, "data set", is_data_set, overwrite=options.overwrite)
    with Work(out, same_bytes(sources, columns, options), restart=options.restart) as work:
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
    if not at_end and work.num_done < MIN_JUDGED:
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
