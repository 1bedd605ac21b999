"""Proof that a killed run loses nothing: `make prove-kill`.

A reference run of two processes is never interrupted. Others of the same config are killed with
SIGKILL, every process of them at once, at random moments (a step, a time since the start, within a
save), and resumed:
- series `any`: 1, 2 or 4 processes, never as many as the time before;
- series `two`: always two;
- series `packed`: a decoder on rows packed from a mixture of two sets, with a reference of its own,
  1, 2 or 4 processes and 0 to 4 loader workers.
It holds that after every kill each checkpoint with a final name verifies, that every resume starts
from the newest of them, that the sequence of sample keys at the end is the reference's to the
sample, and that series `two` ends with the reference's fp32 weights and moments bit for bit. State
is kept in --work, so the proof itself can be interrupted; results are appended to
results/prove_kill.jsonl.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from process_tree import kill_all
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from carillon.engine.data.shards import ShardWriter
from carillon.engine.strict_yaml import dump_yaml
from carillon.engine.train.checkpoint import Checkpoint, list_checkpoints
from carillon.engine.train.checkpoint_reader import read_tensors
from carillon.engine.train.run import git_commit

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "prove_kill.jsonl"
EMOJI = ROOT / "data" / "emoji"
START_S = 300.0  # a launch that shows no sign of life for so long is a violation


class Violation(Exception):
    """What was to be proven does not hold."""


# Runs


@dataclass
class Run:
    """One run of the proof: its config and its folder of runs."""

    config: Path
    output: Path

    def launch(self, num_processes: int, log: Path, *, workers: int = 1) -> subprocess.Popen[str]:
        arguments = [str(self.config), f"logging.output={self.output}"]
        arguments += [f"data.num_workers={workers}"]
        if num_processes == 1:
            command = ["-m", "carillon.engine.cli", "train", *arguments]
        else:
            torchrun = ["-m", "torch.distributed.run", "--standalone"]
            recipe = [str(ROOT / "recipes/train.py"), "--config", *arguments]
            command = [*torchrun, f"--nproc-per-node={num_processes}", *recipe]
        with log.open("w") as stderr:
            return subprocess.Popen(
                [sys.executable, *command],
                stderr=stderr,
                text=True,
                start_new_session=True,
                env=os.environ | {"OMP_NUM_THREADS": "1"},
            )

    @property
    def path(self) -> Path | None:
        return next(self.output.glob("kill-*"), None)

    def keys(self) -> list[dict[str, Any]]:
        """Whole lines of sample_keys.jsonl."""
        file = self.path / "sample_keys.jsonl" if self.path else None
        if file is None or not file.is_file():
            return []
        text = file.read_text()
        return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]

    def keys_file(self) -> int | None:
        """The inode of sample_keys.jsonl: another one once a launch has cut it and trains."""
        file = self.path / "sample_keys.jsonl" if self.path else None
        return file.stat().st_ino if file is not None and file.is_file() else None

    def checkpoints(self) -> list[Checkpoint]:
        return list_checkpoints(self.path / "checkpoints") if self.path else []

    def unfinished_saves(self) -> list[Path]:
        return list(self.path.glob("checkpoints/*.tmp")) if self.path else []

    def tensors(self) -> dict[str, torch.Tensor]:
        """Every tensor of the newest checkpoint."""
        newest = self.checkpoints()[-1]
        newest.verify()
        metadata = FileSystemReader(newest.path).read_metadata().state_dict_metadata
        tensors = {
            name: torch.full(entry.size, float("nan"), dtype=entry.properties.dtype)
            for name, entry in metadata.items()
            if isinstance(entry, TensorStorageMetadata)
        }
        read_tensors(newest, tensors, partial=False)
        return tensors


@dataclass
class Series:
    """Kills and resumes of one run; `kills` is what has happened so far."""

    name: str
    run: Run
    worlds: tuple[int, ...]
    num_kills: int
    num_steps: int
    workers: tuple[int, ...] = (1,)
    kills: list[dict[str, Any]] = field(default_factory=list)

    def go(self, work: Path) -> None:
        """Kill and resume until `num_kills`, then let the run finish."""
        state = work / f"{self.name}.json"
        if state.is_file():
            self.kills = json.loads(state.read_text())
        while len(self.kills) < self.num_kills:
            self.kills.append(self._kill_once(len(self.kills), work))
            state.write_text(json.dumps(self.kills))
            print(f"{self.name} {len(self.kills)}/{self.num_kills}: {self.kills[-1]}", flush=True)
        world = self.worlds[-1]
        finish(self.run, world, work / f"{self.name}-end.log", self._newest())

    def _newest(self) -> int:
        """The newest complete checkpoint's step (0: none), all of them verified."""
        for checkpoint in self.run.checkpoints():
            checkpoint.verify()
        return max((c.step for c in self.run.checkpoints()), default=0)

    def _kill_once(self, number: int, work: Path) -> dict[str, Any]:
        draw = random.Random(f"{self.name} {number}")
        last = self.kills[-1]["processes"] if self.kills else None
        others = [world for world in self.worlds if world != last]
        world, before = draw.choice(others or self.worlds), self._newest()
        workers = draw.choice(self.workers)
        mode = draw.choices(["step", "save", "time"], [5, 4, 1])[0]
        # On average the last kill falls near the end of the run.
        ahead = max(3.0, 2 * (self.num_steps - before) / (self.num_kills - number))
        target = min(before + draw.uniform(1, ahead), self.num_steps - 4)
        log = work / f"{self.name}-{number}.log"
        old_lines = self.run.keys_file()
        process, started = self.run.launch(world, log, workers=workers), time.monotonic()
        try:
            self._wait(process, mode, target, draw, old_lines)
        finally:
            kill_all(process)
        if process.returncode not in (-signal.SIGKILL, None):
            raise Violation(f"ended by itself with {process.returncode}:\n{log.read_text()}")
        resumed = resumed_at(log)
        if resumed is not None and resumed != before:
            raise Violation(f"resumed at step {resumed}, the newest checkpoint was of {before}")
        keys = self.run.keys()
        return {
            "processes": world,
            "workers": workers,
            "mode": mode,
            "seconds": round(time.monotonic() - started, 2),
            "resumed_at": resumed,
            "killed_in_step": keys[-1]["step"] if keys else 0,
            "within_a_save": resumed is not None and bool(self.run.unfinished_saves()),
            "newest_checkpoint": self._newest(),
        }

    def _wait(
        self,
        process: subprocess.Popen[str],
        mode: str,
        target: float,
        draw: random.Random,
        old_lines: int | None,
    ) -> None:
        """Return at the moment to kill, or once the launch has ended by itself."""
        end = time.monotonic() + (draw.uniform(0, 10) if mode == "time" else START_S)
        while process.poll() is None and time.monotonic() < end:
            is_training = mode != "time" and self.run.keys_file() != old_lines
            keys = self.run.keys() if is_training else []
            reached = bool(keys) and keys[-1]["step"] >= target
            if reached and (mode == "step" or self.run.unfinished_saves()):
                time.sleep(draw.uniform(0, 0.03))
                return
            time.sleep(0.001)
        if mode != "time" and process.poll() is None:
            raise Violation(f"step {target:.0f} not reached within {START_S:.0f} s")


