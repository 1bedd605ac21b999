"""What a run reads: one data set or a mixture of several, as a function of the global position.

`DataConfig.path` is a mixture of one. Each set keeps its own order, epochs and held-out rows; the
mixture says which of them a position reads (mixing.py). A stand-in for a bad sample is drawn from
the same set, so damage moves no share. In a mixture the set's name stands before a sample's key.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from carillon.engine.config import UserError
from carillon.engine.data.config import DataConfig, JoinConfig, SetConfig
from carillon.engine.data.mixing import Mixture, Share, tempered
from carillon.engine.data.order import BlockOrder, HeldOut, Positions, SampleOrder, stable_hash
from carillon.engine.data.samples import RawSample, SampleError
from carillon.engine.data.shards import Dataset, Split, open_dataset


class Place(NamedTuple):
    """A row of a set: its number in the mixture and the row in its split."""

    set: int
    row: int


class OpenedSet(NamedTuple):
    """A set of the mixture, opened."""

    name: str
    config: SetConfig
    dataset: Dataset
    split: Split


class _Ordered(NamedTuple):
    held_out: HeldOut
    order: SampleOrder | BlockOrder


class TrainingData:
    """The sets of a run; `rows` is the order."""

    def __init__(self, sets: Sequence[OpenedSet], config: DataConfig, seed: int) -> None:
        """Raises UserError for a set without training rows, or shares that are no mixture."""
        self.sets, self.config, self.seed = tuple(sets), config, seed
        self._ordered = [self._order_of(one) for one in self.sets]
        self.mixture = self._mixture() if config.mixture else None
        self._flags = [self._flags_of(one) for one in self.sets]

    @property
    def num_training(self) -> int:
        return sum(one.held_out.num_training for one in self._ordered)

    @property
    def fingerprint(self) -> str:
        """Of the bytes that are read from the start on; `joined` has the sets that join later."""
        if self.mixture is None:
            return self.sets[0].dataset.fingerprint
        first = [one for one in self.sets if not isinstance(one.config, JoinConfig)]
        lines = [f"{one.name} {one.dataset.fingerprint} {one.split.name}\n" for one in first]
        return hashlib.sha256("".join(lines).encode()).hexdigest()

    @property
    def joined(self) -> dict[str, tuple[int, str]]:
        """Where each later set joins, and its fingerprint."""
        return {
            one.name: (one.config.from_position, one.dataset.fingerprint)
            for one in self.sets
            if isinstance(one.config, JoinConfig)
        }

    def check_joined(self, before: Mapping[str, Sequence[Any]], position: int) -> None:
        """Raises UserError where the sets that join are not those, of the same bytes, that a
        checkpoint at a position had read from."""
        now = self.joined
        for name, (start, fingerprint) in before.items():
            if start >= position or now.get(name) == (start, fingerprint):
                continue
            found = "is not given"
            if name in now:
                same = now[name][1] == fingerprint
                found = f"joins at {now[name][0]:,}" if same else "has another fingerprint"
            raise UserError(
                f"data.joins: {name} joined at {start:,} and the run has read from it; now it "
                f"{found}; restore it, or start anew with --fresh"
            )
        for name, (start, _) in now.items():
            if name not in before and start < position:
                raise UserError(
                    f"data.joins: {name} joins at {start:,}, but the run has read {position:,} "
                    f"samples; use from_position={position} or more"
                )

    def places(self, positions: Positions) -> list[Place]:
        """What stands at global `positions`, one dim of int64."""
        sets, index = np.zeros_like(positions), positions
        if self.mixture is not None:
            sets, index = self.mixture.places(positions)
        rows = np.empty_like(positions)
        for number in np.unique(sets).tolist():
            held_out, order = self._ordered[number]
            here = sets == number
            rows[here] = held_out.training_row(order.rows(index[here]))
        return [Place(*pair) for pair in zip(sets.tolist(), rows.tolist(), strict=True)]

    def stand_in(self, place: Place, position: int, attempt: int) -> Place:
        """What is read where the sample of a position is bad, from the same set."""
        held_out, order = self._ordered[place.set]
        drawn = np.array([order.replacement(position, attempt)])
        return Place(place.set, int(held_out.training_row(drawn)[0]))

    def read(self, place: Place) -> RawSample:
        """The sample at a place. Raises SampleError when it is damaged."""
        one = self.sets[place.set]
        try:
            raw = one.split.read(place.row)
        except SampleError as error:
            raise SampleError(self._named(one, error.key), error.reason) from None
        return raw._replace(key=self._named(one, raw.key))

    def key(self, place: Place) -> str:
        """The key of the sample at a place, from the index alone."""
        one = self.sets[place.set]
        return self._named(one, one.split.key(place.row))

    def flagged(self, place: Place, raw: RawSample) -> bool:
        """Whether the settings pass over the sample for what curation said of it."""
        flags = self._flags[place.set]
        if not flags:
            return False
        said = raw.meta.get("curation")
        found = said.get("flags") if isinstance(said, dict) else None
        return isinstance(found, dict) and not flags.isdisjoint(found)

    def validation_places(self) -> Iterator[Place]:
        """All held-out rows, those of the first set first."""
        for number, one in enumerate(self._ordered):
            yield from (Place(number, row) for row in one.held_out.validation_rows().tolist())

    def epochs(self, position: int) -> dict[str, float]:
        """How often each set of a mixture was gone through before a position."""
        if self.mixture is None:
            return {}
        drawn = self.mixture.drawn(position).tolist()
        pairs = zip(self.sets, self._ordered, drawn, strict=True)
        return {one.name: n / ordered.held_out.num_training for one, ordered, n in pairs}

    def _flags_of(self, one: OpenedSet) -> frozenset[str]:
        """The names of curation's stages whose flagged items are passed over."""
        if not self.config.filters.nsfw:
            return frozenset()
        pipeline = one.dataset.manifest.source.get("pipeline") or {}
        stages = pipeline.get("stages") or ()
        names = frozenset(s.get("name") or s["type"] for s in stages if s.get("type") == "nsfw")
        if not names:
            raise UserError(
                f"data.filters.nsfw: {one.dataset.place} was not scored; curate it with a stage of "
                "type nsfw, as recipes/curate/web.yaml has one, or set data.filters.nsfw=false"
            )
        return names

    def _named(self, one: OpenedSet, key: str) -> str:
        return key if self.mixture is None else f"{one.name}/{key}"

    def _order_of(self, one: OpenedSet) -> _Ordered:
        held_out = HeldOut(len(one.split), self.config.validation_every)
        num, shuffle = held_out.num_training, self.config.shuffle
        if num < 1:
            raise UserError(f"{one.dataset.place}: the split {one.split.name} has no training rows")
        seed = stable_hash(self.seed, "set", one.name) if self.config.mixture else self.seed
        if shuffle.block_rows is None:
            return _Ordered(held_out, SampleOrder(num, seed))
        block, window = shuffle.block_rows, shuffle.window_blocks
        return _Ordered(held_out, BlockOrder(num, seed, block=block, window=window))

    def _mixture(self) -> Mixture:
        sizes = [one.held_out.num_training for one in self._ordered]
        weights = [one.config.weight for one in self.sets]
        temperature = self.config.mixture_temperature
        shares = [
            Share(name=one.name, weight=weight, from_position=_joins_at(one.config))
            for one, weight in zip(self.sets, tempered(sizes, weights, temperature), strict=True)
        ]
        try:
            return Mixture(shares, self.seed)
        except ValueError as error:
            raise UserError(f"data.mixture: {error}") from None


