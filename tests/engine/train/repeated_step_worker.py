"""Steps of a decoder in deterministic mode, twice over: repeated_step_worker.py RESULTS.json

The parent has torch imported and forks the processes of each run and number of processes anew, so
that two runs share no state. Of each case, the loss and the SHA-256 of every whole gradient.
"""

import hashlib
import json
import socket
import sys
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from carillon.engine.parallel.determinism import fixed_order
from carillon.engine.parallel.mesh import degrees_of, lay_out
from carillon.engine.train.parity.columns import DECODERS
from carillon.engine.train.parity.rows import ROWS
from carillon.engine.train.parity.step import Step, Variant

CASES = {  # rows of the parity table by number of processes; four of them have sums of four
    2: ("EP2", "CP2, ulysses", "CP2, ring", "CP2, all_gather"),
    4: ("EP4", "CP4", "CP2xEP2", "EP2xTP2+SP", "PP2xEP2 1F1B"),
}


def digests(step: Step) -> dict[str, str]:
    found = {
        name: hashlib.sha256(gradient.contiguous().numpy()).hexdigest()
        for name, gradient in step.gradients.items()
    }
    return {"loss": step.loss.hex(), **found}


def one_process(rank: int, size: int, port: int, out: Path) -> None:
    address = f"tcp://127.0.0.1:{port}"
    dist.init_process_group("gloo", init_method=address, rank=rank, world_size=size)
    rows = {row.name: row for row in ROWS if row.size == size}
    found = {}
    with fixed_order(True):
        for name in CASES[size]:
            layout = rows[name].layout(Variant())
            world = lay_out(degrees_of(layout, size), torch.device("cpu"))
            for column, run in DECODERS.items():
                step = run(layout, world, Variant(), rows[name].depth)
                found[f"{name}, {column}"] = digests(step)
    if rank == 0:
        out.write_text(json.dumps(found))
    dist.destroy_process_group()


def main(out: Path) -> None:
    runs: list[dict[str, dict[str, str]]] = []
    for _ in range(2):
        found: dict[str, dict[str, str]] = {}
        for size in CASES:
            with socket.socket() as probe:
                probe.bind(("127.0.0.1", 0))
                port = probe.getsockname()[1]
            given = (size, port, out)
            mp.start_processes(one_process, given, nprocs=size, start_method="fork")
            found |= json.loads(out.read_text())
        runs.append(found)
    out.write_text(json.dumps(runs))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
