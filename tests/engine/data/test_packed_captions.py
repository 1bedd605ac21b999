"""Rows of captions follow from their positions alone, and labels from where captions end."""

import json
from collections import Counter
from contextlib import ExitStack, closing
from itertools import accumulate, islice, pairwise
from pathlib import Path
from typing import Any

import torch

from carillon.engine.config import build
from carillon.engine.data.config import DataConfig
from carillon.engine.data.loader import TrainingLoader
from carillon.engine.data.packed_captions import Caption, CaptionRows, PackedCaptions, Rows
from carillon.engine.data.packed_rows import IGNORED
from carillon.engine.data.shards import ShardWriter
from carillon.engine.data.tokenizer import Tokenizer
from carillon.engine.data.training_data import training_data

LENGTH = 14
CPU = torch.device("cpu")
TOKENIZER = Tokenizer.train(["red green blue dog cat"], vocab_size=300)


def rows_of(path: Path, num: int = 30, context: int = 24, **changes: Any) -> PackedCaptions:
    if not path.exists():
        with ShardWriter(path, name="set", source={}) as writer:
            for i in range(num):
                captions = {
                    "en": [f"dog {i}", f"red cat {i}"],
                    "fr": [f"chien {i}" + " dog" * (i % 4)],
                }
                writer.write(f"key{i:03d}", {"png": b"any"}, {"captions": captions})
    packing = {"window": 6, "streams": 2, "max_documents": 5}
    values = {"path": str(path), "batch_size": 4, "num_workers": 0, "packing": packing}
    config = build(DataConfig, values | changes)
    return PackedCaptions(training_data(config, 5), TOKENIZER, context=context)


def batches(samples: PackedCaptions, num: int, rank: int = 0, world: int = 1) -> list[CaptionRows]:
    loader = TrainingLoader(samples, rank=rank, world_size=world, device=CPU)
    with closing(iter(loader)) as found:
        return list(islice(found, num))


def document(text: str) -> Caption:
    return Caption(text, [TOKENIZER.bos_id, *TOKENIZER.ids(text), TOKENIZER.eos_id])


def test_a_row_is_captions_then_padding() -> None:
    packs = [[document("cat dog"), document("red")], [document("blue green red dog")]]
    rows = Rows(TOKENIZER, LENGTH, 3)(packs)
    for number, pack in enumerate(packs):
        ids = [token for caption in pack for token in caption.ids]
        assert rows.tokens[number].tolist() == ids + [TOKENIZER.pad_id] * (LENGTH - len(ids))
        ends = [0, *accumulate(len(caption.ids) for caption in pack)]
        ends += [ends[-1]] * (3 - len(pack))
        assert rows.offsets[number].tolist() == [*ends, LENGTH]
    for tokens, labels, offsets in zip(rows.tokens, rows.labels, rows.offsets, strict=True):
        known = [t for t in range(LENGTH) if labels[t] != IGNORED]
        inside = {t for a, b in pairwise(offsets[:-1]) for t in range(a, b)}
        assert set(known) == inside - {int(end) - 1 for end in offsets[1:-1]}
        assert all(labels[t] == tokens[t + 1] for t in known)
    first = len(packs[0][0].ids)
    assert rows.positions[0].tolist()[: first + 1] == [*range(first), 0]


def test_any_ranks_and_workers_give_the_same_rows_after_any_stop(tmp_path: Path) -> None:
    samples = rows_of(tmp_path / "set")
    whole = batches(samples, 12)
    states: list[dict[str, Any]] = []
    for world, workers, num in ((1, 2, 3), (2, 0, 2), (4, 1, 4), (2, 3, 3)):
        loaders = [
            TrainingLoader(
                rows_of(tmp_path / "set", num_workers=workers), rank=r, world_size=world, device=CPU
            )
            for r in range(world)
        ]
        for loader in loaders if states else ():
            streams = {k: v for state in states for k, v in state["streams"].items()}
            loader.load_state_dict(json.loads(json.dumps(states[0] | {"streams": streams})))
        done = loaders[0].position // 4
        with ExitStack() as stack:
            found = [stack.enter_context(closing(iter(loader))) for loader in loaders]
            for step in range(done, done + num):
                parts = [next(one) for one in found]
                for index, part in enumerate(zip(*(one.rows for one in parts), strict=True)):
                    assert torch.equal(torch.cat(part), whole[step].rows[index]), (world, step)
                assert [key for one in parts for key in one.keys] == whole[step].keys
        states = [loader.state_dict() for loader in loaders]
        assert len({loader.position for loader in loaders}) == 1
        owners = Counter(number for state in states for number in state["streams"])
        assert set(owners.values()) == {1}


