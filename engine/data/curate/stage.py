"""What a stage of curation is: settings, and what it finds of an item or of all of them.

A stage is the frozen dataclass of its settings. `examine` looks at one item: scores, whether they
pass, a changed caption, or a signature. A stage that compares items (`SetStage`) leaves signatures
there and decides later, over all items that no stage before it in the pipeline dropped. What is
done with an item that does not pass is the stage's `action`: `drop` leaves it out, `flag` keeps it
and says so in its JSON, `annotate` only writes the scores there.
Both methods are functions of what they are given, so neither the number of processes nor their
order can change a result.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple

import numpy as np
import pyarrow as pa

from carillon.engine.config import setting

if TYPE_CHECKING:
    from carillon.engine.data.curate.item import Item

Action = Literal["drop", "flag", "annotate"]
Limits = tuple[float | None, float | None]


@dataclass(kw_only=True)
class Finding:
    """What a stage finds of one item.

    `reason` says why it does not pass. `captions` are its captions from here on, `meta` is to be
    added to its JSON, `split` is where it goes.
    """

    scores: Mapping[str, float] = field(default_factory=dict)
    reason: str | None = None
    signature: bytes | None = None
    captions: dict[str, list[str]] | None = None
    meta: Mapping[str, Any] = field(default_factory=dict)
    split: str | None = None


@dataclass(frozen=True, kw_only=True)
class Stage:
    """The settings that every stage has. A subclass is one stage; its docstring describes it."""

    name: str | None = setting(None, "Name in reasons and reports; that of the type unless given.")
    action: Action = setting("drop", "What happens to an item that does not pass.")

    score_names: ClassVar[tuple[str, ...]] = ()
    packages: ClassVar[tuple[str, ...]] = ()  # modules of an extra that it needs
    extra: ClassVar[str] = "curate"

    @property
    def label(self) -> str:
        return self.name or str(getattr(self, "type", ""))

    def limits(self) -> Mapping[str, Limits]:
        """The least and the greatest value allowed of each score."""
        return {}

    def examine(self, item: Item) -> Finding | None:
        """Look at one item; None where the stage has nothing to say, as of a picture's sound.

        Raises ValueError with the reason when the item's bytes cannot be used.
        """
        raise NotImplementedError

    def identity(self) -> Mapping[str, Any]:
        """What beside the settings changes results: versions of models, hashes of files."""
        return {}

    def missing(self) -> str | None:
        """What has to be installed before this stage can run; none when all is there."""
        absent = [name for name in self.packages if importlib.util.find_spec(name) is None]
        if not absent:
            return None
        return (
            f"needs {', '.join(absent)}, which is not installed: "
            f'pip install "carillon-engine[{self.extra}]"'
        )

    def check(self) -> Iterator[str]:
        """Settings that contradict each other."""
        for name, (least, most) in self.limits().items():
            if least is not None and most is not None and least > most:
                yield f"the least {name} ({least:g}) is above the greatest ({most:g})"


class Decisions(NamedTuple):
    """Rows of a population that do not pass; `match` is the row that each is too near to, or -1.

    Shapes: (n,) each.
    """

    rows: Any
    scores: Any
    matches: Any

    @classmethod
    def none(cls) -> Decisions:
        return cls(np.empty(0, np.int64), np.empty(0, np.float32), np.empty(0, np.int64))


@dataclass(frozen=True)
class Population:
    """The items that a set stage decides over, in the order of sets, shards and rows.

    Items of evaluation sets come last. `signatures` is the column (Arrow, binary) of all items,
    those that are not of the population too, on disk until they are taken; `places` says where in
    it the population's are (none: as they stand). Of duplicates that of greatest `quality` stays.
    """

    keys: Any
    signatures: Any
    quality: Any
    is_evaluation: Any
    seed: int
    places: Any = None

    def rows(self) -> Any:
        """The rows that have a signature."""
        held = self.signatures.is_valid().to_numpy()
        return np.flatnonzero(held if self.places is None else held[self.places])

    def take(self, rows: Any) -> list[bytes]:
        """The signatures of some rows. Arrow's own take would first join all chunks in memory."""
        wanted = np.asarray(rows, np.int64)
        wanted = wanted if self.places is None else self.places[wanted]
        chunk_of = np.searchsorted(self._starts, wanted, side="right") - 1
        found = [b""] * len(wanted)
        for number in np.unique(chunk_of).tolist():
            here = np.flatnonzero(chunk_of == number)
            inside = pa.array(wanted[here] - self._starts[number])
            values = self.signatures.chunk(number).take(inside)
            for place, value in zip(here.tolist(), values, strict=True):
                found[place] = value.as_buffer().to_pybytes()
        return found

    @cached_property
    def _starts(self) -> Any:
        return np.cumsum([0, *map(len, self.signatures.chunks[:-1])])

    def matrix(self, rows: Any) -> Any:
        """Signatures of one length as bytes. Shapes: (n,) -> (n, length) uint8."""
        joined = b"".join(self.take(rows))
        return np.frombuffer(joined, np.uint8).reshape(len(rows), -1 if len(rows) else 0)


