"""Proof that data reach training whole through every kill: `make prove-data`.

A web server of this machine offers a list of photos, some slow, broken, endless or hostile, and an
S3 (moto's) a folder and tars. The commands are a user's: `carillon ingest` of each, `carillon
curate` of each against an evaluation set that leaked into the list, `carillon data stats`, and
`carillon train` on a mixture of both: a decoder on packed captions, and a dual encoder.
All runs once undisturbed. Then each stage is killed with SIGKILL at random moments, all processes
of it at once, and the same command is given again, until it ends by itself. It holds that every
data set has the same files to the byte (so the same items, fingerprint, rejections, removals and
report), that nothing is left beside them, that the statistics are the same, and that each run saw
the same sample keys (and what prove_kill.py holds of kills and checkpoints).
State is kept in --work, so the proof itself can be interrupted; one line of results is appended to
results/prove_data.jsonl.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import boto3
import pyarrow.parquet as pq
from data_sources import STORE_SOURCES, fill_store, fill_web, write_evaluation
from local_servers import Web, s3_environment, s3_server, web_server
from process_tree import kill_all
from prove_kill import (
    Run,
    Series,
    Violation,
    check,
    circumstances,
    config_values,
    finish,
    packed_values,
)

from carillon.engine.data.shards import open_dataset
from carillon.engine.strict_yaml import dump_yaml

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "prove_data.jsonl"
SETS = ("web", "store")
PIPELINE = """name: proof
stages:
  - {type: licence, allow: [LicenseRef-research, Flickr8k*], unstated: allow}
  - {type: picture_size, min_side: 64}
  - {type: captions, max_words: 64}
  - {type: pii, replace: true}
  - {type: blur, min_sharpness: 4.0}
  - {type: exact_duplicates}
  - {type: near_pictures}
  - {type: near_texts, action: flag}
"""
REGISTRY = ("--registry", "registry.sqlite")
INGEST_WEB = (
    *("--caption-column", "en=caption_en", "--caption-column", "de=caption_de"),
    *("--tries", "2", "--timeout", "5", "--max-item-mb", "1", "--max-bad-share", "0.5"),
    *("--per-host", "16", "--per-host-per-second", "25"),
)


@dataclass(frozen=True)
class Stage:
    """A command that makes a data set in the folder where it is run."""

    name: str
    arguments: tuple[str, ...]
    makes: str  # the folder that is there once it is done

    def launch(self, folder: Path, log: Path) -> subprocess.Popen[str]:
        """Start it as a user would; what it says is appended to `log`."""
        with log.open("a") as said:
            return subprocess.Popen(
                ["carillon", *self.arguments],
                cwd=folder,
                stdout=said,
                stderr=subprocess.STDOUT,
                text=True,
                start_new_session=True,
            )

    def finish(self, folder: Path, log: Path) -> float:
        """Run it to its end; returns the seconds. Raises Violation when it fails."""
        begin = time.monotonic()
        process = self.launch(folder, log)
        try:
            code = process.wait()
        finally:
            kill_all(process)
        if code != 0 or not (folder / self.makes).exists():
            raise Violation(f"{self.name} ended with {code}:\n{log.read_text()[-3000:]}")
        return round(time.monotonic() - begin, 2)


def stages(web: Web, work: Path) -> list[Stage]:
    """Ingest, curate and statistics of both sets."""
    sources = {
        "web": (str(work / "list.csv"), *INGEST_WEB, "--allow-host", web.address),
        "store": (*STORE_SOURCES, "--language", "en"),
    }
    found = [Stage(f"ingest {n}", ("ingest", *sources[n], "--out", n, *REGISTRY), n) for n in SETS]
    against = ("--against", str(work / "evaluation"), *REGISTRY)
    for n in SETS:
        curate = ("curate", str(work / "pipeline.yaml"), n, "--out", f"clean-{n}", *against)
        found.append(Stage(f"curate {n}", curate, f"clean-{n}"))
    return found


# Kills


def killed(stage: Stage, work: Path, state: dict[str, Any], keep: Callable[[], None]) -> None:
    """Kill the stage `state["num_kills"]` times at random moments and let it end.

    Where it ends before, its files are compared and it begins anew. Raises Violation.
    """
    folder, log = work / "killed", work / "killed" / f"{stage.makes}.log"
    kills = state.setdefault("kills", [])
    while len(kills) < state["num_kills"]:
        if (folder / stage.makes).exists():
            compare(stage.makes, work)
            shutil.rmtree(folder / stage.makes)
            state["ended"] = state.get("ended", 0) + 1
        draw = random.Random(f"{stage.name} {len(kills)} {state.get('ended', 0)}")
        after_s = draw.uniform(0.3, 0.95 * state["undisturbed_s"])
        process, begin = stage.launch(folder, log), time.monotonic()
        try:
            process.wait(timeout=after_s)
        except subprocess.TimeoutExpired:
            pass
        finally:
            kill_all(process)
        after_s = time.monotonic() - begin
        if process.returncode not in (0, -signal.SIGKILL):
            raise Violation(f"{stage.name} ended by itself with {process.returncode}: see {log}")
        if process.returncode != 0:
            kills.append({"after_s": round(after_s, 2), "safe": num_safe(folder, stage.makes)})
            print(f"{stage.name}: killed after {after_s:.1f} s, {kills[-1]['safe']}", flush=True)
        keep()
    if (folder / stage.makes).exists():  # the last kill came after that, perhaps before its row
        Stage("register", ("data", "register", stage.makes, *REGISTRY), stage.makes).finish(
            folder, log
        )
    else:
        state["last_s"] = stage.finish(folder, log)
    compare(stage.makes, work)
    left = [path.name for path in folder.glob(f".{stage.makes}.*")]
    if left:
        raise Violation(f"{stage.name} left {left} behind")


def num_safe(folder: Path, name: str) -> str:
    """What the stage would not do again: entries of an ingest, scored parts of a curation."""
    unfinished = folder / f".{name}.ingest" / "state.json"
    if unfinished.is_file():
        return f"{json.loads(unfinished.read_bytes())['num_done']} entries are safe"
    parts = len(list(folder.glob(f".{name}.curation-*/*.arrow")))
    return f"{parts} scored parts are safe" if parts else "nothing is safe yet"


# What is compared


def digests(folder: Path) -> dict[str, str]:
    """SHA-256 of each file."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def compare(name: str, work: Path) -> dict[str, str]:
    """The files of a set and their sums, the same as undisturbed. Raises Violation."""
    expected, found = digests(work / "whole" / name), digests(work / "killed" / name)
    if expected != found:
        different = [file for file in expected if expected[file] != found.get(file)]
        raise Violation(f"{name} has other files than undisturbed: {different}")
    return expected


