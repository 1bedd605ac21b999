"""A global position to a training sample, as a pure function, and what stands in for a bad one.

Row by the order, caption and augmentation by a generator keyed with the position. A bad sample
is replaced by a drawn one, reported with its key and reason, and counted. A sound one without a
caption that the settings allow is filtered: replaced the same way, counted apart, and no fault.
Trade-off: nothing lists the rows that qualify, so start-up stays independent of their number, and a
set of which one row in a hundred does costs a hundred reads a sample. Caption rule: a language
among those allowed that the row has, by weight (1 unless set), then one of its captions uniformly.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Generic, Protocol, Self, TypeVar, cast

import numpy as np
import torch
from torch.utils.data import Dataset

from carillon.engine.config import UserError
from carillon.engine.data.packing import StreamState
from carillon.engine.data.samples import RawSample, SampleError
from carillon.engine.data.stages import StageBoard
from carillon.engine.data.training_data import Place, TrainingData, language_weights

_MAX_BAD = 20  # at one position; a set this damaged is past any sensible max_bad_share
# Rows tried at one position. Where one in a hundred qualifies, all of them fail at one position in
# 10^21; where none does, that is told after the second or so that reading them takes.
_MAX_DRAWS = 5000
_MAX_BAD_NAMED = 3
_MAX_NAMED = 20  # languages in a message


class PositionedBatch(Protocol):
    """What the loader and the training loop know of a batch: one process's share of a global one.

    `keys` of all samples in it. `bad` holds (key, reason) of the bad samples that were replaced,
    `num_filtered` says how many sound ones were. `streams` says where the streams that filled it
    stand now, by their numbers; none where a batch follows from its positions alone.
    """

    @property
    def keys(self) -> list[str]: ...
    @property
    def bad(self) -> list[tuple[str, str]]: ...
    @property
    def num_filtered(self) -> int: ...
    @property
    def streams(self) -> Mapping[int, StreamState]: ...

    def to(self, device: torch.device) -> Self: ...


B = TypeVar("B", bound=PositionedBatch)
S = TypeVar("S")
V = TypeVar("V")


def _all_bad(bad: Sequence[tuple[str, str]]) -> UserError:
    keys = list(dict.fromkeys(key for key, _ in bad))  # stand-ins may come twice
    return UserError(
        f"{len(bad)} samples in a row are bad, the first {', '.join(keys[:_MAX_BAD_NAMED])}; "
        f"{bad[0][0]}: {bad[0][1]}; is this the right data set?"
    )


class FilteredSample(Exception):
    """A sound sample that is flagged, or has captions that the settings do not allow (in these
    languages)."""

    def __init__(self, languages: Iterable[str]) -> None:
        self.languages = tuple(languages)


class Positioned(Dataset[Any], ABC, Generic[B]):
    """Batches by global position; what becomes of a sample is a subclass's."""

    def __init__(self, data: TrainingData) -> None:
        self.data, self.config, self.seed = data, data.config, data.seed
        self.suspects: set[Place] = set()  # samples that a loader process ended at
        self.aside: set[Place] = set()  # and those that two did
        self._is_suspect = False  # the one that is read
        self.board = StageBoard(1)
        self._language_weights = language_weights(data.config, data.sets)

    turns: int | None = None  # steps until the same streams fill a batch again; none: no streams
    num_streams: int = 1

    def start(self, streams: Mapping[int, StreamState], board: StageBoard) -> None:
        """Go on with streams where they stand; the next batches are asked for in order. What is
        being done is written on the board."""
        self.board = board

    def decoded(self, decode: Callable[..., V], modality: str, data: bytes, **options: Any) -> V:
        """A medium of the sample that is read by `decode`, the modality's decoder; of a suspect in
        a process of its own, so what ends that is a bad sample. Raises ValueError."""
        with self.board.stage("decode"):
            if not self._is_suspect:
                return decode(data, **options)
            from carillon.engine.data.decode.guarded import decode_guarded

            return cast(V, decode_guarded(modality, data, **options))

    @abstractmethod
    def batch(self, positions: Sequence[int]) -> B:
        """The batch of the given global positions."""

    def __getitems__(self, positions: Sequence[int]) -> B | UserError:
        """The batch of the given positions (the hook that DataLoader calls once a batch).

        An error that concerns the user is returned, since a worker's exception would arrive as
        a traceback in a message.
        """
        try:
            with self.board.stage("order"):
                return self.batch(positions)
        except UserError as error:
            return error
        finally:
            self.board.at(None)

    def draw(
        self,
        positions: Sequence[int],
        bad: list[tuple[str, str]],
        make: Callable[[int, RawSample], S],
    ) -> tuple[list[S], int]:
        """The samples at global positions, and how many filtered rows others stand in for; bad
        ones are added to `bad`. `make(position, raw)` raises SampleError or FilteredSample."""
        places = self.data.places(np.asarray(positions, dtype=np.int64))
        drawn = [self._sample(*at, bad, make) for at in zip(positions, places, strict=True)]
        return [sample for sample, _ in drawn], sum(filtered for _, filtered in drawn)

    def _sample(
        self,
        position: int,
        place: Place,
        bad: list[tuple[str, str]],
        make: Callable[[int, RawSample], S],
    ) -> tuple[S, int]:
        """The sample at a position and how many filtered rows it stands in for; bad ones are added
        to `bad`."""
        num_bad = num_filtered = num_flagged = 0
        languages: Counter[str] = Counter()
        for attempt in range(_MAX_DRAWS):
            try:
                return make(position, self._read(place)), num_filtered
            except FilteredSample as sample:
                num_filtered += 1
                num_flagged += not sample.languages
                languages.update(sample.languages)
            except SampleError as error:
                num_bad += 1
                bad.append((error.key, error.reason))
            if num_bad == _MAX_BAD:
                raise _all_bad(bad[-_MAX_BAD:])
            place = self.data.stand_in(place, position, attempt)
        raise self._none_qualifies(num_filtered, num_flagged, languages)

    def _read(self, place: Place) -> RawSample:
        if place in self.aside:
            raise SampleError(self.data.key(place), "loader processes end at it; it was set aside")
        self.board.at(place)
        self._is_suspect = place in self.suspects
        with self.board.stage("read"):
            raw = self.data.read(place)
        if self.data.flagged(place, raw):
            raise FilteredSample(())
        return raw

    def _none_qualifies(
        self, num_filtered: int, num_flagged: int, languages: Counter[str]
    ) -> UserError:
        if num_flagged == num_filtered:
            return UserError(
                f"all of {num_flagged:,} rows drawn were flagged in curation; set "
                "data.filters.nsfw=false, or another set"
            )
        weights, allowed = self._language_weights, self.config.filters.lang_allow
        wanted = ", ".join(language for language in allowed if weights.get(language, 1.0) > 0)
        found = ", ".join(language for language, _ in languages.most_common(_MAX_NAMED))
        more = len(languages) - _MAX_NAMED
        return UserError(
            f"none of {num_filtered:,} rows drawn has a caption in "
            f"{wanted or 'a language of weight above 0'}; they have captions in {found}"
            f"{f' and {more} more' if more > 0 else ''}. Choose other languages "
            "(data.filters.lang_allow, data.language_weights), or a set of which at least one row "
            "in a hundred has them."
        )

    def choose_caption(self, raw: RawSample, generator: np.random.Generator) -> tuple[str, str]:
        """A language and a caption in it. Raises SampleError, and FilteredSample where the row has
        none that the settings allow."""
        captions = {c: texts for c, texts in raw.meta.get("captions", {}).items() if texts}
        if not captions:
            raise SampleError(raw.key, "no caption in any language")
        return self.choose_text(captions, generator)

    def choose_text(
        self, captions: Mapping[str, Sequence[str]], generator: np.random.Generator
    ) -> tuple[str, str]:
        """The same of texts by their languages, at least one of each."""
        allowed = self.config.filters.lang_allow
        languages = sorted(c for c in captions if not allowed or c in allowed)
        weights = [self._language_weights.get(language, 1.0) for language in languages]
        total = sum(weights)
        if total <= 0:
            raise FilteredSample(captions)
        pick = np.searchsorted(np.cumsum(weights), generator.random() * total, side="right")
        language = languages[min(int(pick), len(languages) - 1)]
        texts = captions[language]
        return language, str(texts[int(generator.integers(len(texts)))])
