"""Proof that every real set builds from its packages: `make prove-sets`.

Each `carillon data NAME` runs as a user would run it. Written down are its counts, licences, sizes,
seconds (with the packages fetched before; core seconds suit a busy machine), the sums of what it
was made from, and what its sounds are by numbers. It holds that a set has samples of each split, a
licence with its source on every item, no silent sound, and that a part of it is the same to the
byte built by one process and by two. The pictures of docs/sets.md are drawn on the way. A line for
each set is appended to results/prove_sets.jsonl.
"""

from __future__ import annotations

import argparse
import io
import json
import resource
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
from record import BENCHMARKS, ROOT, circumstances
from set_pictures import draw

from carillon.engine.data.items import read_items
from carillon.engine.data.samples import modality_of
from carillon.engine.data.shards import Dataset, open_dataset

RESULTS = BENCHMARKS / "results" / "prove_sets.jsonl"
PICTURES = ROOT / "docs" / "pictures"
SETS = ("emoji", "stamps", "prompts", "text-lines", "clips", "speech")
PART = 40
HEARD = 400  # sounds of a set that are measured
_SILENCE_DB = -60.0


def build(name: str, out: Path, *options: str) -> tuple[Dataset, dict[str, float]]:
    """Run the set's command; the set, the seconds that it took and those of its processors."""
    command = [sys.executable, "-m", "carillon.engine.cli", "data", name, "--out", str(out)]
    start, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([*command, "--overwrite", *options], check=True, cwd=ROOT)
    seconds, after = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
    used = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return open_dataset(out), {"seconds": round(seconds, 1), "core_seconds": round(used, 1)}


def counted(dataset: Dataset) -> dict[str, Any]:
    """What is in a set, by its manifest and its items."""
    manifest = dataset.manifest
    shards = [shard for split in manifest.splits.values() for shard in split.shards]
    rows = [row for one in shards for row in read_items(dataset.path / one.items).to_pylist()]
    languages: Counter[str] = Counter()
    licences: Counter[str] = Counter()
    for split in manifest.splits.values():
        languages.update(split.languages)
        licences.update(split.licences)
    return {
        "samples": {name: split.num_samples for name, split in manifest.splits.items()},
        "texts": sum(languages.values()),
        "languages": len(languages),
        "licences": dict(sorted(licences.items())),
        "unlicensed": sum(not (row["licence"] and row["licence_source"]) for row in rows),
        "megabytes": round(sum(shard.size_bytes for shard in shards) / 1e6, 1),
        "fingerprint": dataset.fingerprint,
        "packages": manifest.source["packages"],
        "tools": manifest.source.get("tools", {}),
        "left_out": left_out(dataset.path / "left-out.jsonl"),
    }


def left_out(path: Path) -> dict[str, int]:
    """How many things were left out, by reason."""
    lines = path.read_text().splitlines() if path.is_file() else []
    return dict(Counter(json.loads(line)["reason"].split(":")[0][:60] for line in lines))


def media(dataset: Dataset) -> dict[str, Any]:
    """Members by modality, hours of sound and video, and what sounds are by numbers."""
    members: Counter[str] = Counter()
    seconds: Counter[str] = Counter()
    sounds: list[bytes] = []
    for sample in samples_of(dataset):
        for name, facts in sample.meta.get("media", {}).items():
            kind = modality_of(name) or "other"
            members[kind] += 1
            seconds[kind] += facts.get("duration_s", 0.0)
            if kind == "audio" and facts.get("role") != "sound":  # of those, some are silence
                sounds.append(sample.members[name])
    measured = [heard(sounds[n]) for n in range(0, len(sounds), max(1, len(sounds) // HEARD))]
    levels, centres = ([one[side] for one in measured] for side in (0, 1))
    return {
        "members": dict(members),
        "hours": {kind: round(s / 3600, 3) for kind, s in seconds.items() if s},
        **(
            {
                "sounds_measured": len(measured),
                "loudness_db": [round(float(q), 1) for q in np.percentile(levels, (0, 50, 100))],
                "centroid_hz": [round(float(q)) for q in np.percentile(centres, (5, 50, 95))],
                "silent": sum(level < _SILENCE_DB for level in levels),
            }
            if measured
            else {}
        ),
    }


def samples_of(dataset: Dataset) -> Iterator[Any]:
    for split in dataset.splits.values():
        for row in range(len(split)):
            yield split.read(row)


def heard(sound: bytes) -> tuple[float, float]:
    """Root mean square in dB of full scale, and the mean frequency of the power."""
    samples, rate = soundfile.read(io.BytesIO(sound), always_2d=True)
    mono = samples.mean(axis=1)
    level = 20 * np.log10(np.sqrt(np.mean(mono**2)) + 1e-9)
    power = np.abs(np.fft.rfft(mono)) ** 2
    frequencies = np.fft.rfftfreq(len(mono), 1 / rate)
    return float(level), float((frequencies * power).sum() / (power.sum() + 1e-12))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, default=ROOT / "runs" / "prove-sets")
    parser.add_argument("--sets", default=",".join(SETS), help="some of them, comma-separated")
    args = parser.parse_args()
    all_hold = True
    for name in args.sets.split(","):
        dataset, seconds = build(name, args.work / name)
        found = counted(dataset) | media(dataset) | seconds
        if name != "emoji":  # its command has no --limit; tests hold it to this
            parts = [
                build(name, args.work / f"{name}-{n}", "--limit", str(PART), "--workers", str(n))
                for n in (1, 2)
            ]
            found["same_by_processes"] = len({part.fingerprint for part, _ in parts}) == 1
        found["picture"] = draw(name, dataset, PICTURES / f"{name}.png")
        found["holds"] = (
            len(found["samples"]) > 1
            and not found["unlicensed"]
            and not found.get("silent")
            and found.get("same_by_processes", True)
        )
        all_hold &= found["holds"]
        print(name, json.dumps({k: v for k, v in found.items() if k != "packages"}), flush=True)
        result = {"benchmark": "benchmarks/prove_sets.py", "set": name}
        with RESULTS.open("a") as file:
            file.write(json.dumps(circumstances() | result | found) + "\n")
    return 0 if all_hold else 1


if __name__ == "__main__":
    sys.exit(main())