def lineage(folder: Path, name: str) -> list[str]:
    """What `carillon data lineage` says that a set was made from."""
    command = ["carillon", "data", "lineage", name, "--json", *REGISTRY]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    if done.returncode != 0:
        raise Violation(f"carillon data lineage: {done.stderr}")
    return [one["fingerprint"] for one in json.loads(done.stdout)["parents"]]


def compare_sets(work: Path) -> dict[str, Any]:
    """Figures of the data sets, which are the same in both folders. Raises Violation."""
    figures: dict[str, Any] = {}
    for name in [*SETS, *(f"clean-{name}" for name in SETS)]:
        folder = work / "killed" / name
        dataset = open_dataset(folder)
        figures[name] = {
            "fingerprint": dataset.fingerprint,
            "files_equal": len(compare(name, work)),
            "bytes_equal": sum(path.stat().st_size for path in folder.iterdir()),
            "items": sum(len(split) for split in dataset.splits.values()),
        }
        if name.startswith("clean-"):
            figures[name]["removed"] = removed(folder)
            made_from = lineage(work / "killed", name)
            raw = open_dataset(work / "killed" / name.removeprefix("clean-")).fingerprint
            if made_from != [raw] or lineage(work / "whole", name) != [raw]:
                raise Violation(f"the registry says that {name} was made from {made_from}")
            figures[name]["made_from"] = raw
        else:
            figures[name]["rejected"] = rejected(folder)
    return figures


def rejected(folder: Path) -> dict[str, int]:
    """How many entries ingest rejected, by reason without its numbers."""
    lines = (folder / "rejected.jsonl").read_text().splitlines()
    found = Counter(re.sub(r"\b\d[\d,.]*\b", "N", json.loads(line)["reason"]) for line in lines)
    return dict(found.most_common())


def removed(folder: Path) -> dict[str, int]:
    """How many items curation took out or flagged, by action and stage."""
    rows = [
        row for path in folder.glob("removed-*.parquet") for row in pq.read_table(path).to_pylist()
    ]
    return dict(Counter(f"{row['outcome']} by {row['stage']}" for row in rows).most_common())


# The proof


def train(kind: str, values: dict[str, Any], work: Path, num_kills: int) -> dict[str, Any]:
    """A run on the undisturbed sets, and one on the others that is killed again and again."""
    runs = {}
    for name in ("whole", "killed"):
        mixture = {n: {"path": str(work / name / f"clean-{n}"), "weight": 1.0} for n in SETS}
        config = work / f"{kind}-{name}.yaml"
        given = values | {"data": values["data"] | {"path": None, "mixture": mixture}}
        config.write_text(dump_yaml(given))
        runs[name] = Run(config, work / f"{kind}-{name}")
    finish(runs["whole"], 1, work / f"{kind}-whole.log", 0)
    steps = values["optimization"]["steps"]
    series = Series(kind, runs["killed"], (1, 2), num_kills, steps, workers=(0, 1, 2))
    series.go(work)
    return check(series, runs["whole"], bitwise=False)


