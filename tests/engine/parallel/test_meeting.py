"""A process that a signal ends while it waits for others leaves by its code, whatever the thread
that waits is doing."""

import os
import signal
import subprocess
import sys

# A thread that comes back from C++ again and again: some time it does so while Python ends.
PROGRAM = """
import torch.distributed as dist
from carillon.engine.parallel import meeting
from carillon.engine.parallel.place import own_place

def hold(self):
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    print("waiting", flush=True)
    while True:
        store.check(["never"])

meeting._Meeting.hold = hold
meeting.meet(own_place(), 60.0, {})
"""


def test_a_signal_ends_a_process_that_waits_without_an_abort() -> None:
    place = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29999"}
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM],
        env=os.environ | place,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "waiting\n"
    process.send_signal(signal.SIGUSR1)
    _, said = process.communicate(timeout=60)
    assert (process.returncode, said) == (75, "")
