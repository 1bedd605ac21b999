"""What was erased from a set and must not come back, without saying what it was.

`tombstones.json` stands beside a set's shards and goes on into every version made from it. Of an
item it holds the hash of its key and that of its media, with when it was erased, why and who asked;
never a key, a text or a picture. The hashes are salted by the fingerprint of the first version that
items were erased from: they hide keys from a reader, not from one who guesses at them.
An item is refused by its key as by the bytes of its media, under whatever key. Whoever writes a set
(ingest over an old one, curate from old ones) reads the tombstones of those, asks for each item and
attaches the content to the new set. Left out: pictures that are alike and not the same bytes.
"""

from __future__ import annotations

import hashlib
import hmac
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from carillon.engine.access import explained
from carillon.engine.config import UserError
from carillon.engine.data.items import media_sha256

TOMBSTONES_NAME = "tombstones.json"
_FORMAT = "carillon-tombstones"
_VERSION = 1
NO_MEDIA_SHA256 = hashlib.sha256().hexdigest()  # all texts without media share it: it names none


@dataclass(frozen=True, kw_only=True)
class Erasure:
    """One erasure: `items` are pairs of the key's hash and the media's, the latter may be none."""

    dataset: str
    fingerprint: str
    erased_at: str
    reason: str
    requested_by: str
    salt: str
    items: tuple[tuple[str, str | None], ...]


class Tombstones:
    """The erasures of one or several sets."""

    def __init__(self, erasures: Sequence[Erasure] = ()) -> None:
        self.erasures = tuple(dict.fromkeys(erasures))
        self._salts = tuple(dict.fromkeys(one.salt for one in self.erasures))
        self._erased = {
            (one.salt, digest): one
            for one in self.erasures
            for pair in one.items
            for digest in pair
            if digest is not None
        }

    def __len__(self) -> int:
        return sum(len(one.items) for one in self.erasures)

    def refusal(self, key: str, sha256: str) -> str | None:
        """Why an item must stay out, given its key and the SHA-256 of its media (items.py); none
        when it may come in."""
        for salt in self._salts:
            for digest in (_hashed(salt, "key", key), _media_hash(salt, sha256)):
                found = self._erased.get((salt, digest)) if digest is not None else None
                if found is not None:
                    day = found.erased_at[:10]
                    return f"it was erased from {found.dataset} on {day} and must not come back"
        return None

    def refusal_of(self, key: str, members: Mapping[str, bytes]) -> str | None:
        """As `refusal`, of an item with its media."""
        return self.refusal(key, media_sha256(members)) if self.erasures else None

    def with_erasure(
        self,
        *,
        dataset: str,
        fingerprint: str,
        erased_at: str,
        reason: str,
        requested_by: str,
        items: Iterable[tuple[str, str]],
    ) -> Tombstones:
        """These and one more; `items` are keys with the SHA-256 of their media."""
        salt = self._salts[0] if self._salts else _hashed(fingerprint, "salt", _FORMAT)
        hashed = sorted(
            (_hashed(salt, "key", key), _media_hash(salt, sha256)) for key, sha256 in items
        )
        erasure = Erasure(
            dataset=dataset,
            fingerprint=fingerprint,
            erased_at=erased_at,
            reason=reason,
            requested_by=requested_by,
            salt=salt,
            items=tuple(hashed),
        )
        return Tombstones([*self.erasures, erasure])

    def content(self) -> bytes:
        """The content of tombstones.json."""
        content: dict[str, Any] = {
            "format": _FORMAT,
            "version": _VERSION,
            "erasures": [vars(one) for one in self.erasures],
        }
        content["checksum"] = _checksum(content)
        return (json.dumps(content, indent=1, ensure_ascii=False) + "\n").encode()


def tombstones_of(folders: Iterable[Path]) -> Tombstones:
    """The tombstones of sets; a set without any adds none.

    Raises UserError when a file is damaged: what it said is not guessed at.
    """
    return Tombstones([one for folder in folders for one in _read(folder / TOMBSTONES_NAME)])


def _read(path: Path) -> list[Erasure]:
    try:
        content = json.loads(path.read_bytes())
        checksum = content.pop("checksum")
        if checksum != _checksum(content) or content["format"] != _FORMAT:
            raise ValueError
        version = content["version"]
        erasures = [_erasure(one) for one in content["erasures"] if version == _VERSION]
    except FileNotFoundError:
        return []
    except OSError as error:
        raise UserError(f"{path} cannot be read: {explained(error)}") from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise UserError(
            f"{path} is damaged, so nobody can say what was erased. Copy it from another version "
            "of the set; nothing may be taken in without it."
        ) from None
    if version != _VERSION:
        raise UserError(f"{path} is of version {version}; this carillon reads {_VERSION}")
    return erasures


def _erasure(content: Mapping[str, Any]) -> Erasure:
    items = tuple((str(key), media) for key, media in content["items"])
    return Erasure(**{**content, "items": items})


def _media_hash(salt: str, sha256: str) -> str | None:
    return None if sha256 == NO_MEDIA_SHA256 else _hashed(salt, "media", sha256)


def _hashed(salt: str, what: str, text: str) -> str:
    message = f"{what}\0{text}".encode("utf-8", "surrogatepass")
    return hmac.digest(salt.encode(), message, "sha256").hex()


def _checksum(content: Mapping[str, Any]) -> str:
    canonical = json.dumps(content, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()
