"""Training by the fused contrastive op against the loss that holds its logits, side by side.

The recipe emoji_quickstart at large batches, where the loss is a share of a step that counts: the
same seed, pictures, crops and captions; only `loss.itc.provider` differs. The two take turns of one
step (turns.py), each first in every other round, and the ratio is the median over rounds of the
seconds that each took, loading included. Both write the loss of every step, so the curves are those
of the steps that were timed.
Run by `python benchmarks/contrastive_training.py`; writes results/contrastive_training.json.
"""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from record import EMOJI, ROOT, keep
from turns import Contestant, Turn

from carillon.engine.data.shards import open_dataset
from carillon.engine.data.tokenizer import Tokenizer, captions_of
from carillon.engine.train.run_config import load_config, run_name

CONFIG = str(ROOT / "recipes/emoji_quickstart.yaml")
SIDES = {"fused": "native", "held logits": "reference"}
BATCHES = {1024: 20, 8192: 6}  # pairs in a batch: rounds
WARM_UP = 2  # steps: imports, first allocations, prefetched batches
# Relative, of a step's loss: the towers' products are good to half a unit in the last of bfloat16's
# 8 bits. The two losses differ by float32 rounding, which may turn any such last bit.
LARGEST_DIFFERENCE = 2.0**-8


def metrics_of(settings: list[str]) -> Path:
    config = load_config(CONFIG, settings)
    return Path(config.logging.output) / run_name(config) / "metrics.jsonl"


def losses_in(metrics: Path) -> list[float]:
    lines = map(json.loads, metrics.read_text().splitlines())
    return [line["loss"] for line in lines if "loss" in line]


def compare(batch: int, num_turns: int, folder: Path) -> dict[str, Any]:
    """Both sides in turns: seconds a step, peak memory, and the losses' largest difference."""
    shared = [
        f"data.path={EMOJI}",
        f"data.tokenizer.path={folder / 'tokenizer.json'}",
        f"data.batch_size={batch}",
        "data.prefetch_batches=1",
        "optimization.warmup_steps=5",
        f"optimization.steps={WARM_UP + num_turns + 1}",  # neither ends in its last turn
        "evaluation.in_training.every=0",
        "logging.interval_steps=1",
    ]
    turns: dict[str, list[Turn]] = {side: [] for side in SIDES}
    curves: dict[str, list[float]] = {}
    peaks: dict[str, float] = {}
    with ExitStack() as stack:
        contestants, metrics = {}, {}
        for side, provider in SIDES.items():
            output = folder / f"{batch} {provider}"
            output.mkdir()
            settings = [*shared, f"logging.output={output}", f"loss.itc.provider={provider}"]
            metrics[side] = metrics_of(settings)
            command = [str(Path(sys.executable).with_name("carillon")), "train", CONFIG, *settings]
            contestant = Contestant(command, metrics[side], folder / f"{batch} {provider}.log")
            contestants[side] = stack.enter_context(contestant)
        for contestant in contestants.values():
            contestant.turn(WARM_UP)
        for number in range(num_turns):
            for side in list(SIDES)[:: 1 if number % 2 else -1]:
                turns[side].append(contestants[side].turn(1))
        for side, contestant in contestants.items():
            peaks[side] = round(contestant.peak_resident_mb())
            curves[side] = losses_in(metrics[side])[: WARM_UP + num_turns]
    return {
        "batch": batch,
        **{what: medians(turns, what) for what in Turn._fields},
        "ratio": ratio_of(turns, "wall_s"),
        "core_ratio": ratio_of(turns, "core_s"),
        "peak_mb": peaks,
        "losses": {side: [round(loss, 5) for loss in curve] for side, curve in curves.items()},
        "largest_difference": max(abs(a / b - 1) for a, b in zip(*curves.values(), strict=True)),
    }


def medians(turns: dict[str, list[Turn]], what: str) -> dict[str, float]:
    """Of a step, by side."""
    return {
        side: round(statistics.median(getattr(turn, what) for turn in taken), 3)
        for side, taken in turns.items()
    }


def ratio_of(turns: dict[str, list[Turn]], what: str) -> float:
    """How many times as long the loss that holds its logits takes."""
    pairs = zip(turns["held logits"], turns["fused"], strict=True)
    ratios = [getattr(held, what) / getattr(fused, what) for held, fused in pairs]
    return round(statistics.median(ratios), 3)


def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        split = open_dataset(EMOJI).splits["train"]
        tokenizer = Tokenizer.train(captions_of(split, 100_000), vocab_size=8000)
        tokenizer.save(folder / "tokenizer.json")
        results = []
        for batch, num_turns in BATCHES.items():
            results.append(compare(batch, num_turns, folder))
            print(json.dumps(results[-1]), flush=True)
    keep(
        "contrastive_training",
        {
            "what": "`carillon train` of recipes/emoji_quickstart.yaml at larger batches, one "
            "thread beside one loader worker; `ratio` above 1: the fused op is quicker; "
            "`largest_difference` is relative, of a step's loss",
            "sides": {
                "fused": "loss.itc.provider=native (what auto takes on a CPU)",
                "held logits": "loss.itc.provider=reference",
            },
            "results": results,
        },
    )
    worst = max(result["largest_difference"] for result in results)
    if worst > LARGEST_DIFFERENCE:
        raise SystemExit(f"the two curves differ by {worst:.1e}, more than rounding explains")


if __name__ == "__main__":
    main()
