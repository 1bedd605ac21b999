"""Curation of real pictures: how fast, and that kills and Ray Data change no byte of what is kept.

The recipe curate/pictures.yaml (no classifiers) runs over Flickr8k, flower and clothing photos by
two processes, three times for the median of pictures a second, from reading to the published set
with its report; CPU seconds of all processes stand beside. A smaller run is killed by SIGKILL at
its first file, its second and so on, twelve times, and goes on each time. The large one runs by Ray
Data with two local workers. Each of these ends with the same files as an undisturbed run, and with
nothing beside them.
Run by `make prove-curation`; writes results/prove_curation.json. Bar: 300 pictures/s on two cores.
"""

from __future__ import annotations

import hashlib
import os
import resource
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from record import FLICKR8K, ROOT, keep

from carillon.engine.data.shards import open_dataset

SHARED = FLICKR8K.parent
SOURCES = tuple(str(SHARED / name) for name in ("flickr8k", "flowers5", "clothing_cc0"))
RECIPE = ROOT / "recipes" / "curate" / "pictures.yaml"
SMALL = SOURCES[1:]
BAR, REPEATS, KILLS, WORKERS = 300.0, 3, 12, 2


def command(out: Path, *further: str, sources: Sequence[str] = SOURCES) -> list[str]:
    program = [sys.executable, "-m", "carillon.engine.cli", "curate", str(RECIPE), *sources]
    return [*program, "--out", str(out), "--no-registry", "--workers", str(WORKERS), *further]


def run(out: Path, *further: str, sources: Sequence[str] = SOURCES) -> tuple[float, float]:
    """Curate; returns seconds, and CPU seconds of all processes. Raises CalledProcessError."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    begin = time.perf_counter()
    subprocess.run(command(out, *further, sources=sources), check=True, stdout=subprocess.DEVNULL)
    seconds = time.perf_counter() - begin
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    used = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return seconds, used


def digest(out: Path) -> str:
    """One hash over the names and bytes of all files."""
    total = hashlib.sha256()
    for path in sorted(out.iterdir()):
        total.update(f"{path.name} {hashlib.sha256(path.read_bytes()).hexdigest()}\n".encode())
    return total.hexdigest()


def killed_at(out: Path, number: int) -> bool:
    """Kill a run once it has made so many files and folders; whether it was still alive."""
    seen: set[Path] = set()
    process = subprocess.Popen(command(out, sources=SMALL), stdout=subprocess.DEVNULL)
    while process.poll() is None:
        seen |= set(out.parent.rglob("*")) if out.parent.exists() else set()
        if len(seen) >= number:
            os.kill(process.pid, signal.SIGKILL)
            process.wait()
            return True
        time.sleep(0.002)
    return False


def kills(folder: Path) -> tuple[int, bool]:
    """Kill a small run at its first file, its second and so on, and let each go on.

    Returns how many were cut short, and whether all ended with the bytes of an undisturbed run and
    with nothing beside them.
    """
    run(folder / "whole" / "clean", sources=SMALL)
    expected = digest(folder / "whole" / "clean")
    cut, same = 0, True
    for number in range(1, KILLS + 1):
        out = folder / str(number) / "clean"
        cut += killed_at(out, number)
        if not out.exists():
            run(out, sources=SMALL)
        same &= digest(out) == expected
        same &= [path.name for path in out.parent.iterdir()] == ["clean"]
    return cut, same


def main() -> None:
    num_pictures = sum(
        len(split) for source in SOURCES for split in open_dataset(source).splits.values()
    )
    folder = Path(tempfile.mkdtemp(prefix="prove-curation-"))
    try:
        outs = [folder / "timed" / str(i) / "clean" for i in range(REPEATS)]
        timed = [run(out) for out in outs]
        expected = digest(outs[0])
        seconds, cpu_seconds = (statistics.median(column) for column in zip(*timed, strict=True))
        rate = num_pictures / seconds
        cut, same_after_kills = kills(folder / "killed")
        ray_seconds, _ = run(folder / "ray" / "clean", "--ray", "local")
        result: dict[str, Any] = {
            "pictures": num_pictures,
            "workers": WORKERS,
            "seconds": [round(one, 2) for one, _ in timed],
            "pictures_per_s": round(rate, 1),
            "bar_pictures_per_s": BAR,
            "cpu_seconds": round(cpu_seconds, 2),
            "pictures_per_core_s": round(num_pictures / cpu_seconds, 1),
            "kills": cut,
            "same_bytes_after_kills": same_after_kills,
            "ray_seconds": round(ray_seconds, 2),
            "same_bytes_by_ray": digest(folder / "ray" / "clean") == expected,
        }
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    print(result)
    keep("prove_curation", result)
    if rate < BAR or not (result["same_bytes_after_kills"] and result["same_bytes_by_ray"]):
        raise SystemExit("a bar is missed")


if __name__ == "__main__":
    main()
