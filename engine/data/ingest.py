"""`carillon ingest`: a user's own picture-caption pairs into a data set of tar shards.

Every picture is decoded once to know that it can be, and stored with its original bytes unless it
is larger than --max-size. Keys follow from the source's name and the path inside it, so they do not
change when the folder moves or other items join; the validation split is a hash of the key. What
cannot be used is listed with its reason in rejected.jsonl; too large a share of it stops the run
with nothing left behind. Left out: finding duplicates, filtering, remote sources (data plane).
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import os
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from carillon.engine.access import explained
from carillon.engine.config import UserError
from carillon.engine.data.decode.image import decode_rgb, picture_extension
from carillon.engine.data.ingest_sources import (
    Columns,
    Item,
    Rejected,
    check_language,
    read_source,
)
from carillon.engine.data.process_map import ordered_map
from carillon.engine.data.samples import UNKNOWN_LANGUAGE
from carillon.engine.data.shards import Dataset, SampleError, ShardWriter, open_dataset

EXAMPLES = """examples:
  carillon ingest photos/ --out data/photos --language en --licence CC-BY-4.0
  carillon ingest pairs.csv --out data/pairs --validation-share 0.1
  carillon ingest a.jsonl b.parquet --out data/both --image-column file --caption-column text
  carillon ingest t.tsv --out data/t --caption-column de=legende --caption-column fr=titre
a folder holds pictures with the same name's .txt (one caption a line) or .json beside them;
a table holds one row a caption or a picture, with paths relative to the table's own folder
"""
REJECTED_NAME = "rejected.jsonl"

_MAX_PICTURE_BYTES = 256 << 20
_KEY_CHARACTERS = re.compile(r"[^\w-]+")


@dataclass(frozen=True, kw_only=True)
class IngestOptions:
    """What to do with the items once they are read."""

    licence: str | None = None
    validation_share: float = 0.0
    max_bad_share: float = 0.1
    max_size: int | None = None
    allow_outside: bool = False
    workers: int = 1
    overwrite: bool = False


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `carillon ingest`."""
    add = parser.add_argument
    add("sources", nargs="+", metavar="SOURCE", help="folder, csv, tsv, jsonl or parquet")
    add("--out", type=Path, required=True, metavar="DATASET", help="folder to write")
    add("--name", help="name of the set (default: the folder's)")
    add("--image-column", metavar="NAME", help="column with the picture's path")
    add(
        "--caption-column",
        action="append",
        default=[],
        metavar="[LANG=]NAME",
        help="column with captions, optionally with their language; may be repeated",
    )
    add("--language-column", metavar="NAME", help="column with the captions' language")
    add(
        "--language",
        default=UNKNOWN_LANGUAGE,
        help="language of captions that state none (default und)",
    )
    add("--licence", help="licence of items that state none, as an SPDX name")
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
        help="stop when more than this share is rejected (default 0.1)",
    )
    add("--max-size", type=int, help="shrink pictures whose longer side has more pixels")
    add("--allow-outside", action="store_true", help="permit paths outside a source's folder")
    add(
        "--workers", type=int, default=os.cpu_count() or 1, help="processes (default: one per core)"
    )
    add("--overwrite", action="store_true", help="replace an existing data set")


