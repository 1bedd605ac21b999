"""Conditions on items: what fits, and what is refused."""

import pytest

from carillon.engine.config import UserError
from carillon.engine.data.explore.selection import (
    keyed,
    parse_conditions,
    select,
    with_copies,
)
from carillon.engine.data.shards import Dataset


def keys(dataset: Dataset, *conditions: str) -> list[str]:
    return [one.key for one in select(dataset, parse_conditions(conditions)).found]


@pytest.mark.parametrize(
    ("conditions", "expected"),
    [
        (["language=fr"], ["picture0", "picture1", "picture2", "picture3"]),
        (["language=fr", "split=held_out"], ["picture3"]),
        (["modality=audio"], ["sound0", "sound1"]),
        (["licence!=CC0-1.0"], ["picture2", "sound0", "sound1", "picture3"]),
        (["licence=unstated"], ["sound0", "sound1"]),
        (["licence~by"], ["picture2", "picture3"]),
        (["duration_s>=0.5"], ["sound0", "sound1"]),
        (["width<48"], []),
        (["width = 48", "author=Ada"], ["picture1", "picture3"]),
        (["text~SPOKEN words 1"], ["sound1"]),
        (["text~ada"], ["text1"]),
        (["text=a patch 2"], ["picture2"]),
        (["rights.holder=holder 3"], ["picture3"]),
        (["key=text0"], ["text0"]),
    ],
)
def test_what_fits(dataset: Dataset, conditions: list[str], expected: list[str]) -> None:
    assert sorted(keys(dataset, *conditions)) == sorted(expected)


@pytest.mark.parametrize(
    ("condition", "message"),
    [
        ("language", "is no condition: give FIELD=VALUE"),
        ("=x", "is no condition"),
        ("width=wide", "width is a number"),
        ("width~4", "width is a number"),
        ("width>nan", "width is a number"),
        ("licence<MIT", "licence is no number"),
        ("auhtor=Ada", "has a field 'auhtor'"),
    ],
)
def test_what_is_refused(dataset: Dataset, condition: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        keys(dataset, condition)


def test_unknown_keys_are_named(dataset: Dataset) -> None:
    assert [one.key for one in keyed(dataset, ["picture3", "text1"])] == ["text1", "picture3"]
    with pytest.raises(UserError, match=r"has no item 'a', 'b', 'c' and 1 more; nothing was done"):
        keyed(dataset, ["d", "c", "b", "a", "text1"])


def test_copies_are_found_by_their_bytes(dataset: Dataset) -> None:
    """Texts without media share a checksum, and are no copies of each other."""
    found = keyed(dataset, ["text0"])
    assert with_copies(dataset, found) == found
