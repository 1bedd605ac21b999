"""dataset.json: which shards make up which split, with sizes and SHA-256 sums.

Opening a data set reads this one file, so it costs O(shards), never O(samples). The file carries
a checksum of itself: a flipped bit is reported before anything it says is believed.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from carillon.engine.access import explained
from carillon.engine.config import UserError
from carillon.engine.data.store import read_whole

MANIFEST_NAME = "dataset.json"
FORMAT = "carillon-shards"
VERSION = 3  # 3: a sample is one span of any members; shards have a table of their items

_MAX_BYTES = 1 << 30  # a million shards are some 600 MB


@dataclass(frozen=True, kw_only=True)
class ShardFile:
    """One tar, its index and its items (items.py; none of a foreign tar); names are relative to
    the manifest's folder.

    The SHA-256 are of the whole files, recorded for whoever compares copies
    (`sha256sum`): reading checks the parts it uses by their own CRC-32, whatever the files' sizes.
    """

    file: str
    size_bytes: int
    sha256: str
    num_samples: int
    index: str
    index_sha256: str
    items: str | None = None
    items_sha256: str | None = None

    @property
    def names(self) -> tuple[str, ...]:
        return self.file, self.index, *([self.items] if self.items is not None else [])


@dataclass(frozen=True, kw_only=True)
class SplitFiles:
    """The shards of a split; `languages` counts captions and transcripts, `licences` and
    `modalities` samples."""

    shards: tuple[ShardFile, ...]
    languages: Mapping[str, int] = field(default_factory=dict)
    licences: Mapping[str, int] = field(default_factory=dict)
    modalities: Mapping[str, int] = field(default_factory=dict)

    @property
    def num_samples(self) -> int:
        return sum(shard.num_samples for shard in self.shards)


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """All that dataset.json says; `source` is free for whoever builds the set."""

    name: str
    splits: Mapping[str, SplitFiles]
    source: Mapping[str, Any] = field(default_factory=dict)
    ignored: Mapping[str, int] = field(default_factory=dict)

    @property
    def fingerprint(self) -> str:
        """SHA-256 over the shards' own sums, with the split each belongs to."""
        lines = [f"{name} {s.sha256}\n" for name, x in self.splits.items() for s in x.shards]
        return hashlib.sha256("".join(lines).encode()).hexdigest()


def manifest_bytes(manifest: Manifest) -> bytes:
    """The content of dataset.json."""
    languages: Counter[str] = Counter()
    licences: Counter[str] = Counter()
    for split in manifest.splits.values():
        languages.update(split.languages)
        licences.update(split.licences)
    content = {
        "format": FORMAT,
        "version": VERSION,
        "name": manifest.name,
        "fingerprint": manifest.fingerprint,
        "num_samples": sum(split.num_samples for split in manifest.splits.values()),
        "languages": dict(sorted(languages.items())),
        "licences": dict(sorted(licences.items())),
        "splits": {name: _split_content(split) for name, split in manifest.splits.items()},
        "source": dict(manifest.source),
        "ignored": dict(manifest.ignored),
    }
    content["checksum"] = _checksum(content)
    return (json.dumps(content, indent=1, ensure_ascii=False) + "\n").encode()


def read_manifest(path: str | Path, *, absolute_files: bool = False) -> Manifest:
    """Read and check a dataset.json by path or URL; `absolute_files` is for our index cache only.

    Raises UserError when it is damaged, of another version, or names files outside its folder.
    """
    try:
        content = json.loads(read_whole(str(path), max_bytes=_MAX_BYTES))
        checksum = content.pop("checksum")
        intact = checksum == _checksum(content)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {explained(error)}") from None
    except (ValueError, KeyError, AttributeError, TypeError, RecursionError):
        raise UserError(f"{path} is damaged or no data set. Build or copy it again.") from None
    if not intact:
        raise UserError(f"{path} does not match its checksum. Build or copy the set again.")
    if content.get("format") != FORMAT or content.get("version") != VERSION:
        given = f"{content.get('format')} version {content.get('version')}"
        raise UserError(
            f"{path} is {given}; this version reads {FORMAT} version {VERSION}. Build the set "
            "again, by the command that made it with --overwrite."
        )
    try:
        manifest = _parse(content)
    except (KeyError, TypeError, AttributeError):
        raise UserError(f"{path} lacks what a data set needs. Build it again.") from None
    shards = [shard for split in manifest.splits.values() for shard in split.shards]
    outside = [s.file for s in shards if not all(map(_plain, s.names))]
    if outside and not absolute_files:
        raise UserError(f"{path} names a file outside its folder: {outside[0]!r}")
    return manifest


def _split_content(split: SplitFiles) -> dict[str, Any]:
    return {
        "num_samples": split.num_samples,
        "languages": dict(sorted(split.languages.items())),
        "licences": dict(sorted(split.licences.items())),
        "modalities": dict(sorted(split.modalities.items())),
        "shards": [asdict(shard) for shard in split.shards],
    }


def _parse(content: Mapping[str, Any]) -> Manifest:
    splits = {
        str(name): SplitFiles(
            shards=tuple(ShardFile(**shard) for shard in split["shards"]),
            languages=split["languages"],
            licences=split["licences"],
            modalities=split["modalities"],
        )
        for name, split in content["splits"].items()
    }
    return Manifest(
        name=str(content["name"]),
        splits=splits,
        source=content["source"],
        ignored=content["ignored"],
    )


def _checksum(content: Mapping[str, Any]) -> str:
    canonical = json.dumps(content, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()


def _plain(name: str) -> bool:
    return isinstance(name, str) and Path(name).name == name and name not in ("", ".", "..")