def prove(work: Path, web: Web, *, num_kills: int, num_steps: int) -> dict[str, Any]:
    """Everything; returns its figures. Raises Violation."""
    path = work / "state.json"
    state: dict[str, Any] = json.loads(path.read_text()) if path.is_file() else {}

    def keep() -> None:
        path.write_text(json.dumps(state))

    begin = time.monotonic()
    for stage in stages(web, work):
        own = state.setdefault(stage.name, {"num_kills": num_kills})
        if not (work / "whole" / stage.makes).exists() or "undisturbed_s" not in own:
            shutil.rmtree(work / "whole" / stage.makes, ignore_errors=True)
            own["undisturbed_s"] = stage.finish(
                work / "whole", work / "whole" / f"{stage.makes}.log"
            )
            keep()
            print(f"{stage.name}: {own['undisturbed_s']} s undisturbed", flush=True)
        killed(stage, work, own, keep)
        keep()
    figures: dict[str, Any] = {"sets": compare_sets(work)}
    figures["statistics"] = statistics(work, num_kills)
    num_packed = num_steps * 4  # its steps are short
    packed = packed_values(dict.fromkeys(SETS, Path()), num_packed)
    pairs = config_values(Path(), num_steps)
    pairs["evaluation"] = packed["evaluation"]  # none
    figures["training"] = [
        train("kill-packed", packed, work, num_kills),
        train("kill-pairs", pairs, work, num_kills),
    ]
    return {
        "stages": {stage.name: state[stage.name] for stage in stages(web, work)},
        **figures,
        "minutes": round((time.monotonic() - begin) / 60, 1),
    }


def statistics(work: Path, num_kills: int) -> dict[str, Any]:
    """That `carillon data stats` says the same of both, when it was killed before, too."""
    said, draw, num_cut = {}, random.Random("statistics"), 0
    for name in ("whole", "killed"):
        command = ["carillon", "data", "stats", "clean-web", "--json"]
        for _ in range(num_kills if name == "killed" else 0):
            process = subprocess.Popen(
                command, cwd=work / name, stdout=subprocess.DEVNULL, text=True
            )
            time.sleep(draw.uniform(0.1, 1))
            kill_all(process)
            num_cut += process.returncode == -signal.SIGKILL
        done = subprocess.run(command, cwd=work / name, capture_output=True, text=True)
        if done.returncode != 0:
            raise Violation(f"carillon data stats: {done.stderr}")
        said[name] = done.stdout.replace(str(work / name), "")
    if said["whole"] != said["killed"]:
        raise Violation(f"the statistics differ:\n{said['whole']}\n{said['killed']}")
    return {"kills": num_cut, "equal": True}


def prepared(work: Path, web: Web) -> None:
    """The sources, and the evaluation set."""
    for name in ("whole", "killed"):
        (work / name).mkdir(parents=True, exist_ok=True)
    if not (work / "pipeline.yaml").is_file():
        fill_web(web, work / "list.csv")
        (work / "pipeline.yaml").write_text(PIPELINE)
    else:
        fill_web(web, work / "again.csv")  # the same routes; the list keeps its time
    if not (work / "evaluation").is_dir():
        write_evaluation(work / "photos")
        ingest = ("ingest", "photos", "--out", "evaluation", "--language", "en")
        Stage("ingest the evaluation set", ingest, "evaluation").finish(work, work / "log")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, default=ROOT / "runs" / "prove_data")
    parser.add_argument("--kills", type=int, default=5, help="kills of each stage")
    parser.add_argument("--steps", type=int, default=90, help="steps of the dual encoder")
    args = parser.parse_args(arguments)
    work = args.work.resolve()
    work.mkdir(parents=True, exist_ok=True)
    os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    os.environ |= {"XDG_CACHE_HOME": str(work / "cache"), "OMP_NUM_THREADS": "1"}
    port = work / "port"  # the list has it
    try:
        with web_server(int(port.read_text()) if port.is_file() else 0) as web, s3_server() as s3:
            port.write_text(str(web.server_port))
            os.environ |= s3_environment(s3)
            fill_store(boto3.client("s3"))
            prepared(work, web)
            figures = prove(work, web, num_kills=args.kills, num_steps=args.steps)
    except Violation as violation:
        print(f"VIOLATION: {violation}", file=sys.stderr)
        return 1
    with RESULTS.open("a") as file:
        file.write(json.dumps(circumstances() | figures) + "\n")
    print(json.dumps(figures, indent=1))
    shutil.rmtree(work)
    return 0


if __name__ == "__main__":
    sys.exit(main())