def open_training(config: DataConfig) -> list[OpenedSet]:
    """The sets to train on, opened. Raises UserError when one or its split is not there."""
    if config.mixture:
        first = [_opened(n, one, f"data.mixture.{n}") for n, one in config.mixture.items()]
        return first + [_opened(n, one, f"data.joins.{n}") for n, one in config.joins.items()]
    alone = SetConfig(path=config.path, shards=config.shards, split=config.split)
    return [_opened("", alone, "data")]


def training_data(config: DataConfig, seed: int) -> TrainingData:
    """As open_training, in order."""
    return TrainingData(open_training(config), config, seed)


def only_set(config: DataConfig) -> OpenedSet:
    """The one set that a run reads. Raises UserError where it reads a mixture: name one then."""
    if config.mixture:
        names = ", ".join(config.mixture)
        raise UserError(
            f"the run reads a mixture of {names}: name the path of a set, by --data of a command, "
            "or by evaluation.retrieval.NAME.path in a recipe (evaluation.in_training.every=0: "
            "no scores while training)"
        )
    return open_training(config)[0]


def language_weights(config: DataConfig, sets: Sequence[OpenedSet]) -> Mapping[str, float]:
    """The weight of each language in the choice of a caption.

    With `language_temperature` T a language of n captions is chosen as often as n^(1/T) says: its
    weight is n^(1/T) / n, times what `language_weights` gives it. A set that joins changes no
    weight of a language that was there, so no choice before it. Raises UserError where the sets do
    not say how many captions they have.
    """
    if config.language_temperature is None:
        return config.language_weights
    joining = [one for one in sets if isinstance(one.config, JoinConfig)]
    first = _captions_by_language([one for one in sets if one not in joining])
    counts = _captions_by_language(joining) | first
    power = 1 / config.language_temperature - 1
    return {
        language: config.language_weights.get(language, 1.0) * num**power
        for language, num in counts.items()
        if num
    }


def _captions_by_language(sets: Sequence[OpenedSet]) -> dict[str, int]:
    counts: dict[str, int] = {}
    for one in sets:
        of_split = one.dataset.manifest.splits[one.split.name].languages
        if not of_split:
            raise UserError(
                f"data.language_temperature: {one.dataset.place} does not say how many captions it "
                "has in each language; take it in by `carillon ingest`, or give language_weights"
            )
        for language, num in of_split.items():
            counts[language] = counts.get(language, 0) + num
    return counts


def _joins_at(config: SetConfig) -> int:
    return config.from_position if isinstance(config, JoinConfig) else 0


def _opened(name: str, config: SetConfig, where: str) -> OpenedSet:
    dataset = open_dataset(config.path if config.path is not None else list(config.shards))
    splits = dataset.splits
    if config.split is not None:
        if config.split not in splits:
            raise UserError(
                f"{where}.split: {config.split} is not in the set; it has {', '.join(splits)}"
            )
        return OpenedSet(name, config, dataset, splits[config.split])
    if "train" in splits:
        return OpenedSet(name, config, dataset, splits["train"])
    if len(splits) == 1:
        return OpenedSet(name, config, dataset, next(iter(splits.values())))
    raise UserError(f"{where}.split: name one of the set's splits: {', '.join(splits)}")
