"""Loader processes that die or hang are replaced: no sample is lost, doubled or waited for."""

import io
import logging
import os
import signal
import threading
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from carillon.engine.config import UserError, build
from carillon.engine.data import pairs, workers
from carillon.engine.data.ahead import ahead
from carillon.engine.data.config import DataConfig
from carillon.engine.data.loader import TrainingLoader, stall_report, state_of_all
from carillon.engine.data.packed_captions import Caption, PackedCaptions
from carillon.engine.data.samples import RawSample
from carillon.engine.data.shards import ShardWriter
from carillon.engine.data.stages import StageBoard
from carillon.engine.data.tokenizer import Tokenizer
from carillon.engine.data.training_data import training_data

TOKENIZER = Tokenizer.train(["red green blue dog cat"], vocab_size=300)
CPU = torch.device("cpu")
HERE = os.getpid()


class Hostile(PackedCaptions):
    """Captions of which one does something to the process that reads it."""

    def __init__(self, path: Path, harm: Callable[[], object], key: str, timeout_s: float) -> None:
        packing = {"window": 3, "streams": 2}
        values = {"path": str(path), "batch_size": 2, "num_workers": 2, "packing": packing}
        config = replace(build(DataConfig, values), worker_timeout_s=timeout_s)
        super().__init__(training_data(config, 5), TOKENIZER, context=24)
        self.harm, self.harmful = harm, key

    def sample_of(self, position: int, raw: RawSample, purpose: str = "sample") -> Caption:
        if raw.key == self.harmful and os.getpid() != HERE:
            self.harm()
        return super().sample_of(position, raw, purpose)


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("sets") / "set"
    with ShardWriter(out, name="set", source={}) as writer:
        for i in range(40):
            writer.write(f"key{i:02d}", {}, {"captions": {"en": [f"dog {i}"]}})
    return out


@pytest.fixture(autouse=True)
def _look_often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers, "_LOOK_EVERY_S", 0.3)


def loader_of(
    path: Path,
    harm: Callable[[], object] = lambda: None,
    key: str = "none",
    timeout_s: float = 60.0,
) -> TrainingLoader[Any]:
    samples = Hostile(path, harm, key, timeout_s)
    return TrainingLoader(samples, rank=0, world_size=1, device=CPU)


def read(loader: TrainingLoader[Any], num: int) -> list[list[str]]:
    with closing(iter(loader)) as batches:
        return [batch.keys for batch in islice(batches, num)]


