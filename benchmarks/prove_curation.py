"""Curation of real pictures: how fast, and that kills and Ray Data change no byte of what is kept.

The recipe curate/pictures.yaml (no classifiers) runs over Flickr8k, flower and clothing photos by
two processes, three times for the median of pictures a second, from reading to the published set
with its report. Then it is killed by SIGKILL, ten times at random moments, and goes on; and it runs
by Ray Data with two local workers. Each of these ends with the same files.
Run by `make prove-curation`; writes results/curation.json. Bar: 300 pictures/s on two cores.
"""

from __future__ import annotations

import hashlib
import os
import random
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from record import FLICKR8K, ROOT, keep

from carillon.engine.data.shards import open_dataset

SHARED = FLICKR8K.parent
SOURCES = tuple(str(SHARED / name) for name in ("flickr8k", "flowers5", "clothing_cc0"))
RECIPE = ROOT / "recipes" / "curate" / "pictures.yaml"
BAR, REPEATS, KILLS, WORKERS = 300.0, 3, 10, 2


def command(out: Path, *further: str) -> list[str]:
    program = [sys.executable, "-m", "carillon.engine.cli", "curate", str(RECIPE), *SOURCES]
    return [*program, "--out", str(out), "--no-registry", "--workers", str(WORKERS), *further]


def run(out: Path, *further: str) -> float:
    """Curate; returns the seconds. Raises CalledProcessError."""
    begin = time.perf_counter()
    subprocess.run(command(out, *further), check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - begin


def digest(out: Path) -> str:
    """One hash over the names and bytes of all files."""
    total = hashlib.sha256()
    for path in sorted(out.iterdir()):
        total.update(f"{path.name} {hashlib.sha256(path.read_bytes()).hexdigest()}\n".encode())
    return total.hexdigest()


def killed_and_resumed(out: Path, seconds: float) -> int:
    """Kill the run at random moments, KILLS times; returns how many were cut short."""
    rng = random.Random(0)
    cut = 0
    for _ in range(KILLS):
        process = subprocess.Popen(command(out), stdout=subprocess.DEVNULL)
        try:
            process.wait(timeout=rng.uniform(0.5, max(1.0, seconds * 0.5)))
        except subprocess.TimeoutExpired:
            os.kill(process.pid, signal.SIGKILL)
            process.wait()
            cut += 1
        if out.exists():
            break
    if not out.exists():
        run(out)
    left = [path.name for path in out.parent.iterdir() if path.name != out.name]
    if left:
        raise SystemExit(f"left behind: {left}")
    return cut


def main() -> None:
    num_pictures = sum(
        len(split) for source in SOURCES for split in open_dataset(source).splits.values()
    )
    folder = Path(tempfile.mkdtemp(prefix="prove-curation-"))
    try:
        seconds = [run(folder / "timed" / f"out{i}" / "clean") for i in range(REPEATS)]
        expected = digest(folder / "timed" / "out0" / "clean")
        rate = num_pictures / statistics.median(seconds)
        cut = killed_and_resumed(folder / "killed" / "clean", statistics.median(seconds))
        ray_seconds = run(folder / "ray" / "clean", "--ray", "local")
        result: dict[str, Any] = {
            "pictures": num_pictures,
            "workers": WORKERS,
            "seconds": [round(one, 2) for one in seconds],
            "pictures_per_s": round(rate, 1),
            "bar_pictures_per_s": BAR,
            "kills": cut,
            "same_bytes_after_kills": digest(folder / "killed" / "clean") == expected,
            "ray_seconds": round(ray_seconds, 2),
            "same_bytes_by_ray": digest(folder / "ray" / "clean") == expected,
        }
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    print(result)
    keep("curation", result)
    if rate < BAR or not (result["same_bytes_after_kills"] and result["same_bytes_by_ray"]):
        raise SystemExit("a bar is missed")


if __name__ == "__main__":
    main()
