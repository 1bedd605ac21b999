"""Scaling over data ranks: `carillon train` as two processes on two cores against one on one core.

The same share of pairs a process, so the two processes' batch is twice as large: efficiency is the
pairs a second of two over twice those of one. Each process computes in one thread on a core of its
own and loads in itself, so nothing but the exchange and the larger batch's loss is added. The sides
take turns of some steps (turns.py); the median over rounds counts. Real photos, as in
test_training.py, at its two step lengths: the longer step has the smaller share of exchange.
Run by `make bench-scaling`; writes results/scaling.json. On a machine that does other work the two
processes wait for the slower one in every step, so the figure is a lower bound there: the load is
in the file.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from record import BENCHMARKS, FLICKR8K, flickr8k_shards, keep
from turns import Contestant, Turn

from carillon.engine.data.shards import open_dataset
from carillon.engine.data.tokenizer import Tokenizer, captions_of
from carillon.engine.train.run_config import load_config, run_name

CONFIG = str(BENCHMARKS / "dual_encoder.yaml")
SHARE = 128
MODELS = {"patch 8": "vit-ti-8", "patch 16": "vit-ti-16"}
SIDES = {"one process": 1, "two processes": 2}
WARM_UP, STEPS_A_LINE = 2, 2


def run_ranks(arguments: list[str]) -> int:
    """Start as many processes as cores are given, each on its own; their largest exit code.

    They stay in this process group, which turns.py stops and continues as a whole.
    """
    cores = [int(core) for core in arguments[0].split(",")]
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    program = str(Path(sys.executable).with_name("carillon"))
    children = []
    for rank, core in enumerate(cores):
        place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": len(cores)}
        place |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        environment = {name: str(value) for name, value in place.items()}
        children.append(
            subprocess.Popen(
                ["taskset", "-c", str(core), program, "train", *arguments[1:]],
                # One process alone needs no group, and has none in a user's run.
                env=os.environ | (environment if len(cores) > 1 else {}),
            )
        )
    return max(abs(child.wait()) for child in children)


def contestant(name: str, folder: Path, shared: list[str], cores: list[int]) -> Contestant:
    number = SIDES[name]
    settings = [
        *shared,
        f"experiment.name=ranks-{number}",
        f"data.batch_size={number * SHARE}",
        f"logging.output={folder}",
    ]
    config = load_config(CONFIG, settings)
    lines = folder / run_name(config) / "metrics.jsonl"
    used = ",".join(map(str, cores[:number]))
    command = [sys.executable, str(Path(__file__)), "--ranks", used, CONFIG, *settings]
    return Contestant(command, lines, folder / f"{name}.log")


def compare(model: str, precision: str, rounds: int, num_lines: int) -> dict[str, Any]:
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) < max(SIDES.values()):
        raise SystemExit(f"{len(cores)} core is available; this benchmark needs two")
    turns: dict[str, list[Turn]] = {name: [] for name in SIDES}
    with tempfile.TemporaryDirectory() as name, ExitStack() as stack:
        folder = Path(name)
        (split,) = open_dataset(list(map(str, flickr8k_shards()))).splits.values()
        tokenizer = folder / "tokenizer.json"
        Tokenizer.train(captions_of(split, 100_000), vocab_size=8000).save(tokenizer)
        shared = [
            f"data.path={FLICKR8K}",
            f"data.tokenizer.path={tokenizer}",
            "data.num_workers=0",
            f"model.vision_backbone={MODELS[model]}",
            f"distributed.precision={precision}",
            "distributed.device=cpu",
            "distributed.watchdog_s=0",  # the processes stand still while the other side runs
            f"logging.interval_steps={STEPS_A_LINE}",
        ]
        sides = {n: stack.enter_context(contestant(n, folder, shared, cores)) for n in SIDES}
        for side in sides.values():
            side.turn(WARM_UP)
        for number in range(rounds):
            for side_name in list(SIDES)[:: 1 if number % 2 else -1]:
                turns[side_name].append(sides[side_name].turn(num_lines))
    steps = num_lines * STEPS_A_LINE
    rates = {
        name: [SIDES[name] * SHARE * steps / turn.wall_s for turn in taken]
        for name, taken in turns.items()
    }
    ratios = [
        two / (2 * one)
        for one, two in zip(rates["one process"], rates["two processes"], strict=True)
    ]
    return {
        "model": model,
        "precision": precision,
        "steps_a_turn": steps,
        "pairs_per_s": {n: round(statistics.median(each), 1) for n, each in rates.items()},
        "efficiency": round(statistics.median(ratios), 3),
        "efficiency_by_round": [round(ratio, 3) for ratio in ratios],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--lines", type=int, default=2, help="log lines a turn, of two steps each")
    parser.add_argument("--smoke", action="store_true", help="one short case, and nothing is kept")
    given = parser.parse_args()
    if given.smoke:
        print(json.dumps(compare("patch 16", "fp32", 1, 1)))
        return
    results = []
    for model in MODELS:
        for precision in ("fp32", "bf16"):
            results.append(compare(model, precision, given.rounds, given.lines))
            print(json.dumps(results[-1]), flush=True)
    keep(
        "scaling",
        {
            "what": f"pairs a second of `carillon train` with {SHARE} pairs a process; efficiency: "
            "of two processes on two cores over twice that of one process on one core",
            "sides": {
                "one process": "one thread on one core, which loads too",
                "two processes": "data parallel, gloo; each as that one, on a core of its own",
            },
            "results": results,
        },
    )


if __name__ == "__main__":
    if sys.argv[1:2] == ["--ranks"]:
        sys.exit(run_ranks(sys.argv[2:]))
    main()