def test_a_killed_worker_is_replaced_without_losing_a_sample(
    path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    whole = read(loader_of(path), 30)
    loader, found = loader_of(path), []
    before = signal.getsignal(signal.SIGCHLD)
    with closing(iter(loader)) as batches:
        for number in range(30):
            found.append(next(batches).keys)
            if number in (3, 4, 17):
                source = batches.gi_frame.f_locals["source"]
                os.kill(source._board.pid(number % 2), signal.SIGKILL)
    assert found == whole
    assert signal.getsignal(signal.SIGCHLD) == before  # nothing is raised in a step's midst
    replaced = [
        one.getMessage() for one in caplog.records if "take their place" in one.getMessage()
    ]
    assert 1 <= len(replaced) <= 3  # two of the kills may meet one start
    assert all("ended with code -9" in message for message in replaced)


def die() -> None:
    os.kill(os.getpid(), signal.SIGSEGV)


@pytest.mark.parametrize(
    ("harm", "reason"), [(die, "ended with code -11"), (lambda: time.sleep(60), "at one stage")]
)
def test_a_sample_that_ends_workers_is_set_aside(
    path: Path, harm: Callable[[], object], reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    loader = loader_of(path, harm, "key07", timeout_s=1.0)
    keys = [key for part in read(loader, 30) for key in part]
    assert "key07" not in keys
    assert {f"key{i:02d}" for i in range(40)} - set(keys) == {"key07"}
    assert loader.num_bad >= 1
    aside = [one.getMessage() for one in caplog.records if "is set aside" in one.getMessage()]
    assert len(aside) == 1
    assert aside[0].startswith("sample key07 is set aside")
    assert reason in caplog.text
    state = state_of_all([loader.state_dict()])
    assert state["aside"] == [(0, 7)]
    further = loader_of(path, harm, "key07")
    further.load_state_dict(state)
    caplog.clear()
    assert "key07" not in [key for part in read(further, 10) for key in part]
    assert "take their place" not in caplog.text  # it is known from the start


def test_workers_that_always_die_end_the_run(path: Path) -> None:
    class Doomed(Hostile):
        def batch(self, positions: Any) -> Any:
            if os.getpid() != HERE:
                os.kill(os.getpid(), signal.SIGKILL)
            return super().batch(positions)

    samples = Doomed(path, lambda: None, "none", 60.0)
    loader = TrainingLoader(samples, rank=0, world_size=1, device=CPU)
    with pytest.raises(UserError, match=r"lost 6 times in a row .* code -9 .* a lack of memory"):
        read(loader, 1)


def test_errors_of_the_samples_are_no_lost_workers(path: Path) -> None:
    def fail() -> None:
        raise RuntimeError("a mistake in the code")

    with pytest.raises(RuntimeError, match="a mistake in the code"):
        read(loader_of(path, fail, "key03"), 40)


def test_the_board_says_who_is_at_what_for_how_long() -> None:
    board = StageBoard(2)
    with board.stage("read"):
        board.at((1, 7))
        time.sleep(0.02)
        with board.stage("decode"):
            time.sleep(0.04)
            doing = board.doing(0)
            assert doing.stage == "decode"
            assert doing.sample == (1, 7)
            assert 0.04 <= doing.seconds < 5
        assert board.doing(0).stage == "read"
    spent = board.take_seconds()
    assert 0.02 <= spent["read"] < spent["decode"] + 0.02
    assert board.take_seconds()["decode"] == 0
    assert board.doing(1) == ("idle", pytest.approx(time.monotonic(), rel=0.1), None)


def test_a_stall_names_the_stage_and_what_helps() -> None:
    spent = {"idle": 9.0, "order": 0.5, "read": 3.0, "decode": 1.5}
    told = stall_report(0.42, spent, 2)
    assert told.startswith(
        "training waits for data 42% of the time; loading is order 10%, read 60%"
    )
    assert "raise data.num_workers, or read runs of rows (data.shuffle.block_rows)" in told
    assert "loads in the training process" in stall_report(0.42, spent, 0)
    assert "block_rows" not in stall_report(0.42, {"idle": 0.0, "read": 1.0, "decode": 2.0}, 1)


def test_copies_come_in_order_and_errors_in_their_turn() -> None:
    numbers = iter(range(5))

    def take() -> int:
        number = next(numbers, None)
        if number is None:
            raise UserError("no more")
        return number

    found = []
    copied = ahead(take, lambda number: -number, CPU)
    for _ in range(5):
        one = next(copied)
        found.append((one.host, one.wait()))
    with pytest.raises(UserError, match="no more"):
        next(copied)
    assert found == [(number, -number) for number in range(5)]
    with closing(ahead(lambda: 1, lambda number: number, CPU)) as endless:
        assert next(endless).wait() == 1
    names = {thread.name for thread in threading.enumerate() if thread.is_alive()}
    deadline = time.monotonic() + 10
    while "copies-ahead" in names and time.monotonic() < deadline:
        time.sleep(0.02)
        names = {thread.name for thread in threading.enumerate() if thread.is_alive()}
    assert "copies-ahead" not in names


def png(value: int) -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.full((20, 20, 3), value, dtype=np.uint8)).save(file, "PNG")
    return file.getvalue()


def test_a_suspect_is_decoded_apart_and_used_when_it_is_sound(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """One worker ends in the decoder, as by a fault that does not come again."""
    with ShardWriter(tmp_path / "set", name="set", source={}) as writer:
        for i in range(30):
            writer.write(f"key{i:02d}", {"png": png(i)}, {"captions": {"en": [f"dog {i}"]}})
    values = {"path": str(tmp_path / "set"), "batch_size": 4, "num_workers": 1}

    def batches() -> list[pairs.Batch]:
        data = training_data(build(DataConfig, values), 5)
        samples = pairs.PositionedSamples(data, TOKENIZER, size=16, context=16)
        loader = TrainingLoader(samples, rank=0, world_size=1, device=CPU)
        with closing(iter(loader)) as found:
            return list(islice(found, 8))

    whole = batches()
    decode = pairs.decode_image

    def crash(data: bytes, **options: Any) -> Any:
        if data == png(7) and os.getpid() != HERE:
            die()
        return decode(data, **options)

    monkeypatch.setattr(pairs, "decode_image", crash)
    again = batches()
    assert [batch.keys for batch in again] == [batch.keys for batch in whole]
    assert all(torch.equal(a.images, b.images) for a, b in zip(again, whole, strict=True))
    assert not any(batch.bad for batch in again)
    assert caplog.text.count("take their place") == 1
    assert "(decode)" in caplog.text
