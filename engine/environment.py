"""`carillon env`: this machine and environment, for a job's log or the report of a problem."""

from __future__ import annotations

import argparse
import os
import platform
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

EXAMPLES = """examples:
  carillon env
  srun --ntasks-per-node=1 carillon env      one report a node"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """None."""


def main(args: argparse.Namespace) -> int:
    print(f"environment of {socket.gethostname()}")
    for name, value in facts():
        print(f"  {name:<12}{value}")
    return 0


def facts() -> Iterator[tuple[str, str]]:
    """Name and value of each line of the report."""
    import torch

    from carillon import __version__
    from carillon.engine.train.run import PACKAGES, git_commit, package_version
    from carillon.kernels.table import ProviderError, load_native, load_triton

    yield "carillon", f"{__version__}, commit {git_commit() or 'unknown'}"
    yield "python", f"{platform.python_version()} in {os.path.realpath(sys.prefix)}"
    yield "packages", ", ".join(f"{name} {package_version(name)}" for name in PACKAGES)
    yield "system", f"{platform.system()} {platform.release()}, {platform.machine()}"
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    yield "processor", f"{_processor()}, {cores} of {os.cpu_count()} cores for this process"
    yield "memory", _memory()
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            chip = torch.cuda.get_device_properties(index)
            size_gib = chip.total_memory / 2**30
            yield f"gpu {index}", f"{chip.name}, {size_gib:.0f} GiB, sm_{chip.major}{chip.minor}"
        nccl = ".".join(map(str, torch.cuda.nccl.version()))  # type: ignore[no-untyped-call]
        yield "cuda", f"{torch.version.cuda}, NCCL {nccl}, driver {_driver()}"
    else:
        yield "gpu", f"none that torch {torch.__version__} can use"
    try:
        with_cuda = load_native()
        instructions = torch.ops.carillon.limit_instruction_set("avx512_bf16")
        yield "operators", f"native, {instructions}, {'with' if with_cuda else 'without'} CUDA"
    except ProviderError as error:
        yield "operators", f"no native ones: {error}"
    try:
        load_triton()
        yield "triton", package_version("triton")
    except ProviderError as error:
        yield "triton", f"none: {error}"
    settings = ("OMP_", "NCCL_", "CUDA_VISIBLE", "MASTER_", "SLURM_JOB_", "TORCH_", "GLOO_")
    for name in sorted(os.environ):
        if name.startswith(settings):
            yield "variable", f"{name}={os.environ[name]}"


def _processor() -> str:
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def _memory() -> str:
    with suppress(OSError):
        fields = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
        total, free = (
            int(fields[name].split()[0]) / 2**20 for name in ("MemTotal", "MemAvailable")
        )
        return f"{total:.0f} GiB, {free:.0f} GiB free"
    return "unknown"


def _driver() -> str:
    if shutil.which("nvidia-smi") is None:
        return "unknown"
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=30)
    return done.stdout.splitlines()[0] if done.returncode == 0 and done.stdout else "unknown"
