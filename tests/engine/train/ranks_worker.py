"""Runs `carillon` commands as several processes each, forked from here so that torch is imported
once: python ranks_worker.py CASES.json RESULTS.json

Each case has world_size, argv, file_limits (by rank, the bytes that a file may have) and fault (the
rank on which stages of the text tower raise, or none); its result, the exit code and stderr of each
rank. The ranks find each other by the environment variables that torchrun sets.
"""

import json
import os
import resource
import socket
import sys
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import matplotlib.backends.backend_agg  # noqa: F401  (this and torch and all, before the forks)

import carillon.engine.train.launch  # noqa: F401
from carillon.engine.cli import main
from carillon.engine.models.towers.stages import TextPiece


def run_case(case: dict[str, Any], folder: Path) -> dict[str, Any]:
    world_size = int(case["world_size"])
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    files = [folder / f"stderr-{rank}" for rank in range(world_size)]
    children = [
        forked(file, partial(run_rank, case, rank, port)) for rank, file in enumerate(files)
    ]
    codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    return {"codes": codes, "stderr": [file.read_text() for file in files]}


def forked(stderr: Path, work: Callable[[], int]) -> int:
    """A process that does `work`, its stderr to a file, and ends with the code that it gives."""
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        sys.stderr = stderr.open("w")
        os.dup2(sys.stderr.fileno(), 2)
        code = work()
    except SystemExit as end:
        code = int(end.code or 0)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)  # the parent's own clean-up is not the child's


def run_rank(case: dict[str, Any], rank: int, port: int) -> int:
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": case["world_size"]}
    rendezvous = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in (place | rendezvous).items()})
    limit = case["file_limits"].get(str(rank))
    if limit is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    if case["fault"] == rank:
        TextPiece.forward = fail  # type: ignore[method-assign]
    return main(case["argv"])


def fail(*given: Any, **named: Any) -> Any:
    raise RuntimeError("a stage fails for a test")


if __name__ == "__main__":
    cases, results = Path(sys.argv[1]), Path(sys.argv[2])
    done = {
        name: run_case(case, results.parent) for name, case in json.loads(cases.read_text()).items()
    }
    results.write_text(json.dumps(done))