@dataclass(frozen=True, kw_only=True)
class SetStage(Stage):
    """A stage that compares items with each other. Items without a signature are left alone."""

    contaminated: Literal["drop", "flag", "annotate", "ignore"] = setting(
        "drop", "What happens to an item that matches one of the evaluation sets."
    )

    def decide(self, population: Population) -> Decisions:
        """Which items do not pass."""
        raise NotImplementedError

    def explain(self, score: float, match: str | None, *, is_evaluation: bool) -> str:
        """The reason for one decision; `match` is the key of the item that it is too near to."""
        where = "the evaluation item" if is_evaluation else ""
        return f"{self.score_names[0]} {score:.4g} with {where} {match}".replace("  ", " ")


def reason_by(limits: Mapping[str, Limits], scores: Mapping[str, float]) -> str | None:
    """Why scores do not pass, in words; none when they do. A score that is no number fails."""
    for name, (least, most) in limits.items():
        value = scores.get(name)
        if value is None:
            continue
        shown = name.replace("_", " ")
        if math.isnan(value):
            return f"{shown} is not a number"
        if least is not None and value < least:
            return f"{shown} {value:.4g} is below {least:g}"
        if most is not None and value > most:
            return f"{shown} {value:.4g} is above {most:g}"
    return None


def keep_first(pairs: Iterable[tuple[int, int, float]], population: Population) -> Decisions:
    """Of near pairs, which rows go: each row that matches one that is kept.

    Rows are taken by evaluation first, then quality, then order. A row goes only for a row that
    stays, so a chain of small changes does not pull its ends together.
    """
    num_rows = len(population.quality)
    order = np.lexsort((np.arange(num_rows), -population.quality, ~population.is_evaluation))
    rank = np.empty(num_rows, np.int64)
    rank[order] = np.arange(num_rows)
    better: dict[int, list[tuple[int, int, float]]] = {}
    for one, other, score in pairs:
        worse, kept = (one, other) if rank[one] > rank[other] else (other, one)
        if not (population.is_evaluation[worse] and population.is_evaluation[kept]):
            better.setdefault(worse, []).append((int(rank[kept]), kept, score))
    gone: dict[int, tuple[float, int]] = {}
    for row in sorted(better, key=lambda row: int(rank[row])):
        standing = [entry for entry in better[row] if entry[1] not in gone]
        if standing and not population.is_evaluation[row]:
            _, kept, score = min(standing)
            gone[row] = (score, kept)
    rows = sorted(gone)
    return Decisions(
        np.asarray(rows, np.int64),
        np.asarray([gone[row][0] for row in rows], np.float32),
        np.asarray([gone[row][1] for row in rows], np.int64),
    )