def resumed_at(log: Path) -> int | None:
    """The step that a launch said it starts from; None when it was killed before it said so."""
    for line in log.read_text().splitlines():
        if line.startswith("run ") and " resumes at step " in line:
            return int(line.split(" resumes at step ")[1].split()[0])
        if line.startswith("run ") and " trains for " in line:
            return 0
    return None


def finish(run: Run, world: int, log: Path, before: int) -> None:
    """Let a run train to its end. Raises Violation when it does not, or starts elsewhere."""
    code = run.launch(world, log).wait()
    if code != 0:
        raise Violation(f"the run ended with {code}:\n{log.read_text()}")
    said_finished = "is finished" in log.read_text()
    if not said_finished and resumed_at(log) != before:
        raise Violation(f"resumed at {resumed_at(log)}, the newest checkpoint was of {before}")


# The proof


def write_set(out: Path) -> Path:
    """500 generated pictures with captions, where the emoji set has not been built."""
    with ShardWriter(out, name="generated", source={}) as writer:
        for i in range(500):
            blocks = np.random.default_rng(i).integers(0, 256, (4, 4, 3), dtype=np.uint8)
            file = BytesIO()
            Image.fromarray(blocks.repeat(8, 0).repeat(8, 1)).save(file, "PNG")
            captions = {"en": [f"picture number {i}"], "de": [f"Bild Nummer {i}"]}
            writer.write(f"picture{i}", {"png": file.getvalue()}, {"captions": captions})
    return out


def config_values(data: Path, num_steps: int) -> dict[str, Any]:
    tower = {"width": 64, "depth": 2, "num_heads": 2}
    return {
        "experiment": {"name": "kill"},
        "data": {
            "path": str(data),
            "batch_size": 32,
            "num_workers": 1,
            "tokenizer": {"vocab_size": 1000, "max_captions": 5000},
        },
        "model": {
            "dims": 32,
            "vision_backbone": "vit-ti-16",
            "vision": {"image_size": 32, **tower},
            "text_backbone": "clip-text-ti",
            "text": {"context": 24, **tower},
        },
        "optimization": {"steps": num_steps, "warmup_steps": 10, "ema_decay": 0.99},
        "distributed": {"precision": "fp32", "device": "cpu"},
        "logging": {
            "interval_steps": 1,
            "checkpoint_interval_steps": 3,
            "sample_keys": True,
            "tensorboard": False,
        },
    }


