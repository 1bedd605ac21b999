import io
from collections import Counter
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from carillon.engine.config import UserError, build
from carillon.engine.data.config import DataConfig
from carillon.engine.data.loader import TrainingLoader
from carillon.engine.data.pair_ids import NO_ID
from carillon.engine.data.pairs import Batch, PositionedSamples
from carillon.engine.data.shards import ShardWriter, open_dataset
from carillon.engine.data.tokenizer import Tokenizer
from carillon.engine.data.training_data import only_set, training_data

TOKENIZER = Tokenizer.train(["red green blue dog cat"], vocab_size=300)
CPU = torch.device("cpu")


def png(value: int) -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.full((20, 20, 3), value, dtype=np.uint8)).save(file, "PNG")
    return file.getvalue()


def write_set(path: Path, num: int = 37, bad: set[int] = frozenset()) -> Path:  # type: ignore[assignment]
    with ShardWriter(path, name="set", source={}) as writer:
        for i in range(num):
            media = b"not a picture" if i in bad else png(i)
            captions = {"en": [f"dog {i}", f"cat {i}"], "fr": [f"chien {i}"]}
            meta = {"captions": captions} | ({} if i % 5 == 0 else {"kind": i % 5})
            writer.write(f"key{i:03d}", {"png": media}, meta)
    return path


def samples(path: str | Path, same_field: str | None = None, **changes: Any) -> PositionedSamples:
    values = {"path": str(path), "batch_size": 8, "num_workers": 0, **changes}
    config = build(DataConfig, values)
    return PositionedSamples(
        training_data(config, 11),
        TOKENIZER,
        size=16,
        context=16,
        same_field=same_field,
    )


def batches(parts: PositionedSamples, num: int, rank: int = 0, world: int = 1) -> list[Batch]:
    loader = TrainingLoader(parts, rank=rank, world_size=world, device=CPU)
    return [batch for batch, _ in zip(loader, range(num), strict=False)]


def test_batches_are_the_same_at_any_world_size_and_worker_count(tmp_path: Path) -> None:
    path = write_set(tmp_path / "set")
    whole = batches(samples(path), 7)  # past the end of an epoch
    for world, workers in ((1, 2), (2, 0), (4, 0)):
        parts = [
            batches(samples(path, num_workers=workers), 7, rank, world) for rank in range(world)
        ]
        for step, batch in enumerate(whole):
            shares = [part[step] for part in parts]
            assert [key for share in shares for key in share.keys] == batch.keys
            assert torch.equal(torch.cat([share.images for share in shares]), batch.images)
            assert torch.equal(torch.cat([share.lengths for share in shares]), batch.lengths)


def test_a_set_in_an_object_store_gives_the_same_batches(s3: Any, tmp_path: Path) -> None:
    """With workers, which are forked from a process that has read from the store."""
    path = write_set(tmp_path / "set")
    for file in path.iterdir():
        s3.put_object(Bucket="bucket", Key=f"sets/{file.name}", Body=file.read_bytes())
    there = samples("s3://bucket/sets", num_workers=2)
    for one, other in zip(batches(samples(path), 7), batches(there, 7), strict=True):
        assert one.keys == other.keys
        assert torch.equal(one.images, other.images)


def test_every_sample_comes_once_an_epoch(tmp_path: Path) -> None:
    parts = samples(write_set(tmp_path / "set", num=40))
    keys = [key for batch in batches(parts, 10) for key in batch.keys]
    assert set(Counter(keys).values()) == {2}
    assert keys[:40] != keys[40:]


def test_resume_continues_the_stream(tmp_path: Path) -> None:
    path = write_set(tmp_path / "set")
    whole = batches(samples(path), 6)
    loader = TrainingLoader(samples(path), rank=0, world_size=1, device=CPU)
    for _ in zip(loader, range(3), strict=False):
        pass
    state = loader.state_dict()
    # zip draws one batch more than it yields when the range ends first; the state counts it.
    assert state["position"] == 32
    resumed = TrainingLoader(samples(path), rank=0, world_size=1, device=CPU)
    resumed.load_state_dict(state)
    after = [batch for batch, _ in zip(resumed, range(2), strict=False)]
    assert [batch.keys for batch in after] == [batch.keys for batch in whole[4:6]]
    assert torch.equal(after[0].images, whole[4].images)