def main(args: argparse.Namespace) -> int:
    """Run `carillon ingest` and print what was taken. Raises UserError."""
    dataset, num_rejected = ingest(
        args.sources,
        args.out,
        name=args.name,
        columns=Columns(
            image=args.image_column,
            captions=tuple(args.caption_column),
            language=args.language_column,
            default_language=args.language,
        ),
        options=IngestOptions(
            licence=args.licence,
            validation_share=args.validation_share,
            max_bad_share=args.max_bad_share,
            max_size=args.max_size,
            allow_outside=args.allow_outside,
            workers=args.workers,
            overwrite=args.overwrite,
        ),
    )
    print(f"{dataset.path}  fingerprint {dataset.fingerprint[:16]}")
    for name, split in dataset.manifest.splits.items():
        captions = ", ".join(f"{code} {n:,}" for code, n in sorted(split.languages.items()))
        print(f"  {name:12} {split.num_samples:7,} pictures; captions: {captions}")
    if num_rejected:
        print(f"  {num_rejected:,} items were rejected: see {dataset.path / REJECTED_NAME}")
    return 0


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
    that exists or cannot be written.
    """
    options = options or IngestOptions()
    columns = columns or Columns()
    _check(options, columns)
    _check_apart(out, sources)
    rejected: list[Rejected] = []
    items = list(_items(sources, columns, options, rejected))
    num_seen = len(items) + len(rejected)
    source = {
        "kind": "ingest",
        "sources": [Path(given).name for given in sources],
        "validation_share": options.validation_share,
        "max_size": options.max_size,
    }
    with ShardWriter(
        out, name=name or out.absolute().name, source=source, overwrite=options.overwrite
    ) as writer:
        for item, result in zip(items, _load_all(items, options), strict=True):
            reason = result if isinstance(result, str) else _store(writer, item, *result, options)
            if reason:
                rejected.append(Rejected(source=item.source, image=item.image, reason=reason))
        _judge(rejected, num_seen, options)
        if rejected:
            lines = [json.dumps(vars(entry)) for entry in rejected]
            writer.attach(REJECTED_NAME, ("\n".join(lines) + "\n").encode())
    return open_dataset(out), len(rejected)


def _check(options: IngestOptions, columns: Columns) -> None:
    for flag, share in (
        ("--validation-share", options.validation_share),
        ("--max-bad-share", options.max_bad_share),
    ):
        if not 0 <= share <= 1:
            raise UserError(f"{flag} {share} is out of range; 0 to 1 is allowed")
    if options.max_size is not None and options.max_size < 1:
        raise UserError(f"--max-size {options.max_size}: at least one pixel is needed")
    if options.workers < 1:
        raise UserError(f"--workers {options.workers}: at least one process is needed")
    stated = [given.rpartition("=") for given in columns.captions]
    codes = [("--caption-column", code) for code, equals, _ in stated if equals]
    for flag, code in [("--language", columns.default_language), *codes]:
        try:
            check_language(code)
        except ValueError as error:
            raise UserError(f"{flag}: {error}") from None


def _check_apart(out: Path, sources: Sequence[str]) -> None:
    """A set is never written over, around or into what it is made of."""
    place = Path(os.path.realpath(out))  # resolve() raises for links that lead in a circle
    for given in sources:
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


def _items(
    sources: Sequence[str], columns: Columns, options: IngestOptions, rejected: list[Rejected]
) -> Iterator[Item]:
    """The items of all sources, each key once; what is left out goes to `rejected`."""
    keys: set[str] = set()
    for given in sources:
        try:
            for entry in read_source(given, columns, allow_outside=options.allow_outside):
                if isinstance(entry, Rejected):
                    rejected.append(entry)
                elif (key := key_of(entry)) in keys:
                    reason = "another source of the same name holds the same path"
                    rejected.append(Rejected(source=entry.source, image=entry.image, reason=reason))
                else:
                    keys.add(key)
                    yield entry
        except OSError as error:
            raise UserError(f"{given} cannot be read: {explained(error)}") from None


def key_of(item: Item) -> str:
    """A key from source and path alone: readable, unique by its hash."""
    origin = f"{item.source}/{item.image}"
    stem = _KEY_CHARACTERS.sub("-", item.image.rpartition(".")[0] or item.image).strip("-")
    digest = hashlib.sha256(origin.encode("utf-8", "surrogateescape")).hexdigest()
    return f"{stem[-40:]}-{digest[:12]}".lstrip("-")


def split_of(key: str, validation_share: float) -> str:
    """`validation` for a share of the keys, by hash; else `train`."""
    position = int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big") / 2**64
    return "validation" if position < validation_share else "train"


def _load_all(items: Sequence[Item], options: IngestOptions) -> Iterator[tuple[bytes, str] | str]:
    """For each item its bytes and extension, or the reason why it cannot be used."""
    from rich.progress import track

    work = [(item.path, item.data, options.max_size) for item in items]
    results = ordered_map(_load, work, workers=options.workers)
    return iter(track(results, total=len(work), description="reading"))


def _load(work: tuple[Path | None, bytes | None, int | None]) -> tuple[bytes, str] | str:
    path, data, max_size = work
    try:
        if path is not None:
            size_bytes = path.stat().st_size
            if size_bytes > _MAX_PICTURE_BYTES:
                return f"a picture of {size_bytes:,} bytes; at most {_MAX_PICTURE_BYTES:,}"
            data = path.read_bytes()
        assert data is not None
        image = decode_rgb(data)
        if max_size is not None and max(image.size) > max_size:
            return _shrink(image, max_size), "jpg"
        return data, picture_extension(data)
    except OSError as error:
        return f"cannot be read: {error.strerror or error}"
    except ValueError as error:
        return str(error)


def _shrink(image: Any, max_size: int) -> bytes:
    from PIL import Image

    image.thumbnail((max_size, max_size), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=92, subsampling=0)
    return buffer.getvalue()


def _store(
    writer: ShardWriter, item: Item, media: bytes, extension: str, options: IngestOptions
) -> str | None:
    """Write one item; the reason when its text or key cannot be stored."""
    key = key_of(item)
    meta = {**item.extra, "captions": item.captions, "source": f"{item.source}/{item.image}"}
    if options.licence is not None:
        meta.setdefault("licence", options.licence)
    try:
        writer.write(key, {extension: media}, meta, split=split_of(key, options.validation_share))
    except SampleError as error:
        return error.reason
    return None


def _judge(rejected: Sequence[Rejected], num_seen: int, options: IngestOptions) -> None:
    """Raise UserError when more than the allowed share was rejected."""
    if len(rejected) <= options.max_bad_share * num_seen:
        return
    reasons = Counter(entry.reason for entry in rejected).most_common(3)
    listed = "; ".join(f"{reason} ({count:,})" for reason, count in reasons)
    first = ", ".join(entry.image for entry in rejected[:3])
    raise UserError(
        f"{len(rejected):,} of {num_seen:,} items are bad, above --max-bad-share "
        f"{options.max_bad_share:g}, so nothing was written. Reasons: {listed}. First: {first}."
    )