def test_no_more_workers_than_take_turns(tmp_path: Path) -> None:
    packing = {"streams": 6}
    for asked, used in ((0, 0), (1, 1), (4, 3), (5, 3), (6, 6), (100, 6)):
        samples = rows_of(tmp_path / "set", num_workers=asked, packing=packing)
        loader = TrainingLoader(samples, rank=0, world_size=1, device=CPU)
        assert loader.num_workers == used


def test_rows_are_full_of_whole_captions(tmp_path: Path) -> None:
    packing = {"window": 16, "streams": 1}
    found = batches(rows_of(tmp_path / "set", num=200, context=64, packing=packing), 20)
    padding = torch.cat([batch.padding() for batch in found])
    assert padding.float().mean() < 0.03 * 64
    for batch in found:
        for tokens, offsets in zip(batch.rows.tokens, batch.rows.offsets, strict=True):
            for start, stop in pairwise(offsets[:-1].tolist()):
                if stop > start:
                    assert tokens[start] == TOKENIZER.bos_id
                    assert tokens[stop - 1] == TOKENIZER.eos_id


def test_samples_come_once_an_epoch_and_never_held_out_ones(tmp_path: Path) -> None:
    samples = rows_of(tmp_path / "set", validation_every=5)
    keys = [key for batch in batches(samples, 30) for key in batch.keys]
    held_out = {f"key{i:03d}" for i in range(4, 30, 5)}
    counts = Counter(keys)
    assert set(counts) == {f"key{i:03d}" for i in range(30)} - held_out
    # 8 streams have at most 6 waiting each, so counts differ by what waits.
    assert max(counts.values()) - min(counts.values()) <= 1 + 48 // 24


def test_held_out_rows_are_the_same_always(tmp_path: Path) -> None:
    samples = rows_of(tmp_path / "set", validation_every=5)
    rows, again = samples.held_out_rows(5), samples.held_out_rows(5)
    assert rows is not None
    assert again is not None
    assert torch.equal(rows.tokens, again.tokens)
    assert int((rows.offsets[:, :-1].diff(dim=1) > 0).sum()) == 5
    assert rows_of(tmp_path / "set").held_out_rows(5) is None


def test_rows_without_a_caption_are_bad_or_filtered(tmp_path: Path) -> None:
    path = tmp_path / "set"
    with ShardWriter(path, name="set", source={}) as writer:
        for i in range(12):
            captions = {"de": ["hund"]} if i == 1 else {"en": [f"dog {i}"]}
            writer.write(f"key{i:03d}", {"png": b"any"}, {"captions": captions} if i else {})
    samples = rows_of(path, filters={"lang_allow": ["en", "fr"]})
    loader = TrainingLoader(samples, rank=0, world_size=1, device=CPU)
    found = list(islice(iter(loader), 4))
    bad = [key for batch in found for key, _ in batch.bad]
    assert set(bad) == {"key000"}
    assert loader.num_filtered >= 1
    assert not {"key000", "key001"} & {key for batch in found for key in batch.keys}
    resumed = TrainingLoader(
        rows_of(path, filters={"lang_allow": ["en", "fr"]}), rank=0, world_size=1, device=CPU
    )
    resumed.load_state_dict(loader.state_dict())
    next(iter(resumed))
    further = TrainingLoader(samples, rank=0, world_size=1, device=CPU)
    list(islice(iter(further), 5))
    assert resumed.counts() == further.counts()  # what waits is not counted twice
