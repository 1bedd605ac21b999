"""Samples of many sizes into packs of a fixed one: first-fit over a window of a stream.

The global order is dealt to `num_streams` streams: stream s reads positions s, s + num_streams, and
so on. Each fills its own packs: a window of its next samples is kept, the first that fits what is
left of the pack's budget is taken, another is read in its place, and the pack is done when none in
the window fits. So what a pack holds follows from the order alone, and which process or worker
fills a stream changes nothing. A sample is never cut by a pack's end and never left out.
A size and a budget are counts by kind, such as tokens, patches and pictures: all must fit.
State of a stream: how many packs it gave, how many samples it read, and which of those still wait.
Trade-off: streams do not share their windows, so each has some samples waiting at any time.
Source: first-fit by Johnson (1973), for vectors by Garey et al. (1976); here over a bounded window.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Generic, NamedTuple, TypeVar

T = TypeVar("T")
Sizes = tuple[int, ...]


class StreamState(NamedTuple):
    """Where a stream stands: `waiting` are numbers of its samples, in the order they were read."""

    packs: int = 0
    read: int = 0
    waiting: tuple[int, ...] = ()


class _Waiting(NamedTuple, Generic[T]):
    number: int
    sample: T
    sizes: Sizes


class Stream(Generic[T]):
    """One stream of samples into packs; `sample(n)` is its n-th, the same whenever asked."""

    def __init__(
        self,
        sample: Callable[[int], T],
        sizes: Callable[[T], Sizes],
        *,
        budget: Sizes,
        window: int,
        state: StreamState | None = None,
    ) -> None:
        self._sample, self._sizes, self._budget, self._window = sample, sizes, budget, window
        state = state or StreamState()
        self.packs, self.read = state.packs, state.read
        self._waiting = [self._read(number) for number in state.waiting]

    @property
    def state(self) -> StreamState:
        return StreamState(self.packs, self.read, tuple(one.number for one in self._waiting))

    def next_pack(self) -> list[T]:
        """The samples of the next pack, in the order in which they were taken; at least one."""
        left = self._budget
        taken: list[T] = []
        passed = 0  # the window's first samples that do not fit: room only shrinks, nor will they
        while passed < self._window:
            if passed == len(self._waiting):
                self._waiting.append(self._read(self.read))
                self.read += 1
            one = self._waiting[passed]
            if fits(one.sizes, left):
                taken.append(self._waiting.pop(passed).sample)
                left = less(left, one.sizes)
            else:
                passed += 1
        self.packs += 1
        return taken

    def _read(self, number: int) -> _Waiting[T]:
        """Raises ValueError for a size that is nothing or fits no pack: the caller's mistake."""
        sample = self._sample(number)
        sizes = self._sizes(sample)
        if not any(sizes) or not fits(sizes, self._budget):
            raise ValueError(f"a sample of sizes {sizes} for packs of {self._budget}")
        return _Waiting(number, sample, sizes)


def fits(sizes: Sizes, room: Sizes) -> bool:
    """Whether every count is within its room."""
    return all(size <= r for size, r in zip(sizes, room, strict=True))


def less(room: Sizes, sizes: Sizes) -> Sizes:
    """What is left of the room."""
    return tuple(r - size for size, r in zip(sizes, room, strict=True))


def pack_all(items: Iterable[T], sizes: Callable[[T], Sizes], budget: Sizes) -> list[list[T]]:
    """All items, each into the first pack with room for it."""
    packs: list[list[T]] = []
    left: list[Sizes] = []
    for item in items:
        of_item = sizes(item)
        place = next((i for i, room in enumerate(left) if fits(of_item, room)), len(packs))
        if place == len(packs):
            packs.append([])
            left.append(budget)
        packs[place].append(item)
        left[place] = less(left[place], of_item)
    return packs
