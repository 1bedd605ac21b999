"""Proof that a save reaches the disk before it gets its name, seen from outside: `make prove-kill`.

A short run is traced with strace. For every checkpoint it holds that each file of it was synced,
then the folder, before the rename that gives the final name, and the folder above after it. A
surviving file after a kill would prove nothing: the kernel keeps what a dead process wrote.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from prove_kill import RESULTS, ROOT, Run, Violation, circumstances, config_values, write_set

from carillon.engine.strict_yaml import dump_yaml

# strace -y writes fsync(7</runs/.../state.json>) = 0 and rename("a", "b") = 0.
_CALL = re.compile(r"(fsync|fdatasync|rename\w*)\((.*)\)\s+= 0")
_UNFINISHED = re.compile(r"^(\d+) .*?(fsync|fdatasync)\(\d+<([^>]*)> <unfinished")
_RESUMED = re.compile(r"^(\d+) .*<\.\.\. (fsync|fdatasync) resumed>.*= 0")


def events(trace: Path) -> list[tuple[str, str, str]]:
    """(sync, path, "") and (rename, from, to) in the order in which the calls returned."""
    found, waiting = [], {}
    for line in trace.read_text().splitlines():
        if unfinished := _UNFINISHED.match(line):
            waiting[unfinished[1]] = unfinished[3]
        elif resumed := _RESUMED.match(line):
            found.append(("sync", waiting.pop(resumed[1]), ""))
        elif call := _CALL.search(line):
            if call[1].startswith("rename"):
                source, target = re.findall(r'"([^"]*)"', call[2])
                found.append(("rename", source, target))
            else:
                found.append(("sync", call[2].partition("<")[2].rpartition(">")[0], ""))
    return found


def check_save(calls: list[tuple[str, str, str]], final: Path) -> int:
    """Number of files whose sync was seen in time. Raises Violation."""
    temporary = Path(f"{final}.tmp")
    at = calls.index(("rename", str(temporary), str(final)))
    synced = {path for what, path, _ in calls[:at] if what == "sync"}
    moved = {
        target: source for what, source, target in calls[:at] if what == "rename"
    }  # DCP's metadata is written and synced under another name
    names = [file.name for file in final.iterdir()]
    for name in names:
        path = str(temporary / name)
        if path not in synced and moved.get(path) not in synced:
            raise Violation(f"{path} was not synced before its folder got its name")
    last = [index for index, call in enumerate(calls[:at]) if call[:2] == ("sync", str(temporary))]
    files = [index for index, call in enumerate(calls[:at]) if str(temporary) + "/" in call[1]]
    if not last or last[-1] < files[-1]:
        raise Violation(f"{temporary} was not synced between its files and its rename")
    if ("sync", str(final.parent), "") not in calls[at:]:
        raise Violation(f"{final.parent} was not synced after the rename")
    return len(names)


def prove(work: Path) -> dict[str, object]:
    data = write_set(work / "generated")
    config = work / "kill.yaml"
    config.write_text(dump_yaml(config_values(data, 6) | {"optimization": {"steps": 6}}))
    run, trace = Run(config, work / "runs"), work / "trace"
    calls = "fsync,fdatasync,rename,renameat,renameat2"
    strace = ["strace", "-f", "-y", "-s", "4096", "-e", f"trace={calls}", "-o", str(trace)]
    train = [sys.executable, "-m", "carillon.engine.cli", "train", str(config)]
    subprocess.run(
        [*strace, *train, f"logging.output={run.output}"],
        check=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    checkpoints = run.checkpoints()
    counts = [check_save(events(trace), checkpoint.path) for checkpoint in checkpoints]
    return {"proof": "durable saves", "checkpoints": len(counts), "files_synced": sum(counts)}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, default=ROOT / "runs" / "prove_durable")
    args = parser.parse_args()
    if shutil.which("strace") is None:
        print("strace is not installed (apt-get install strace)", file=sys.stderr)
        return 2
    shutil.rmtree(args.work, ignore_errors=True)
    args.work.mkdir(parents=True)
    try:
        figures = prove(args.work.resolve())
    except Violation as violation:
        print(f"VIOLATION: {violation}", file=sys.stderr)
        return 1
    with RESULTS.open("a") as file:
        file.write(json.dumps(circumstances() | figures) + "\n")
    print(json.dumps(figures))
    shutil.rmtree(args.work)
    return 0


if __name__ == "__main__":
    sys.exit(main())
