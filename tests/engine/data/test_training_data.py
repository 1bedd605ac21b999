"""A run's sets in one stream: shares, orders and held-out rows of their own."""

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from carillon.engine.config import UserError, build, config_hash
from carillon.engine.data.config import DataConfig
from carillon.engine.data.packed_captions import PackedCaptions
from carillon.engine.data.shards import ShardWriter
from carillon.engine.data.tokenizer import Tokenizer
from carillon.engine.data.training_data import (
    TrainingData,
    language_weights,
    only_set,
    open_training,
    training_data,
)

JOIN = {"path": "y", "from_position": 1}


@pytest.fixture(scope="module")
def sets(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("sets")
    for name, num in (("small", 30), ("large", 90), ("late", 20)):
        with ShardWriter(folder / name, name=name, source={}) as writer:
            for i in range(num):
                captions = {"en": [f"{name} {i}"]} | ({"fr": [f"le {i}"]} if i % 10 == 0 else {})
                writer.write(f"k{i:02d}", {"png": b"any"}, {"captions": captions})
    return {name: str(folder / name) for name in ("small", "large", "late")}


def config_of(sets: dict[str, str], joins: dict[str, int] | None = None, **more: Any) -> DataConfig:
    """`small` and `large`, and what joins at the positions given."""
    mixture = {name: {"path": sets[name]} for name in ("small", "large")}
    late = {
        name: {"path": sets["late"], "from_position": position}
        for name, position in (joins or {}).items()
    }
    return build(DataConfig, {"mixture": mixture, "joins": late, **more})


def keys(data: TrainingData, start: int, stop: int) -> list[str]:
    return [data.read(place).key for place in data.places(np.arange(start, stop))]


def test_sets_are_read_by_their_sizes_each_in_its_own_order(sets: dict[str, str]) -> None:
    data = training_data(config_of(sets), 3)
    assert data.num_training == 120
    found = keys(data, 0, 65536)
    names = Counter(key.partition("/")[0] for key in found)
    assert names == {"small": 16384, "large": 49152}
    small = [key for key in found if key.startswith("small/")]
    for epoch in range(5):  # every row once before any comes again
        assert len(set(small[30 * epoch : 30 * epoch + 30])) == 30
    assert data.epochs(65536) == pytest.approx({"small": 16384 / 30, "large": 49152 / 90})
    assert keys(training_data(config_of(sets), 3), 777, 800) == found[777:800]
    alone = training_data(build(DataConfig, {"path": sets["small"]}), 3)
    assert "/" not in keys(alone, 0, 1)[0]
    assert alone.epochs(7) == {}


def test_temperature_and_weights_set_the_shares(sets: dict[str, str]) -> None:
    even = training_data(config_of(sets, mixture_temperature=100.0), 3)
    share = sum(place.set == 0 for place in even.places(np.arange(65536))) / 65536
    assert 0.49 < share < 0.5
    mixture = {
        "small": {"path": sets["small"], "weight": 3},
        "large": {"path": sets["large"], "weight": 1},
    }
    given = training_data(build(DataConfig, {"mixture": mixture}), 3)
    assert sum(place.set == 0 for place in given.places(np.arange(65536))) == 49152


def test_a_set_joins_at_its_position_and_changes_nothing_before(sets: dict[str, str]) -> None:
    plain, joined = (training_data(config_of(sets, j), 3) for j in ({}, {"late": 500}))
    assert keys(plain, 0, 500) == keys(joined, 0, 500)
    after = Counter(key.partition("/")[0] for key in keys(joined, 500, 1500))
    assert 90 < after["late"] < 200  # 20 of 140 rows
    assert plain.fingerprint == joined.fingerprint
    assert list(joined.joined) == ["late"]
    assert joined.joined["late"][0] == 500
    assert config_hash(plain.config) == config_hash(joined.config)


def test_a_run_may_be_given_more_sets_but_not_other_ones(sets: dict[str, str]) -> None:
    def joined(joins: dict[str, int]) -> TrainingData:
        return training_data(config_of(sets, joins), 3)

    seen = joined({"late": 500}).joined
    joined({"late": 500}).check_joined(seen, 9000)
    joined({"late": 500, "later": 9000}).check_joined(seen, 9000)
    joined({"late": 700}).check_joined(seen, 400)  # none of it was read yet
    with pytest.raises(UserError, match="later joins at 8,999, but the run has read 9,000"):
        joined({"late": 500, "later": 8999}).check_joined(seen, 9000)
    with pytest.raises(UserError, match=r"late joined at 500 .* now it joins at 400; restore it"):
        joined({"late": 400}).check_joined(seen, 9000)
    with pytest.raises(UserError, match=r"late joined at 500 .* now it is not given; restore it"):
        joined({}).check_joined(seen, 9000)
    altered = {"late": (500, "0" * 64)}
    with pytest.raises(UserError, match=r"late joined at 500 .* now it has another fingerprint"):
        joined({"late": 500}).check_joined(altered, 9000)


def test_stand_ins_come_from_the_same_set_and_are_training_rows(sets: dict[str, str]) -> None:
    data = training_data(config_of(sets, validation_every=10), 3)
    held_out = set(data.validation_places())
    assert len(held_out) == 12
    for position, place in enumerate(data.places(np.arange(200))):
        stand_in = data.stand_in(place, position, 0)
        assert stand_in.set == place.set
        assert not {place, stand_in} & held_out


def test_languages_are_chosen_by_their_numbers_and_the_temperature(sets: dict[str, str]) -> None:
    def weights(**values: Any) -> dict[str, float]:
        config = config_of(sets, **values)
        return dict(language_weights(config, open_training(config)))

    assert weights() == {}
    assert weights(language_temperature=1.0) == {"en": 1.0, "fr": 1.0}
    joined = {"late": 500}
    assert weights(language_temperature=2.0, joins=joined) == weights(language_temperature=2.0)
    found = weights(language_temperature=2.0, language_weights={"fr": 3.0})
    assert found["en"] == pytest.approx(120**-0.5)
    assert found["fr"] == pytest.approx(3 * 12**-0.5)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"path": "x"}, "path: given beside mixture"),
        ({"split": "x"}, "split: given beside mixture"),
        ({"mixture": {"a b": {"path": "x"}}}, "'a b' is no name"),
        ({"joins": {"s": JOIN}}, "joins: s is in mixture already"),
        ({"mixture": {"a": {"path": "x", "weight": 1}, "b": {"path": "y"}}}, "b without a weight"),
        ({"mixture": {"a": {"path": "x", "weight": 0}}}, "all weights are 0"),
        ({"mixture": {"a": {}}}, r"mixture\.a\.path: give either path or shards"),
        ({"joins": {"b": {"path": "y"}}}, "from_position: missing"),
        ({"mixture": {}, "path": "x", "joins": {"b": JOIN}}, "joins: given, but there is no"),
        ({"mixture": {}, "path": "x", "mixture_temperature": 2.0}, "temperature: given, but there"),
    ],
)
def test_mixtures_that_contradict_themselves_are_refused(
    values: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        build(DataConfig, {"mixture": {"s": {"path": "s"}}, **values})


def test_what_the_sets_lack_is_named(sets: dict[str, str], tmp_path: Path) -> None:
    mixture = {"one": {"path": sets["small"]}, "two": {"path": sets["large"], "split": "dev"}}
    with pytest.raises(UserError, match=r"data\.mixture\.two\.split: dev is not in the set"):
        training_data(build(DataConfig, {"mixture": mixture}), 0)
    with pytest.raises(
        UserError, match="reads a mixture of small, large: name the path of a set, by"
    ):
        only_set(config_of(sets))
    heavy = {
        "one": {"path": sets["small"], "weight": 1},
        "two": {"path": sets["large"], "weight": 1e-9},
    }
    with pytest.raises(UserError, match=r"data\.mixture: two: a share of 1\.0e-09 is too small"):
        training_data(build(DataConfig, {"mixture": heavy}), 0)
    with ShardWriter(tmp_path / "bare", name="bare", source={}) as writer:
        writer.write("k", {"png": b"any"}, {})
    bare = build(DataConfig, {"path": str(tmp_path / "bare"), "language_temperature": 2.0})
    with pytest.raises(UserError, match="does not say how many captions"):
        language_weights(bare, open_training(bare))


def test_items_that_curation_flagged_are_passed_over(sets: dict[str, str], tmp_path: Path) -> None:
    stages = [{"type": "nsfw", "name": "unsafe", "action": "flag"}, {"type": "blur"}]
    source = {"kind": "curate", "pipeline": {"name": "p", "stages": stages}}
    with ShardWriter(tmp_path / "set", name="set", source=source) as writer:
        for i in range(20):
            flags = ({"unsafe": "nsfw 0.9"}, {"blur": "blur 3"}, {}, {})[i % 4]
            meta: dict[str, Any] = {"captions": {"en": [f"dog {i}"]}}
            if flags:
                meta["curation"] = {"flags": flags}
            writer.write(f"k{i:02d}", {}, meta)
    tokenizer = Tokenizer.train(["dog"], vocab_size=300)

    def read(**filters: Any) -> PackedCaptions:
        values = {"path": str(tmp_path / "set"), "batch_size": 2, "filters": filters}
        return PackedCaptions(training_data(build(DataConfig, values), 0), tokenizer, context=24)

    safe = [read(nsfw=True).batch([p]) for p in range(2)]
    flagged = {f"k{i:02d}" for i in range(0, 20, 4)}
    assert not {key for batch in safe for key in batch.keys} & flagged
    assert sum(batch.num_filtered for batch in safe) > 0
    assert not any(batch.bad for batch in safe)
    every = read().batch(range(2))
    assert flagged & set(every.keys)
    with pytest.raises(UserError, match=r"filters\.nsfw: .*small was not scored; curate it"):
        training_data(build(DataConfig, {"path": sets["small"], "filters": {"nsfw": True}}), 0)
