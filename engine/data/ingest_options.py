"""The options of an ingest: what they are, what is allowed, and which the bytes follow from."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from carillon.engine.config import UserError
from carillon.engine.data.fetch import Fetcher
from carillon.engine.data.ingest_items import Columns, check_language
from carillon.engine.data.ingest_loading import FetchOptions
from carillon.engine.data.ingest_order import Pace
from carillon.engine.data.ingest_sources import source_version
from carillon.engine.data.shard_writer import DEFAULT_SHARD_BYTES
from carillon.engine.data.store import is_remote

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


def same_bytes(sources: Sequence[str], columns: Columns, options: IngestOptions) -> dict[str, Any]:
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


def check_options(options: IngestOptions, columns: Columns) -> None:
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


def check_apart(out: Path, sources: Sequence[str]) -> None:
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
