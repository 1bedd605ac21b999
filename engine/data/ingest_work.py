"""What an unfinished ingest keeps, so that a kill at any moment costs the last seconds only.

A folder `.NAME.ingest` beside the data set holds the shards so far, the rejections, and a state
that says how many entries of the sources, in their fixed order, these are. Every few seconds all is
made durable and the state is replaced as a whole: what was written after it is cut off by the next
start, which reads the sources from the beginning and passes over the entries that are done. A chain
of hashes over those entries tells when the sources are not what they were; options that would give
other bytes are compared by name. A lock keeps a second process out.
Keys are held in a SQLite file, made anew at each start: a set of billions does not fit in memory.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import sqlite3
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from carillon.engine.access import explained
from carillon.engine.config import UserError
from carillon.engine.data.ingest_items import Entry, Item, Rejected
from carillon.engine.data.publish import json_of, sync_folder

REJECTED_NAME = "rejected.jsonl"
_STATE_NAME = "state.json"
_VERSION = 1
_MAX_REASONS = 1000  # counted apart; the rest as one
_OTHER = "other reasons"
_START = hashlib.sha256().hexdigest()  # the chain of no entry


class Work:
    """The kept folder of one ingest; a context that holds its lock.

    Raises UserError when another process has it, or it was begun with other options.
    """

    def __init__(self, out: Path, options: Mapping[str, Any], *, restart: bool) -> None:
        place = out.absolute()
        self.folder = place.parent / f".{place.name}.ingest"
        self.set_folder = self.folder / "set"
        self.scratch = self.folder / "tables"
        self._options = json.loads(json.dumps(options))
        self._restart = restart
        self.num_done = self.num_rejected = 0
        self.num_resumed = 0
        self.reasons: Counter[str] = Counter()
        self.first_rejected: list[str] = []
        self.saved_writer: dict[str, Any] | None = None
        self._chain = self._resumed_chain = _START

    def __enter__(self) -> Self:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            if not (self.folder / "lock").exists() and any(self.folder.iterdir()):
                raise UserError(
                    f"{self.folder} holds something else, and an ingest to that --out keeps its "
                    "unfinished work there. Nothing was removed: give another --out."
                )
            self._lock = os.open(self.folder / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC)
        except OSError as error:
            raise self._cannot_write(error) from None
        try:
            self._take_lock()
            self._load()
            self._keys = _open_keys(self.folder / "keys.sqlite")
            self._rejected = (self.folder / REJECTED_NAME).open("ab")
        except OSError as error:
            os.close(self._lock)
            raise self._cannot_write(error) from None
        except UserError:
            os.close(self._lock)
            raise
        return self

    def __exit__(
        self,
        error_type: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._keys.close()
        self._rejected.close()
        if error_type is None or not self.is_kept:
            shutil.rmtree(self.folder, ignore_errors=True)
        os.close(self._lock)

    @property
    def is_kept(self) -> bool:
        """Whether there is something to go on from: the first save comes after some seconds."""
        return (self.folder / _STATE_NAME).exists()

    def pending(self, entries: Iterator[Entry]) -> Iterator[Entry]:
        """The entries that are not done yet; a key that was there becomes a rejection.

        Raises UserError when those that are done are not what they were.
        """
        chain = _START
        number = 0
        for number, entry in enumerate(self._unique(entries), start=1):
            linked = _linked(chain, entry)
            if number > self.num_resumed:
                yield entry
                continue
            chain = linked
            if number == self.num_resumed and chain != self._resumed_chain:
                raise self._changed()
        if number < self.num_resumed:
            raise self._changed()

    def take(self, entry: Entry, reason: str | None) -> None:
        """Count an entry as done, with the reason why it was rejected, if it was."""
        self.num_done += 1
        self._chain = _linked(self._chain, entry)
        if reason is None:
            return
        image = entry.name if isinstance(entry, Item) else entry.image
        rejected = Rejected(source=entry.source, image=image, reason=reason)
        self._rejected.write((json.dumps(asdict(rejected)) + "\n").encode())
        self.num_rejected += 1
        self.reasons[reason if len(self.reasons) < _MAX_REASONS else _OTHER] += 1
        if len(self.first_rejected) < 3:
            self.first_rejected.append(image)

    def save(self, writer: Mapping[str, Any]) -> None:
        """Make the state durable; `writer` is what its save gave. Raises UserError."""
        try:
            self._rejected.flush()
            os.fsync(self._rejected.fileno())
            state = {
                "version": _VERSION,
                "options": self._options,
                "num_done": self.num_done,
                "chain": self._chain,
                "num_rejected": self.num_rejected,
                "rejected_bytes": self._rejected.tell(),
                "reasons": self.reasons,
                "first_rejected": self.first_rejected,
                "writer": writer,
            }
            partial = self.folder / f"{_STATE_NAME}.partial"
            with partial.open("w", encoding="utf-8") as file:
                json.dump(state, file)
                file.flush()
                os.fsync(file.fileno())
            partial.replace(self.folder / _STATE_NAME)
            sync_folder(self.folder)
        except OSError as error:
            raise self._cannot_write(error) from None

    def rejections(self) -> Path:
        """The file of all rejections so far."""
        self._rejected.flush()
        return self.folder / REJECTED_NAME

    def _take_lock(self) -> None:
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(
                f"another ingest is at work in {self.folder}. Wait for it, or give another --out."
            ) from None

    def _load(self) -> None:
        state = json_of(self.folder / _STATE_NAME)
        if self._restart or state.get("version") != _VERSION or not self.set_folder.is_dir():
            for path in self.folder.iterdir():
                if path.is_dir():
                    shutil.rmtree(path)
                elif path.name != "lock":
                    path.unlink()
        else:
            self._check_options(state["options"])
            self.num_done = self.num_resumed = state["num_done"]
            self._chain = self._resumed_chain = state["chain"]
            self.num_rejected = state["num_rejected"]
            self.reasons = Counter(state["reasons"])
            self.first_rejected = state["first_rejected"]
            self.saved_writer = state["writer"]
            os.truncate(self.folder / REJECTED_NAME, state["rejected_bytes"])
        self.scratch.mkdir(exist_ok=True)

    def _check_options(self, kept: Mapping[str, Any]) -> None:
        changed = [
            f"{name} was {kept.get(name)}, now {self._options.get(name)}"
            for name in {**kept, **self._options}
            if kept.get(name) != self._options.get(name)
        ]
        if changed:
            raise UserError(
                f"an unfinished ingest is kept in {self.folder}, and it was begun otherwise: "
                f"{'; '.join(changed)}. Give the same again to go on, or --restart to begin anew."
            )

    def _cannot_write(self, error: OSError) -> UserError:
        return UserError(f"{self.folder} cannot be written: {explained(error)}")

    def _changed(self) -> UserError:
        return UserError(
            f"the sources changed since the unfinished ingest in {self.folder} was begun: their "
            f"first {self.num_resumed:,} items are not those that were taken. Begin anew with "
            "--restart, or put the sources back."
        )

    def _unique(self, entries: Iterator[Entry]) -> Iterator[Entry]:
        for entry in entries:
            if isinstance(entry, Item) and not self._is_new(entry.key):
                reason = "another source of the same name holds the same path"
                entry = Rejected(source=entry.source, image=entry.name, reason=reason)
            yield entry

    def _is_new(self, key: str) -> bool:
        digest = hashlib.blake2b(key.encode(), digest_size=16).digest()
        return self._keys.execute("insert or ignore into keys values (?)", (digest,)).rowcount > 0


def _open_keys(file: Path) -> sqlite3.Connection:
    file.unlink(missing_ok=True)
    keys = sqlite3.connect(file, isolation_level=None)
    keys.executescript(
        "pragma synchronous=off; pragma journal_mode=off; pragma cache_size=-65536;"
        "create table keys (hash blob primary key) without rowid; begin;"
    )
    return keys


def _linked(chain: str, entry: Entry) -> str:
    return hashlib.sha256(f"{chain}{entry.identity}".encode()).hexdigest()
