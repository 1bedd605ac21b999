"""A small real set, a config of seconds, and ways to run the real command: in this process, in a
process of its own, or as several processes that a warm parent forks."""

import io
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from carillon.engine.cli import main
from carillon.engine.data.shards import ShardWriter
from carillon.engine.strict_yaml import dump_yaml
from carillon.engine.train.checkpoint import Checkpoint, list_checkpoints
from carillon.engine.train.checkpoint_reader import read_tensors

RECIPE = str(Path(__file__).parents[3] / "recipes/train.py")
RANKS = Path(__file__).with_name("ranks_worker.py")
WORDS = ("apple", "bell", "cat", "drum", "egg", "fish", "goat", "hat", "ink", "jar", "kite", "leaf")


def jpeg(seed: int) -> bytes:
    """Four blocks of colour that follow from the seed."""
    colours = np.random.default_rng(seed).integers(0, 256, (2, 2, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(colours.repeat(10, 0).repeat(10, 1)).save(file, "JPEG")
    return file.getvalue()


def write_pictures(
    out: Path,
    *,
    num: int = 60,
    bad: frozenset[int] = frozenset(),
    only_german: frozenset[int] = frozenset(),
    first: int = 0,
    max_shard_bytes: int = 1 << 20,
) -> Path:
    """`num` pictures of 12 words with a caption in two languages or one; those in `bad` are cut
    short."""
    size = {"max_shard_bytes": max_shard_bytes}
    with ShardWriter(out, name=out.name, source={}, **size) as writer:
        for i in range(num):
            media = jpeg(first + i)
            words = f"{WORDS[i % 12]} {WORDS[i // 12 % 12]} {i}"
            captions = {} if i in only_german else {"en": [words]}
            captions["de"] = [f"ein {words}"]
            media = media[: len(media) // 2] if i in bad else media
            meta = {"captions": captions, "word": WORDS[i % 12]}
            writer.write(f"picture{i:03d}", {"jpg": media}, meta)
    return out


def tiny_values(data: Path) -> dict[str, Any]:
    tower = {"width": 32, "depth": 1, "num_heads": 2}
    return {
        "experiment": {"name": "tiny"},
        "data": {
            "path": str(data),
            "batch_size": 8,
            "num_workers": 0,
            "tokenizer": {"vocab_size": 300},
        },
        "model": {
            "dims": 16,
            "vision_backbone": "vit-ti-16",
            "vision": {"image_size": 16, **tower},
            "text_backbone": "clip-text-ti",
            "text": {"context": 16, **tower},
        },
        "optimization": {"steps": 10, "warmup_steps": 2},
        "distributed": {"precision": "fp32", "device": "cpu"},
        "evaluation": {"bootstrap_samples": 10},
        "logging": {
            "interval_steps": 1,
            "checkpoint_interval_steps": 5,
            "keep_last": 100,
            "sample_keys": True,
            "tensorboard": False,
        },
    }


def decoder_values(data: Path) -> dict[str, Any]:
    """A decoder whose second block is a mixture, on the same set."""
    values = tiny_values(data)
    values["data"] |= {"validation_every": 5}
    moe = {"num_experts": 4, "expert_width": 16, "dense_blocks": 1}
    moe |= {"score": "sigmoid", "bias_speed": 0.01}
    sizes = {"width": 32, "depth": 2, "num_heads": 4, "mlp_width": 32, "context": 64}
    values["model"] = {"type": "decoder", **sizes, "moe": moe}
    values["evaluation"] = {"in_training": {"every": 5}}
    return values


@dataclass(frozen=True)
class Setup:
    """A config file and the folder that its runs go to."""

    config: Path
    output: Path

    def argv(self, *overrides: str) -> list[str]:
        return ["train", str(self.config), f"logging.output={self.output}", *overrides]

    def train(self, *overrides: str) -> int:
        """Run `carillon train` in this process; returns its exit code."""
        return main(self.argv(*overrides))

    def start(self, *overrides: str, launcher: tuple[str, ...] = ()) -> "subprocess.Popen[str]":
        """Start the command in a session of its own (behind `launcher`), stderr to a pipe."""
        program = [RECIPE, "--config"] if launcher else ["-m", "carillon.engine.cli", "train"]
        command = [sys.executable, *launcher, *program, *self.argv(*overrides)[1:]]
        return subprocess.Popen(
            command,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )

    @property
    def run(self) -> Path:
        """The only run folder of the output folder."""
        (path,) = (p.parent for p in self.output.glob("*/config.yaml") if ".old" not in str(p))
        return path

    def checkpoints(self) -> list[Checkpoint]:
        return list_checkpoints(self.run / "checkpoints")

    def steps(self) -> list[int]:
        return [checkpoint.step for checkpoint in self.checkpoints()]

    def killed_after(self, step: int, output: Path) -> "Setup":
        """A copy of the run as a kill after the checkpoint of `step` leaves it."""
        shutil.copytree(self.output, output)
        copy = Setup(self.config, output)
        for checkpoint in copy.checkpoints():
            if checkpoint.step > step:
                shutil.rmtree(checkpoint.path)
        return copy

    def lines(self, name: str) -> list[dict[str, Any]]:
        """A JSON-lines file of the run."""
        return [json.loads(line) for line in (self.run / name).read_text().splitlines()]

    def metrics(self) -> list[dict[str, Any]]:
        """metrics.jsonl without what a clock measured."""
        clock = {"images_per_s", "rows_per_s", "tokens_per_s", "tflops", "mfu"}
        clock |= {"data_share", "communication_share", "compute_share"}
        return [
            {key: value for key, value in line.items() if key not in clock}
            for line in self.lines("metrics.jsonl")
        ]

    def losses(self) -> list[float]:
        return [line["loss"] for line in self.lines("metrics.jsonl") if "loss" in line]

    def content(self, step: int) -> dict[str, Tensor]:
        """Every tensor of a checkpoint, read without a model."""
        (checkpoint,) = (c for c in self.checkpoints() if c.step == step)
        checkpoint.verify()
        metadata = FileSystemReader(checkpoint.path).read_metadata().state_dict_metadata
        tensors = {
            name: torch.full(entry.size, float("nan"), dtype=entry.properties.dtype)
            for name, entry in metadata.items()
            if isinstance(entry, TensorStorageMetadata)
        }
        read_tensors(checkpoint, tensors, partial=False)
        return tensors


def run_ranks(
    folder: Path,
    cases: dict[str, tuple[int, list[str]]],
    *,
    fault: int | None = None,
    file_limits: dict[str, dict[int, int]] | None = None,
) -> dict[str, Any]:
    """Run each case (number of processes, argv), in order; returns codes and stderr by rank.

    On the rank `fault`, stages of the text tower raise. `file_limits` has, by case and rank, the
    bytes past which no file grows, as on a full disk.
    """
    folder.mkdir(parents=True)
    limits = file_limits or {}
    given = {
        name: {"world_size": n, "argv": argv, "fault": fault, "file_limits": limits.get(name, {})}
        for name, (n, argv) in cases.items()
    }
    (folder / "cases.json").write_text(json.dumps(given))
    worker = [sys.executable, str(RANKS), str(folder / "cases.json"), str(folder / "results.json")]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    ran = subprocess.run(worker, env=environment, capture_output=True, text=True, timeout=300)
    assert ran.returncode == 0, ran.stderr[-4000:]
    return dict(json.loads((folder / "results.json").read_text()))


@pytest.fixture(scope="session")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pictures(tmp_path_factory.mktemp("sets") / "pictures")


@pytest.fixture(scope="session")
def make_pictures() -> Callable[..., Path]:
    return write_pictures


@pytest.fixture(scope="session")
def ranks() -> Callable[..., dict[str, Any]]:
    return run_ranks


@pytest.fixture(scope="session")
def make_setup(pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Setup]:
    """Makes a config with the small set (or another), nothing trained yet."""

    def make(data: Path = pictures, *, decoder: bool = False) -> Setup:
        folder = tmp_path_factory.mktemp("setup")
        values = decoder_values(data) if decoder else tiny_values(data)
        (folder / "tiny.yaml").write_text(dump_yaml(values))
        return Setup(folder / "tiny.yaml", folder / "runs")

    return make


@pytest.fixture
def setup(make_setup: Callable[..., Setup]) -> Setup:
    return make_setup()
