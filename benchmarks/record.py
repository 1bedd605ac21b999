"""Under what circumstances a benchmark ran, and where its result is kept."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import time
from collections.abc import Iterator
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

BENCHMARKS = Path(__file__).resolve().parent
ROOT = BENCHMARKS.parent
SHARED_DATA = ROOT.parent / "shared/data"
FLICKR8K = SHARED_DATA / "flickr8k"
EMOJI = ROOT / "data/emoji"
_PACKAGES = (
    *(
        "torch",
        "torchvision",
        "open_clip_torch",
        "webdataset",
        "numpy",
        "pillow",
        "simplejpeg",
        "av",
    ),
    *("soundfile", "opencv-python-headless", "torchcodec", "nvidia-dali-cuda130", "litdata"),
    "megatron-energon",
)


def flickr8k_shards() -> list[Path]:
    """The tars of Flickr8k. Raises SystemExit with the reason where they are missing."""
    shards = sorted(FLICKR8K.glob("*.tar"))
    if not shards:
        raise SystemExit(
            f"{FLICKR8K} is missing: the captioned photos on which this benchmark compares with "
            "peers. It comes with the developers' checkout, beside the repository"
        )
    return shards


def circumstances() -> dict[str, Any]:
    """Commit, date, hardware and versions."""
    load = os.getloadavg()[0]
    return {
        "commit": _commit(),
        "date": time.strftime("%Y-%m-%d"),
        "hardware": {
            "cpu": _cpu(),
            "cores": os.cpu_count(),
            "load_average": round(load, 1),
        },
        "versions": {"python": platform.python_version()} | dict(_installed()),
    }


def keep(name: str, result: dict[str, Any]) -> None:
    """Write results/NAME.json."""
    content = {"benchmark": f"benchmarks/{name}.py"} | circumstances() | result
    path = BENCHMARKS / "results" / f"{name}.json"
    path.write_text(json.dumps(content, indent=1) + "\n")


def _installed() -> Iterator[tuple[str, str]]:
    for package in _PACKAGES:
        with suppress(PackageNotFoundError):  # peers are in the second environment only
            yield package, version(package)


def _cpu() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.machine()


def _commit() -> str:
    def git(*arguments: str) -> str:
        command = ["git", "-C", str(ROOT), *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    changed = git("status", "--porcelain", "-uno", "--", "engine", "kernels", "csrc", "benchmarks")
    return git("rev-parse", "HEAD") + ("+" if changed else "")