def test_bad_samples_are_replaced_named_and_counted(tmp_path: Path) -> None:
    path = write_set(tmp_path / "set", bad={3, 20})
    loader = TrainingLoader(samples(path), rank=0, world_size=1, device=CPU)
    found: list[tuple[str, str]] = []
    keys: list[str] = []
    for batch, _ in zip(loader, range(5), strict=False):
        found += batch.bad
        keys += batch.keys
    assert {key for key, _ in found} == {"key003", "key020"}
    assert all("picture" in reason or "format" in reason for _, reason in found), found
    assert not {"key003", "key020"} & set(keys)
    assert loader.num_bad == len(found)
    shares = [batches(samples(path), 5, rank, 2) for rank in range(2)]
    again = [key for step in range(5) for rank in range(2) for key in shares[rank][step].keys]
    assert again == keys  # stand-ins too are drawn by position


def test_too_many_bad_samples_stop_the_run(tmp_path: Path) -> None:
    path = write_set(tmp_path / "set", bad={1})
    loader = TrainingLoader(samples(path), rank=0, world_size=1, device=CPU)
    loader.check_bad_share(num_bad=99, num_read=100)  # too early to judge
    with pytest.raises(UserError, match=r"100 of 200 samples read are bad"):
        loader.check_bad_share(num_bad=100, num_read=100)
    loader.check_bad_share(num_bad=0, num_read=200)
    loader.check_bad_share(num_bad=2, num_read=400)
    with pytest.raises(UserError, match=r"5 of 405 samples read are bad, more than .*0\.01"):
        loader.check_bad_share(num_bad=5, num_read=400)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_set_of_garbage_ends_with_one_message(tmp_path: Path, workers: int) -> None:
    path = write_set(tmp_path / "set", num=30, bad=set(range(30)))
    named = r"the first (key\d{3}), key\d{3}, key\d{3}; \1: not a JPEG.*; is this the right"
    with pytest.raises(UserError, match=rf"^20 samples in a row are bad, {named}"):
        batches(samples(path, num_workers=workers), 1)


def test_captions_follow_the_stated_rule(tmp_path: Path) -> None:
    path = write_set(tmp_path / "set", num=10)
    languages = Counter(
        language for batch in batches(samples(path), 50) for language in batch.languages
    )
    assert abs(languages["en"] - 200) < 60  # a fair coin over 400 draws: 6 deviations
    only = batches(samples(path, filters={"lang_allow": ["fr"]}), 3)
    assert {language for batch in only for language in batch.languages} == {"fr"}
    weighted = Counter(
        language
        for batch in batches(samples(path, language_weights={"fr": 3.0}), 50)
        for language in batch.languages
    )
    assert abs(weighted["fr"] - 300) < 55
    texts = {TOKENIZER.decode(ids) for batch in batches(samples(path), 30) for ids in batch.tokens}
    assert {"dog 3", "cat 3", "chien 3"} <= {text.strip() for text in texts}


def write_mixed(path: Path, num: int, languages: Callable[[int], list[str]]) -> Path:
    with ShardWriter(path, name="mixed", source={}) as writer:
        for i in range(num):
            captions = {code: [f"dog {i}"] for code in languages(i)}
            meta = {"captions": captions} if captions else {}
            writer.write(f"key{i:03d}", {"png": png(i % 256)}, meta)
    return path


