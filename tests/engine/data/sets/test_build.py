import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from carillon.engine.config import UserError
from carillon.engine.data.sets.build import (
    LEFT_OUT,
    Collected,
    Item,
    LeftOut,
    Recipe,
    build_set,
    is_heldout,
    summary,
)

SamplesOf = Callable[..., dict[str, Any]]


def make(number: int) -> Item | LeftOut:
    if number == 3:
        return LeftOut(key="n3", reason="three is out")
    key = "bad.key" if number == 4 else f"n{number}"
    meta = {"captions": {"en": [f"number {number}"]}, "licence": "CC0-1.0"}
    return Item(key=key, split="train", members={"png": b"%d" % number}, meta=meta)


def recipe(num_jobs: int = 10, **settings: Any) -> Recipe[int]:
    return Recipe(
        name="numbers",
        version=1,
        settings=settings,
        collect=lambda: Collected(
            packages={"debian:x=1": "ab" * 32},
            tools={"maker": "2"},
            jobs=range(num_jobs),
            left_out=[LeftOut(key="early", reason="was no job")],
        ),
        make=make,
    )


def never() -> Collected[int]:
    raise AssertionError("fetched")


def test_a_set_is_built_and_what_is_left_out_is_listed(
    tmp_path: Path, samples_of: SamplesOf
) -> None:
    dataset = build_set(recipe(colour="red"), tmp_path / "set")
    assert list(samples_of(dataset)) == [f"n{n}" for n in (0, 1, 2, 5, 6, 7, 8, 9)]
    lines = (tmp_path / "set" / LEFT_OUT).read_text().splitlines()
    assert [json.loads(line)["key"] for line in lines] == ["early", "n3", "bad.key"]
    assert json.loads(lines[1])["reason"] == "three is out"
    assert dataset.manifest.source == {
        "kind": "numbers",
        "recipe": 1,
        "colour": "red",
        "limit": None,
        "packages": {"debian:x=1": "ab" * 32},
        "tools": {"maker": "2"},
    }
    text = "\n".join(summary(dataset, "numbers"))
    assert "train                  8 numbers" in text
    assert "texts: en 8" in text
    assert "licences: CC0-1.0 8" in text
    assert "left out: 3" in text


def test_a_limit_is_spread_over_all(tmp_path: Path, samples_of: SamplesOf) -> None:
    dataset = build_set(recipe(1000), tmp_path / "set", limit=4)
    assert list(samples_of(dataset)) == ["n0", "n250", "n500", "n750"]


def test_a_finished_set_is_reused_without_fetching(tmp_path: Path) -> None:
    first = build_set(recipe(shades=("a", "b")), tmp_path / "set")
    kept = replace(recipe(shades=("a", "b")), collect=never)
    assert build_set(kept, tmp_path / "set").fingerprint == first.fingerprint
    other = replace(kept, version=2)
    for changed, limit in ((other, None), (kept, 3)):
        with pytest.raises(UserError, match="built with other settings"):
            build_set(changed, tmp_path / "set", limit=limit)
    again = build_set(recipe(5), tmp_path / "set", overwrite=True)
    assert again.fingerprint != first.fingerprint


def test_a_place_that_cannot_be_written_is_told_before_fetching(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    stuck = replace(recipe(), collect=never)
    with pytest.raises(UserError, match="file"):
        build_set(stuck, tmp_path / "file" / "set")


@pytest.mark.parametrize(
    ("options", "message"),
    [({"limit": 0}, "at least one sample"), ({"workers": 0}, "at least one process")],
)
def test_bad_settings_are_refused(tmp_path: Path, options: dict[str, int], message: str) -> None:
    with pytest.raises(UserError, match=message):
        build_set(recipe(), tmp_path / "set", **options)
    assert not (tmp_path / "set").exists()


def test_held_out_shares() -> None:
    names = [f"name {number}" for number in range(4000)]
    # Binomial: 400 and 200 expected, three standard deviations of 19 and 14.
    assert 343 < sum(map(is_heldout, names)) < 457
    assert 158 < sum(is_heldout(name, 20) for name in names) < 242
