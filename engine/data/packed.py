"""Positions to packs: the streams that fill them, and where they stand.

Pack position p is pack p // S of stream p % S (packing.py), where S is the packs of a batch times
`data.packing.streams`. A subclass says what becomes of a sample, how large it is and what a batch
of packs is.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Generic, NamedTuple, TypeVar

from carillon.engine.data.packing import Sizes, Stream, StreamState
from carillon.engine.data.positioned import B, Positioned
from carillon.engine.data.samples import RawSample
from carillon.engine.data.stages import StageBoard
from carillon.engine.data.training_data import TrainingData

T = TypeVar("T")


class Filled(NamedTuple, Generic[T]):
    """Packs of a batch, what was bad or filtered on the way, and the streams after it."""

    packs: list[list[T]]
    bad: list[tuple[str, str]]
    num_filtered: int
    streams: Mapping[int, StreamState]


class Packed(Positioned[B], Generic[B, T]):
    """Global position -> pack of samples T."""

    def __init__(self, data: TrainingData, budget: Sizes) -> None:
        super().__init__(data)
        self.budget = budget
        self.turns = self.config.packing.streams
        self.num_streams = self.turns * self.config.batch_size
        self._states: Mapping[int, StreamState] = {}
        self._streams: dict[int, Stream[T]] = {}
        self._bad: list[tuple[str, str]] = []
        self._num_filtered = 0

    @abstractmethod
    def sample_of(self, position: int, raw: RawSample) -> T:
        """What becomes of a sample. Raises SampleError or FilteredSample."""

    @abstractmethod
    def sizes_of(self, sample: T) -> Sizes:
        """By the kinds of the budget."""

    @abstractmethod
    def collate(self, filled: Filled[T]) -> B:
        """The batch of these packs."""

    def start(self, streams: Mapping[int, StreamState], board: StageBoard) -> None:
        super().start(streams, board)
        self._states, self._streams = dict(streams), {}

    def batch(self, positions: Sequence[int]) -> B:
        streams = {p % self.num_streams: self._stream(p % self.num_streams) for p in positions}
        self._bad, self._num_filtered = [], 0  # what waits in a resumed stream was counted before
        packs = []
        for position in positions:
            number, stream = divmod(position, self.num_streams)
            assert streams[stream].packs == number, "a stream gives its packs in order"
            packs.append(streams[stream].next_pack())
        states = {number: stream.state for number, stream in streams.items()}
        with self.board.stage("collate"):
            return self.collate(Filled(packs, self._bad, self._num_filtered, states))

    def _stream(self, number: int) -> Stream[T]:
        def sample(index: int) -> T:
            place = index * self.num_streams + number
            (made,), num_filtered = self.draw([place], self._bad, self.sample_of)
            self._num_filtered += num_filtered
            return made

        if number not in self._streams:
            self._streams[number] = Stream(
                sample,
                self.sizes_of,
                budget=self.budget,
                window=self.config.packing.window,
                state=self._states.get(number),
            )
        return self._streams[number]
