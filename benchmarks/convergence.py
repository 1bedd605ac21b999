"""Final loss after the same number of steps: ours and OpenCLIP's, three seeds each.

Both get the same pictures, crops and captions in the same order (our loader's, keyed by seed) and
the same hyperparameters; each initialises its model in its own way, anew for each seed. The final
loss is the mean over the last steps. A difference within the spread over seeds is noise.
Run by `python benchmarks/convergence.py`; writes results/convergence.json.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from record import BENCHMARKS, FLICKR8K, flickr8k_shards, keep

from carillon.engine.data.shards import open_dataset
from carillon.engine.data.tokenizer import Tokenizer, captions_of
from carillon.engine.train.run_config import load_config, run_name

CONFIG = str(BENCHMARKS / "dual_encoder.yaml")
SEEDS = (1, 2, 3)
STEPS, LAST = 300, 50


def settings_of(seed: int, folder: Path) -> list[str]:
    return [
        f"data.path={FLICKR8K}",
        f"data.tokenizer.path={folder / 'tokenizer.json'}",
        "model.vision_backbone=vit-ti-16",
        "distributed.precision=bf16",
        f"experiment.seed={seed}",
        f"optimization.steps={STEPS}",
        f"logging.output={folder / 'runs'}",
        "logging.interval_steps=1",
    ]


def run(command: list[str]) -> None:
    # One thread beside one loader worker, as in turns.py.
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    subprocess.run(command, check=True, capture_output=True, env=environment)


def our_losses(seed: int, folder: Path) -> list[float]:
    """Losses of `carillon train`."""
    settings = settings_of(seed, folder)
    command = str(Path(sys.executable).with_name("carillon"))
    run([command, "train", CONFIG, *settings])
    metrics = folder / "runs" / run_name(load_config(CONFIG, settings)) / "metrics.jsonl"
    lines = map(json.loads, metrics.read_text().splitlines())
    return [line["loss"] for line in lines if "loss" in line]


def their_losses(seed: int, folder: Path) -> list[float]:
    """Losses of OpenCLIP's loop on the same batches."""
    lines = folder / f"{seed}.jsonl"
    script = str(BENCHMARKS / "openclip_loop.py")
    arguments = [CONFIG, *settings_of(seed, folder), "--lines", str(lines), "--same-batches"]
    run([sys.executable, script, *arguments])
    losses: list[float] = json.loads(lines.read_text().splitlines()[-1])["losses"]
    return losses


def summary(finals: list[float]) -> dict[str, Any]:
    return {
        "final_losses": [round(value, 4) for value in finals],
        "mean": round(statistics.mean(finals), 4),
        "standard_deviation": round(statistics.stdev(finals), 4),
    }


def main() -> None:
    finals: dict[str, list[float]] = {"carillon": [], "openclip": []}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (split,) = open_dataset(list(map(str, flickr8k_shards()))).splits.values()
        Tokenizer.train(captions_of(split, 100_000), vocab_size=8000).save(
            folder / "tokenizer.json"
        )
        for seed in SEEDS:
            for side, losses_of in (("carillon", our_losses), ("openclip", their_losses)):
                losses = losses_of(seed, folder)
                if len(losses) != STEPS:
                    raise RuntimeError(f"{side} made {len(losses)} steps of {STEPS}")
                finals[side].append(statistics.mean(losses[-LAST:]))
                print(f"seed {seed} {side}: {finals[side][-1]:.4f}", flush=True)
    ours, theirs = summary(finals["carillon"]), summary(finals["openclip"])
    noise = (ours["standard_deviation"] ** 2 + theirs["standard_deviation"] ** 2) ** 0.5
    keep(
        "convergence",
        {
            "what": f"mean loss of the last {LAST} of {STEPS} steps, batch 128, bf16, ViT 192 x 6 "
            "with patch 16 at 64 px, 4 text layers; log 128 = 4.852 is chance",
            "sides": {
                "carillon": "`carillon train`; captions padded to the longest of their batch",
                "openclip": "train_one_epoch on the same batches; captions padded to the context",
            },
            "carillon": ours,
            "openclip": theirs,
            "difference": round(ours["mean"] - theirs["mean"], 4),
            "noise": round(noise, 4),
        },
    )
    if ours["mean"] - theirs["mean"] > noise:
        raise SystemExit("our final loss is above OpenCLIP's by more than the spread over seeds")


if __name__ == "__main__":
    main()
