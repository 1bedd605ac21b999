"""Proof that 8-bit products train as bfloat16 ones do: `make prove-fp8`.

The quickstart's model on the emoji set, 300 steps of 256 pairs on the same batches, with three
seeds (or --seeds of them): in bfloat16, and in fp8 by either recipe. Compared is the mean loss of
the last 50 steps. It holds that each recipe's mean over the seeds is within 1% of bfloat16's. Runs
are kept in --work, so the proof can be interrupted, and go on with more seeds; the result is
appended to results/prove_fp8.jsonl.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

from record import BENCHMARKS, EMOJI, ROOT, circumstances

RESULTS = BENCHMARKS / "results" / "prove_fp8.jsonl"
RECIPE = ROOT / "recipes" / "emoji_quickstart.yaml"
STEPS, LAST, SEEDS = 300, 50, (1, 2, 3)
ALLOWED = 0.01
SIDES = {
    "bf16": ("distributed.precision=bf16",),
    "fp8 tensorwise": ("distributed.precision=fp8",),
    "fp8 rowwise": ("distributed.precision=fp8", "distributed.fp8_recipe=rowwise"),
}


def train(side: str, seed: int, work: Path) -> float:
    """The mean loss of the last steps; a run that is finished is read, one that is not goes on."""
    output = work / f"{side.replace(' ', '-')}-{seed}"
    command = [
        *(sys.executable, "-m", "carillon.engine.cli", "train", str(RECIPE), *SIDES[side]),
        *(f"data.path={EMOJI}", f"experiment.seed={seed}", f"logging.output={output}"),
        *(f"optimization.steps={STEPS}", "evaluation.in_training.every=0"),
        *("logging.interval_steps=1", "logging.tensorboard=false"),
    ]
    subprocess.run(command, check=True, cwd=ROOT)
    (metrics,) = output.glob("*/metrics.jsonl")
    lines = map(json.loads, metrics.read_text().splitlines())
    losses = [line["loss"] for line in lines if "loss" in line]
    assert len(losses) == STEPS
    return statistics.mean(losses[-LAST:])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, default=ROOT / "runs" / "prove-fp8")
    parser.add_argument("--seeds", type=int, default=len(SEEDS), choices=range(1, len(SEEDS) + 1))
    args = parser.parse_args()
    losses: dict[str, list[float]] = {side: [] for side in SIDES}
    for seed in SEEDS[: args.seeds]:
        for side, found in losses.items():
            found.append(round(train(side, seed, args.work), 4))
            print(f"seed {seed}  {side}  {found[-1]:.4f}", flush=True)
    means = {side: statistics.mean(found) for side, found in losses.items()}
    ratios = {side: means[side] / means["bf16"] for side in SIDES}
    holds = all(abs(ratio - 1) <= ALLOWED for ratio in ratios.values())
    result: dict[str, Any] = {
        "benchmark": "benchmarks/prove_fp8.py",
        "losses": losses,
        "ratio": {side: round(ratio, 4) for side, ratio in ratios.items()},
        "allowed": ALLOWED,
        "holds": holds,
    }
    with RESULTS.open("a") as file:
        file.write(json.dumps(circumstances() | result) + "\n")
    print(json.dumps(result, indent=1))
    return 0 if holds else 1


if __name__ == "__main__":
    sys.exit(main())
