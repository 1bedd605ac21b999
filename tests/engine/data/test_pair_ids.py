from pathlib import Path
from typing import Any

import pytest

from carillon.engine.config import UserError
from carillon.engine.data.pair_ids import NO_ID, check_field, pair_id
from carillon.engine.data.samples import RawSample, SampleError
from carillon.engine.data.shards import ShardWriter, open_dataset


def sample(**meta: Any) -> RawSample:
    return RawSample("key", b"", meta)


def test_equal_values_have_one_id_and_others_another() -> None:
    ids = [pair_id(sample(concept=value), "concept") for value in ("cat", "dog", "cat", "", 7, -7)]
    assert ids[0] == ids[2]
    assert len(set(ids)) == 5
    assert all(0 <= one < 2**63 for one in ids)
    assert ids[0] == 1714832134300930969  # on every machine, for ever


def test_no_value_is_no_id() -> None:
    assert pair_id(sample(), "concept") == NO_ID
    assert pair_id(sample(concept=None), "concept") == NO_ID


@pytest.mark.parametrize(("value", "kind"), [([1], "list"), ({}, "dict"), (True, "bool")])
def test_other_values_are_no_id_but_a_bad_sample(value: object, kind: str) -> None:
    with pytest.raises(SampleError, match=f"its concept is of type {kind}; text or a whole number"):
        pair_id(sample(concept=value), "concept")


def test_a_field_must_be_there(tmp_path: Path) -> None:
    with ShardWriter(tmp_path / "set", name="set", source={}) as writer:
        for i in range(300):
            meta = {"captions": {"en": ["a"]}, "label": i} | ({"rare": 1} if i == 150 else {})
            writer.write(f"{i:03d}", {"png": b"x"}, meta)
    (split,) = open_dataset(tmp_path / "set").splits.values()
    check_field([split], "label")
    check_field([split], "rare")  # the samples that are read are spread evenly
    with pytest.raises(UserError, match="none of 100 samples has 'lable'; they have"):
        check_field([split], "lable")
