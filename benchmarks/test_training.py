"""Training speed: `carillon train` against OpenCLIP's loop, and against a bare loop of our model.

Loading is part of it on all sides: one worker each, real photos from the same tars, random resized
crop, captions chosen and tokenised. The contestants take turns of some steps (turns.py); wall
seconds of a turn are what counts, core seconds are given beside them since they are steadier on a
busy machine. Ours writes its metrics and TensorBoard events as it always does.
"""

from __future__ import annotations

import statistics
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from record import BENCHMARKS, FLICKR8K, flickr8k_shards
from turns import Contestant, Turn

from carillon.engine.data.shards import open_dataset
from carillon.engine.data.tokenizer import Tokenizer, captions_of
from carillon.engine.train.run_config import load_config, run_name

CONFIG = BENCHMARKS / "dual_encoder.yaml"
_STEPS_A_LINE = 2
_SIZES = {"patch 8": "vit-ti-8", "patch 16": "vit-ti-16"}


@pytest.fixture(scope="module")
def tokenizer_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    (split,) = open_dataset(list(map(str, flickr8k_shards()))).splits.values()
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    Tokenizer.train(captions_of(split, 100_000), vocab_size=8000).save(path)
    return path


def overrides(tokenizer_file: Path, output: Path, precision: str, patch: str) -> list[str]:
    return [
        f"data.path={FLICKR8K}",
        f"data.tokenizer.path={tokenizer_file}",
        f"model.vision_backbone={_SIZES[patch]}",
        f"distributed.precision={precision}",
        f"logging.output={output}",
        f"logging.interval_steps={_STEPS_A_LINE}",
    ]


def contestant(name: str, folder: Path, settings: list[str]) -> Contestant:
    """A side of the comparison, started and standing still."""
    lines, log = folder / f"{name}.jsonl", folder / f"{name}.log"
    arguments = [str(CONFIG), *settings]
    if name == "carillon":
        config = load_config(str(CONFIG), settings)
        lines = Path(config.logging.output) / run_name(config) / "metrics.jsonl"
        command = [str(Path(sys.executable).with_name("carillon")), "train", *arguments]
    elif name == "bare_loop":
        script = str(BENCHMARKS / "bare_loop.py")
        command = [sys.executable, script, *arguments, "--lines", str(lines)]
    else:
        script = str(BENCHMARKS / "openclip_loop.py")
        command = [sys.executable, script, *arguments, "--lines", str(lines)]
        command += ["--tuned"] if name == "openclip_tuned" else []
    return Contestant(command, lines, log)


def race(benchmark: Any, sides: dict[str, Contestant], rounds: int, num_lines: int) -> None:
    """Alternate turns of all sides; ours is what pytest-benchmark times, the others its set-up."""
    turns: dict[str, list[Turn]] = {name: [] for name in sides}
    for side in sides.values():
        side.turn(2)  # imports, first allocations, workers

    def others() -> None:
        for name in list(sides)[1:]:
            turns[name].append(sides[name].turn(num_lines))

    benchmark.pedantic(
        lambda: turns["carillon"].append(sides["carillon"].turn(num_lines)),
        setup=others,
        rounds=rounds,
    )
    pairs = 128 * _STEPS_A_LINE * num_lines
    wall = {name: statistics.median(turn.wall_s for turn in took) for name, took in turns.items()}
    core = {name: statistics.median(turn.core_s for turn in took) for name, took in turns.items()}
    benchmark.extra_info.update(
        unit="pictures/s, medians of alternating turns; ratios above 1: ours is faster",
        training_threads=1,
        loader_workers=1,
        steps_a_turn=_STEPS_A_LINE * num_lines,
        images_per_s={name: round(pairs / took, 1) for name, took in wall.items()},
        images_per_core_s={name: round(pairs / took, 1) for name, took in core.items()},
        peak_resident_mb={name: round(side.peak_resident_mb()) for name, side in sides.items()},
        ratio={name: _ratio(took, turns["carillon"], 0) for name, took in turns.items()},
        ratio_of_core_time={
            name: _ratio(took, turns["carillon"], 1) for name, took in turns.items()
        },
    )


def _ratio(theirs: list[Turn], ours: list[Turn], which: int) -> float:
    """Median over rounds of their time over ours."""
    return round(
        statistics.median(t[which] / o[which] for t, o in zip(theirs, ours, strict=True)), 3
    )


@pytest.mark.parametrize("patch", ["patch 8", "patch 16"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_against_openclip(
    benchmark: Any, tmp_path: Path, tokenizer_file: Path, precision: str, patch: str
) -> None:
    settings = overrides(tokenizer_file, tmp_path / "runs", precision, patch)
    with ExitStack() as stack:
        names = ("carillon", "openclip", "openclip_tuned")
        sides = {n: stack.enter_context(contestant(n, tmp_path, settings)) for n in names}
        race(benchmark, sides, rounds=9, num_lines=1)
    assert benchmark.extra_info["ratio"]["openclip"] >= 1.0


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_against_bare_loop(
    benchmark: Any, tmp_path: Path, tokenizer_file: Path, precision: str
) -> None:
    """Patch 16: the shorter the step, the more a trainer's overhead shows."""
    settings = overrides(tokenizer_file, tmp_path / "runs", precision, "patch 16")
    with ExitStack() as stack:
        names = ("carillon", "bare_loop")
        sides = {n: stack.enter_context(contestant(n, tmp_path, settings)) for n in names}
        race(benchmark, sides, rounds=15, num_lines=3)
    assert benchmark.extra_info["ratio"]["bare_loop"] >= 0.97
