"""Rows of captions follow from their positions alone, and labels from where captions end."""

from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from carillon.engine.config import build
from carillon.engine.data.config import DataConfig
from carillon.engine.data.loader import TrainingLoader
from carillon.engine.data.packed_captions import PackedCaptions, Packing
from carillon.engine.data.packed_rows import IGNORED
from carillon.engine.data.positioned import open_split
from carillon.engine.data.shards import ShardWriter
from carillon.engine.data.tokenizer import Tokenizer

LENGTH = 10
TOKENIZER = Tokenizer.train(["red green blue dog cat"], vocab_size=300)


def rows_of(path: Path, num: int = 30, **changes: Any) -> PackedCaptions:
    if not path.exists():
        with ShardWriter(path, name="set", source={}) as writer:
            for i in range(num):
                captions = {"en": [f"dog {i}", f"red cat {i}"], "fr": [f"chien {i}"]}
                writer.write(f"key{i:03d}", {"png": b"any"}, {"captions": captions})
    values = {"path": str(path), "batch_size": 4, "num_workers": 0, "documents_per_row": 3}
    config = build(DataConfig, values | changes)
    return PackedCaptions(open_split(config), config, TOKENIZER, context=24, seed=5)


def test_a_row_is_captions_then_padding() -> None:
    rows = Packing(TOKENIZER, 8, LENGTH)([["cat dog", "red", ""], ["blue green red", "dog", "cat"]])
    bos, eos, pad = TOKENIZER.bos_id, TOKENIZER.eos_id, TOKENIZER.pad_id

    def ids(text: str) -> list[int]:
        return [bos, *TOKENIZER.ids(text)[:6], eos]

    first = ids("cat dog") + ids("red")
    assert rows.tokens[0].tolist() == first + [pad] * (LENGTH - len(first))
    ends = [0, len(ids("cat dog")), len(first), len(first), LENGTH]
    assert rows.offsets[0].tolist() == ends
    second = ids("blue green red") + ids("dog") + ids("cat")
    assert len(second) > LENGTH  # the last is cut or left out
    assert rows.tokens[1].tolist() == second[:LENGTH]
    assert rows.offsets[1, -2:].tolist() == [LENGTH, LENGTH]
    for tokens, labels, offsets in zip(rows.tokens, rows.labels, rows.offsets, strict=True):
        known = [t for t in range(LENGTH) if labels[t] != IGNORED]
        inside = {t for a, b in pairwise(offsets[:-1]) for t in range(a, b)}
        assert set(known) == inside - {int(end) - 1 for end in offsets[1:-1]}
        assert all(labels[t] == tokens[t + 1] for t in known)
    assert rows.positions[0].tolist()[: ends[1] + 1] == [*range(ends[1]), 0]


def test_any_ranks_and_groupings_give_the_same_rows(tmp_path: Path) -> None:
    samples = rows_of(tmp_path / "set")
    together = samples.batch(range(8))
    apart = [samples.batch([position]) for position in range(8)]
    for index, part in enumerate(zip(*(one.rows for one in apart), strict=True)):
        assert torch.equal(torch.cat(part), together.rows[index])
    cpu = torch.device("cpu")
    for world in (1, 2, 4):
        loaders = [
            iter(TrainingLoader(samples, rank=rank, world_size=world, device=cpu))
            for rank in range(world)
        ]
        for start in (0, 4):
            tokens = torch.cat([next(loader).rows.tokens for loader in loaders])
            assert torch.equal(tokens, together.rows.tokens[start : start + 4])


def test_blocks_keep_what_a_batch_reads_together(tmp_path: Path) -> None:
    shuffle = {"block_rows": 6, "window_blocks": 1}
    samples = rows_of(tmp_path / "set", shuffle=shuffle)
    for start in range(0, 10, 2):  # two rows of three captions make a window
        numbers = sorted(int(key[3:]) for key in samples.batch([start, start + 1]).keys)
        turned = sorted((number + 15) % 30 for number in numbers)
        assert min(one[-1] - one[0] for one in (numbers, turned)) == 5


def test_an_epoch_reads_every_training_row_once_and_no_other(tmp_path: Path) -> None:
    samples = rows_of(tmp_path / "set", validation_every=5)
    assert samples.num_per_epoch == 8  # 24 of 30 captions, 3 a row
    keys = Counter(samples.batch(range(8)).keys)
    held_out = {f"key{i:03d}" for i in range(4, 30, 5)}
    assert set(keys) == {f"key{i:03d}" for i in range(30)} - held_out
    assert set(keys.values()) == {1}


def test_held_out_rows_are_the_same_always(tmp_path: Path) -> None:
    samples = rows_of(tmp_path / "set", validation_every=5)
    rows, again = samples.held_out_rows(5), samples.held_out_rows(5)
    assert rows is not None
    assert again is not None
    assert torch.equal(rows.tokens, again.tokens)
    assert len(rows.tokens) == 2  # of 3 and 2 captions
    assert int((rows.offsets[:, :-1].diff(dim=1) > 0).sum()) == 5
    assert rows_of(tmp_path / "set").held_out_rows(5) is None


def test_rows_without_a_caption_are_bad_or_filtered(tmp_path: Path) -> None:
    path = tmp_path / "set"
    with ShardWriter(path, name="set", source={}) as writer:
        for i in range(12):
            captions = {"de": ["hund"]} if i == 1 else {"en": [f"dog {i}"]}
            writer.write(f"key{i:03d}", {"png": b"any"}, {"captions": captions} if i else {})
    samples = rows_of(path, filters={"lang_allow": ["en", "fr"]})
    batch = samples.batch(range(samples.num_per_epoch))
    assert [key for key, _ in batch.bad] == ["key000"]
    assert batch.num_filtered >= 1
    assert len(batch.keys) == 12
    assert not {"key000", "key001"} & set(batch.keys)