def test_few_captions_in_an_allowed_language_are_no_damage(tmp_path: Path) -> None:
    """One row in twenty qualifies."""
    path = write_mixed(tmp_path / "set", 200, lambda i: ["en", "sw"] if i % 20 == 3 else ["en"])
    only = {"filters": {"lang_allow": ["sw"]}, "max_bad_share": 0.0}
    loader = TrainingLoader(samples(path, **only), rank=0, world_size=1, device=CPU)
    whole: list[Batch] = []
    for batch, _ in zip(loader, range(25), strict=False):
        assert batch.bad == []
        whole.append(batch)
        loader.check_bad_share(**loader.counts())
    keys = Counter(key for batch in whole for key in batch.keys)
    assert set(keys) == {f"key{i:03d}" for i in range(3, 200, 20)}  # each comes once an epoch
    assert {language for batch in whole for language in batch.languages} == {"sw"}
    drawn = sum(batch.num_filtered for batch in whole)
    assert 2500 < drawn < 5500  # 19 for each of 200 samples, deviation 275
    for world, workers in ((1, 1), (2, 0), (4, 0)):
        parts = [
            batches(samples(path, num_workers=workers, **only), 25, rank, world)
            for rank in range(world)
        ]
        for step, batch in enumerate(whole):
            shares = [part[step] for part in parts]
            assert [key for share in shares for key in share.keys] == batch.keys
            assert torch.equal(torch.cat([share.images for share in shares]), batch.images)
            assert sum(share.num_filtered for share in shares) == batch.num_filtered


def test_filtered_samples_are_counted_apart_and_resumed(tmp_path: Path) -> None:
    path = write_mixed(tmp_path / "set", 40, lambda i: [["en"], ["fr"], []][i % 3])
    parts = samples(path, filters={"lang_allow": ["fr"]})
    loader = TrainingLoader(parts, rank=0, world_size=1, device=CPU)
    found = [batch for batch, _ in zip(loader, range(5), strict=False)]
    bad = [one for batch in found for one in batch.bad]
    assert {reason for _, reason in bad} == {"no caption in any language"}
    assert {int(key[3:]) % 3 for key, _ in bad} == {2}
    state = loader.state_dict()
    assert state["num_filtered"] == loader.num_filtered > 10
    resumed = TrainingLoader(parts, rank=0, world_size=1, device=CPU)
    resumed.load_state_dict(state)
    assert resumed.counts() == loader.counts()


def test_the_order_of_a_set_that_qualifies_whole_is_not_touched(tmp_path: Path) -> None:
    path = write_set(tmp_path / "set", num=40, bad={3, 20})
    plain, allowed = (
        batches(samples(path, filters={"lang_allow": codes}), 10) for codes in ([], ["fr", "en"])
    )
    assert [batch.keys for batch in plain] == [batch.keys for batch in allowed]
    numbers = [int(key[3:]) for batch in allowed[:2] for key in batch.keys]
    assert numbers == [29, 18, 15, 30, 34, 1, 7, 12, 23, 6, 22, 8, 9, 6, 35, 37]  # ever since
    assert [key for key, _ in allowed[1].bad] == ["key003"]  # replaced by the second 6
    assert sum(batch.num_filtered for batch in allowed) == 0


@pytest.mark.parametrize("workers", [0, 1])
def test_a_set_without_an_allowed_language_says_what_it_has(tmp_path: Path, workers: int) -> None:
    path = write_mixed(tmp_path / "set", 30, lambda i: ["en", "fr"] if i else ["und"])
    parts = samples(path, num_workers=workers, filters={"lang_allow": ["sw", "ha"]})
    message = (
        r"^none of 5,000 rows drawn has a caption in sw, ha; .* captions in en, fr, und\. Choose"
    )
    with pytest.raises(UserError, match=message):
        batches(parts, 1)


def test_a_language_without_weight_is_not_asked_for(tmp_path: Path) -> None:
    path = write_mixed(tmp_path / "set", 30, lambda i: [["en"], ["fr"]][i % 2])
    found = batches(samples(path, language_weights={"fr": 0.0}), 5)
    assert {language for batch in found for language in batch.languages} == {"en"}
    with pytest.raises(UserError, match=r"a caption in a language of weight above 0; .* in "):
        batches(samples(path, language_weights={"fr": 0.0, "en": 0.0}), 1)