def packed_values(sets: dict[str, Path], num_steps: int) -> dict[str, Any]:
    """A decoder on rows of captions of all the sets, as many from each."""
    values = config_values(Path(), num_steps)
    mixture = {name: {"path": str(path), "weight": 1.0} for name, path in sets.items()}
    packing = {"window": 16, "streams": 4}
    values["data"] |= {"path": None, "mixture": mixture, "packing": packing, "batch_size": 16}
    values["model"] = {
        "type": "decoder",
        "width": 64,
        "depth": 2,
        "num_heads": 4,
        "mlp_width": 128,
        "context": 64,
    }
    values["evaluation"] = {"in_training": {"every": 0}}
    return values


def check(series: Series, reference: Run, *, bitwise: bool) -> dict[str, Any]:
    """The claims at the end of a series, as figures. Raises Violation."""
    keys = series.run.keys()
    if keys != reference.keys():
        raise Violation(f"series {series.name}: the sample keys are not the reference's")
    expected, tensors = reference.tensors(), series.run.tensors()
    if expected.keys() != tensors.keys():
        raise Violation(f"series {series.name}: other tensors than the reference's")
    different = [name for name in expected if not torch.equal(expected[name], tensors[name])]
    if bitwise and different:
        raise Violation(f"series {series.name}: {len(different)} tensors differ: {different[:5]}")
    weights = [name for name in expected if name.startswith("model.")]
    gap = max(float((expected[name] - tensors[name]).abs().max()) for name in weights)
    said = [kill["resumed_at"] for kill in series.kills if kill["resumed_at"] is not None]
    return {
        "series": series.name,
        "kills": len(series.kills),
        "within_a_save": sum(kill["within_a_save"] for kill in series.kills),
        "resumes_seen": len(said) + 1,
        "processes": sorted({kill["processes"] for kill in series.kills}),
        "workers": sorted({kill["workers"] for kill in series.kills}),
        "steps": len(keys),
        "sample_keys": sum(len(line["keys"]) for line in keys),
        "sample_keys_equal": True,
        "tensors": len(expected),
        "tensors_bit_identical": len(expected) - len(different),
        "largest_weight_difference": gap,
        "each_kill": series.kills,
    }


def circumstances() -> dict[str, Any]:
    model = [x for x in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in x]
    return {
        "date": time.strftime("%Y-%m-%d"),
        "commit": git_commit(),
        "hardware": {
            "cpu": model[0].split(":")[1].strip() if model else platform.machine(),
            "cores": os.cpu_count(),
        },
        "torch": torch.__version__,
    }


def prove(work: Path, *, num_kills: int, num_steps: int, only: str | None = None) -> None:
    """The series against their references; appends their figures to the results."""
    work.mkdir(parents=True, exist_ok=True)
    sets = {"generated": work / "generated"}
    if not (sets["generated"] / "dataset.json").is_file():
        write_set(sets["generated"])
    if (EMOJI / "dataset.json").is_file():
        sets["emoji"] = EMOJI
    data = sets.get("emoji", sets["generated"])
    if only != "packed":
        config = work / "kill.yaml"
        config.write_text(dump_yaml(config_values(data, num_steps)))
        reference = Run(config, work / "reference")
        finish(reference, 2, work / "reference.log", 0)
        for name, worlds in (("any", (1, 2, 4)), ("two", (2,))):
            series = Series(name, Run(config, work / name), worlds, num_kills, num_steps)
            _prove_one(series, reference, work, data.name)
    config = work / "packed.yaml"
    num_steps *= 4  # its steps are short
    config.write_text(dump_yaml(packed_values(sets, num_steps)))
    reference = Run(config, work / "packed-reference")
    finish(reference, 2, work / "packed-reference.log", 0)
    run = Run(config, work / "packed")
    series = Series("packed", run, (1, 2, 4), num_kills, num_steps, workers=(0, 1, 2, 3, 4))
    _prove_one(series, reference, work, "+".join(sets))
    shutil.rmtree(work)


def _prove_one(series: Series, reference: Run, work: Path, data: str) -> None:
    series.go(work)
    figures = check(series, reference, bitwise=series.name == "two")
    with RESULTS.open("a") as file:
        file.write(json.dumps(circumstances() | {"data": data} | figures) + "\n")
    print(json.dumps({k: v for k, v in figures.items() if k != "each_kill"}, indent=1))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, default=ROOT / "runs" / "prove_kill")
    parser.add_argument("--kills", type=int, default=20, help="kills in each series")
    parser.add_argument("--steps", type=int, default=120, help="steps of the run")
    parser.add_argument("--only", choices=["packed"], help="this kind of run alone")
    args = parser.parse_args()
    try:
        prove(args.work, num_kills=args.kills, num_steps=args.steps, only=args.only)
    except Violation as violation:
        print(f"VIOLATION: {violation}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
