import threading
from collections.abc import Iterator

import pytest

from carillon.engine.data.ingest_items import Entry, Inline, Item, Rejected, Url
from carillon.engine.data.ingest_loading import HostHealth, Loaded, unwanted
from carillon.engine.data.ingest_order import HostGate, Pace, Slot, in_order


def item(host: str, number: int = 0) -> Item:
    return Item(source="x", name=f"{number}", members={"": Url(f"http://{host}/{number}")})


def inline(number: int, size: int = 10) -> Item:
    return Item(source="x", name=f"{number}", members={"": Inline(bytes(size))})


def started(gate: HostGate, now_s: float) -> list[str]:
    found = []
    while (slot := gate.start(now_s)) is not None:
        found.append(slot.entry)
    return [where.url for one in found for where in one.members.values()]


def test_a_host_is_asked_so_often_and_others_are_not_held_up() -> None:
    gate = HostGate(Pace(per_host=2, per_host_per_s=4))
    slots = [Slot(item("a", number)) for number in range(5)] + [Slot(item("b"))]
    for slot in slots:
        gate.add(slot)
    assert started(gate, 0.0) == ["http://a/0", "http://b/0"]
    assert gate.wait_s(0.0) == 0.25
    assert started(gate, 0.2) == []
    assert started(gate, 0.25) == ["http://a/1"]
    assert gate.wait_s(0.25) is None, "two are under way, so an end is waited for"
    gate.end(slots[0])
    assert gate.wait_s(0.25) == 0.25
    assert started(gate, 0.5) == ["http://a/2"]
    gate.end(slots[1])
    gate.end(slots[2])
    assert started(gate, 9.0) == ["http://a/3"]
    assert started(gate, 9.3) == ["http://a/4"]


def test_results_come_in_the_order_of_the_source() -> None:
    first = threading.Event()

    def load(one: Item) -> Loaded | str:
        if one.name == "0":
            assert first.wait(60)  # the last of the window lets the first end
        if one.name == "7":
            first.set()
        return f"loaded {one.name}"

    entries: list[Entry] = [inline(number) for number in range(20)]
    entries[3] = Rejected(source="x", image="3", reason="refused")
    pace = Pace(connections=8, window_items=8)
    found = [result for _, result in in_order(iter(entries), load, pace)]
    assert found == ["refused" if n == 3 else f"loaded {n}" for n in range(20)]


@pytest.mark.parametrize(
    ("pace", "most"), [(Pace(window_items=5), 5), (Pace(window_bytes=1000, window_items=100), 11)]
)
def test_the_window_is_bounded_in_items_and_bytes(pace: Pace, most: int) -> None:
    """Of a source without end; nothing of it is read that need not be."""
    read = taken = 0

    def entries() -> Iterator[Entry]:
        nonlocal read
        for number in range(200):
            read += 1
            assert read - taken <= most
            yield inline(number, size=100)

    def load(one: Item) -> Loaded:
        return Loaded({"png": bytes(100)}, {})

    for _ in in_order(entries(), load, pace):
        taken += 1
    assert (read, taken) == (200, 200)


def test_an_error_of_the_program_is_raised() -> None:
    def load(one: Item) -> str:
        raise RuntimeError("a fault")

    with pytest.raises(RuntimeError, match="a fault"):
        list(in_order(iter([inline(0)]), load, Pace()))


def test_a_host_that_does_not_answer_is_left_alone() -> None:
    health = HostHealth()
    for _ in range(19):
        health.failed("a")
    health.check("a")
    health.failed("a")
    with pytest.raises(ValueError, match="a could not be reached 20 times in a row"):
        health.check("a")
    health.check("b")
    health.answered("a")
    health.check("a")


@pytest.mark.parametrize(
    ("header", "wish"),
    [
        ("noai", "noai"),
        ("nofollow, NoImageAI", "noimageai"),
        ("nofollow", None),
        ("otherbot: noindex", None),
        ("otherbot: noindex, nofollow", None),
        ("carillon-engine: noindex", "noindex"),
        ("unavailable_after: 25 Jun 2030 15:00:00 PST, noai", "noai"),
        ("", None),
    ],
)
def test_wishes_of_a_site(header: str, wish: str | None) -> None:
    assert unwanted({"x-robots-tag": header}) == wish