def test_damage_met_in_the_search_is_a_share_of_what_was_read(tmp_path: Path) -> None:
    loader = TrainingLoader(samples(write_set(tmp_path / "set")), rank=0, world_size=1, device=CPU)
    loader.check_bad_share(num_bad=5, num_read=400, num_filtered=4000)
    with pytest.raises(UserError, match=r"50 of 4450 samples read are bad"):
        loader.check_bad_share(num_bad=50, num_read=400, num_filtered=4000)


def test_held_out_rows_are_never_trained_on(tmp_path: Path) -> None:
    parts = samples(write_set(tmp_path / "set", num=40), validation_every=10)
    keys = {key for batch in batches(parts, 20) for key in batch.keys}
    assert keys == {f"key{i:03d}" for i in range(40) if i % 10 != 9}


def test_microbatches_are_consecutive_parts(tmp_path: Path) -> None:
    batch = batches(samples(write_set(tmp_path / "set")), 1)[0]
    parts = batch.microbatches(3)
    assert [len(part.keys) for part in parts] == [3, 3, 2]
    assert [key for part in parts for key in part.keys] == batch.keys
    assert torch.equal(torch.cat([part.images for part in parts]), batch.images)


def test_pairs_of_one_field_have_one_id_on_every_process(tmp_path: Path) -> None:
    path = write_set(tmp_path / "set")
    assert batches(samples(path), 1)[0].ids is None
    whole = batches(samples(path, "kind"), 1)[0].to(CPU)
    shares = [batches(samples(path, "kind", num_workers=rank), 1, rank, 2)[0] for rank in (0, 1)]
    assert whole.ids is not None
    ids = [part.ids for part in whole.microbatches(3)] + [share.ids for share in shares]
    parts = torch.cat([part for part in ids if part is not None])
    assert torch.equal(parts, torch.cat([whole.ids, whole.ids]))
    kinds = [int(key.removeprefix("key")) % 5 for key in whole.keys]
    for i, j in product(range(8), range(8)):
        if kinds[i] == 0:
            assert whole.ids[i] == NO_ID
        else:
            assert (whole.ids[i] == whole.ids[j]) == (kinds[i] == kinds[j])


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({}, "path: give either path or shards"),
        ({"path": "x", "shards": ["y"]}, "path: give either path or shards"),
        ({"path": "x", "validation_every": 1}, "would hold out every row"),
        ({"path": "x", "language_weights": {"en": -1}}, "0 or more is allowed"),
        (
            {
                "path": "x",
                "language_weights": {"en": 1, "sw": 2},
                "filters": {"lang_allow": ["en"]},
            },
            "language_weights: sw given, but filters.lang_allow has only en",
        ),
        ({"path": "x", "batch_size": 10**30}, "at most 1000000 is allowed"),
        ({"path": "x", "micro_batch_size": 10**30}, "at most 1000000 is allowed"),
        ({"path": "x", "batch_size": 1}, "at least 2 is allowed"),
    ],
)
def test_bad_settings_are_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        build(DataConfig, values)


def test_a_split_must_be_named_where_it_is_not_clear(tmp_path: Path) -> None:
    with ShardWriter(tmp_path / "set", name="set", source={}) as writer:
        for split in ("one", "two"):
            writer.write(split, {"png": png(1)}, {"captions": {"en": ["x"]}}, split=split)
    assert set(open_dataset(tmp_path / "set").splits) == {"one", "two"}
    with pytest.raises(UserError, match=r"name one of the set's splits: one, two"):
        only_set(build(DataConfig, {"path": str(tmp_path / "set")}))
    with pytest.raises(UserError, match=r"three is not in the set; it has one, two"):
        only_set(build(DataConfig, {"path": str(tmp_path / "set"), "split": "three"}))
    assert only_set(
        build(DataConfig, {"path": str(tmp_path / "set"), "split": "two"})
    ).split.name == ("two")
