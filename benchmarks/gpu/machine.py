"""What machine a run was on, and how fast a plain copy and a plain product are there.

`python machine.py describe RECORDS` needs nothing but Python; `python machine.py rates RECORDS
RATES DEVICE` measures, and records beside it the rates that kernels/roofline.py has of this chip.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from records import append

if TYPE_CHECKING:
    from carillon.kernels.roofline import Cost

ROOT = Path(__file__).resolve().parents[2]
_QUERY = (
    *("name", "uuid", "memory.total", "driver_version", "compute_cap", "mig.mode.current"),
    *("clocks.sm", "clocks.max.sm", "clocks.mem", "power.limit", "temperature.gpu"),
)
_PACKAGES = (
    *("torch", "triton", "numpy", "pytest", "pytest-timeout", "torchvision", "timm"),
    *("transformers", "open-clip-torch", "flash-attn", "nvidia-cudnn-cu13", "nvidia-cublas"),
)
_SOURCES = ("csrc", "kernels", "benchmarks", "tests/kernels", "CMakeLists.txt")


class Rates(NamedTuple):
    """Bytes/s and FLOP/s of bf16 products, and whose they are."""

    of: str
    flops_per_s: float
    bytes_per_s: float

    def floor_s(self, cost: Cost) -> float:
        from carillon.kernels.roofline import Chip, floor_s

        return floor_s(cost, Chip(*self))


def describe() -> dict[str, Any]:
    """Hardware, driver, versions and commit; what cannot be found out says why."""
    return {
        "commit": commit(),
        "sources": digest(),
        "gpus": _gpus(),
        "nvcc": _last_line(["nvcc", "--version"]),
        "cpu": _cpu(),
        "cores": os.cpu_count(),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in _PACKAGES},
    }


def commit() -> str:
    """From git; a copy of the files without it has the digest of its sources only."""
    revision = _run(["git", "-C", str(ROOT), "rev-parse", "HEAD"])
    if not revision or " " in revision:
        return os.environ.get("CARILLON_COMMIT", "unknown")
    changed = _run(["git", "-C", str(ROOT), "status", "--porcelain", "-uno", "--", *_SOURCES])
    return revision + ("+" if changed else "")


def digest() -> str:
    """Of all source files that a result depends on: it ties a copy without git to a commit."""
    found = hashlib.sha256()
    for source in _SOURCES:
        path = ROOT / source
        for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
            if file.suffix in (".py", ".cpp", ".cu", ".h", ".sh", ".txt"):
                found.update(str(file.relative_to(ROOT)).encode() + b"\0" + file.read_bytes())
    return found.hexdigest()[:16]


def measured_rates(device: str) -> Rates:
    """Of a large copy and a large bf16 product of random values."""
    size, length, most_s = (
        (8192, 1 << 30, 1.0) if device.startswith("cuda") else (512, 1 << 22, 0.1)
    )
    return Rates(
        "this run",
        flops_per_s=2.0 * size**3 / _product_s(size, device, 2 * most_s),
        bytes_per_s=2.0 * length / _copy_s(length, device, most_s),  # read and written
    )


def builds() -> dict[str, Any]:
    """What torch itself says it was built with."""
    import torch

    return {
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version() if torch.cuda.is_available() else None,
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
    }


def _copy_s(length: int, device: str, most_s: float) -> float:
    import torch
    from timing import time_call

    source = torch.empty(length, dtype=torch.uint8, device=device).random_()
    target = torch.empty_like(source)
    return time_call(lambda: target.copy_(source), device, most_s=most_s).median_ms / 1e3


def _product_s(size: int, device: str, most_s: float) -> float:
    import torch
    from timing import time_call

    a, b = (torch.randn(size, size, device=device).bfloat16() for _ in range(2))
    return time_call(lambda: a @ b, device, most_s=most_s).median_ms / 1e3


def read_rates(path: Path | None, device: str) -> Rates | None:
    """Those that this run measured, else those that are known of the chip, else none."""
    if path is not None and path.exists():
        return Rates(*json.loads(path.read_text()))
    return known_rates(device)


def known_rates(device: str) -> Rates | None:
    import torch

    from carillon.kernels.roofline import chip_named

    if not device.startswith("cuda") or not torch.cuda.is_available():
        return None
    chip = chip_named(torch.cuda.get_device_name(device))
    return None if chip is None else Rates(*chip)


def _gpus() -> list[dict[str, str]] | str:
    said = _run(["nvidia-smi", f"--query-gpu={','.join(_QUERY)}", "--format=csv,noheader"])
    if not said or len(said.splitlines()[0].split(", ")) != len(_QUERY):
        return said or "nvidia-smi cannot be run"
    return [dict(zip(_QUERY, line.split(", "), strict=False)) for line in said.splitlines()]


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _cpu() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.machine()


def _last_line(command: list[str]) -> str:
    return (_run(command) or "not found").splitlines()[-1]


def _run(command: list[str]) -> str:
    """What a command prints; empty where it cannot be run."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip()


def main() -> None:
    what, records, *rest = sys.argv[1:]
    if what == "describe":
        event, content = "machine", describe()
    else:
        path, device = rest
        rates = measured_rates(device)
        Path(path).write_text(json.dumps(rates))
        known = known_rates(device)
        event = "rates"
        content = {"measured": rates._asdict(), "known": known and known._asdict()} | builds()
    append(Path(records), event, **content)
    print(json.dumps(content, indent=1))


if __name__ == "__main__":
    main()
