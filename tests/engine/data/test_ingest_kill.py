"""An ingest of a list of URLs that is killed again and again: no item twice, none lost, same bytes.

The server has slow, broken, endless and hostile items among sound ones. The processes are real and
so are the kills.
"""

import csv
import io
import json
import runpy
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from carillon.engine.data.shards import Dataset, open_dataset

NUM_ITEMS = 117
# What is started: saves are frequent, retries quick, shards small.
PROGRAM = """
import sys
from pathlib import Path
from carillon.engine.data.ingest import ingest
from carillon.engine.data.ingest_options import IngestOptions
from carillon.engine.data.ingest_loading import FetchOptions
from carillon.engine.data.ingest_order import Pace
out, allow, workers, *sources = sys.argv[1:]
if __name__ == "__main__":
    ingest(sources, Path(out), options=IngestOptions(
        max_bad_share=0.5, validation_share=0.2, max_shard_bytes=8_000, workers=int(workers),
        save_every_s=0.05,
        fetch=FetchOptions(allow_hosts=(allow,), timeout_s=120.0, tries=2, first_pause_s=0.05,
                           max_item_bytes=20_000),
        pace=Pace(connections=16, per_host=12, per_host_per_s=1e5, window_items=40)))
"""


def jpeg(number: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (16, 16), (number % 256, number // 2 % 256, 7)).save(buffer, "JPEG")
    return buffer.getvalue()


SERVERS = runpy.run_path(str(Path(__file__).resolve().parents[3] / "benchmarks/local_servers.py"))
redirect, slowly, status = (SERVERS[name] for name in ("redirect", "slowly", "status"))
BAD = {
    "missing": (status(404), "HTTP status 404"),
    "failing": (status(503), "HTTP status 503"),
    "endless": (SERVERS["endless"], "more than 20,000 bytes"),
    "page": (b"<html>not a picture", "not a JPEG"),
    "cut": (jpeg(1)[:200], "Truncated"),
    "inside": (redirect("http://127.0.0.2/x"), "not on the public internet"),
    "metadata": (redirect("http://169.254.169.254/latest"), "not on the public internet"),
    "file": (redirect("file:///etc/passwd"), "only http:// and https://"),
    "unwanted": (SERVERS["wished"](jpeg(2)), "X-Robots-Tag: noai"),
}


def url_list(web: Any, folder: Path) -> Path:
    """A list of all items, with hostile ones between, and one URL named in two rows."""
    rows = [["URL", "TEXT"]]
    kinds = list(BAD)
    for number in range(NUM_ITEMS):
        web.routes[f"/{number}.jpg"] = slowly(jpeg(number)) if number % 9 == 4 else jpeg(number)
        rows.append([web.url(f"/{number}.jpg"), f"picture {number}"])
        if number % 13 == 5:
            kind = kinds[number // 13]
            web.routes[f"/bad/{kind}.jpg"] = BAD[kind][0]
            rows.append([web.url(f"/bad/{kind}.jpg?{number}"), f"bad {number}"])
    rows.append([web.url("/0.jpg"), "the first again"])
    path = folder / "list.csv"
    with path.open("w", newline="") as file:
        csv.writer(file).writerows(rows)
    return path


def start(web: Any, out: Path, *sources: Path, workers: int = 0) -> subprocess.Popen[bytes]:
    arguments = [str(out), web.address, str(workers), *map(str, sources)]
    return subprocess.Popen(
        [sys.executable, "-c", PROGRAM, *arguments],
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
    )


def finish(process: subprocess.Popen[bytes]) -> None:
    _, said = process.communicate(timeout=120)
    assert process.returncode == 0, said.decode()


def num_done(out: Path) -> int:
    try:
        state = json.loads((out.parent / f".{out.name}.ingest" / "state.json").read_bytes())
        return int(state["num_done"])
    except FileNotFoundError:
        return 0


def content(out: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(out.iterdir())}


def texts(dataset: Dataset) -> dict[str, list[str]]:
    split = [s.read(row) for s in dataset.splits.values() for row in range(len(s))]
    assert len({sample.key for sample in split}) == len(split)
    return {sample.meta["source"]: sample.meta["captions"]["und"] for sample in split}


@pytest.mark.timeout(400)
def test_killed_again_and_again_it_loses_nothing_and_gives_the_same_bytes(
    web: Any, tmp_path: Path
) -> None:
    source = url_list(web, tmp_path)
    whole, killed = tmp_path / "whole" / "set", tmp_path / "killed" / "set"
    finish(start(web, whole, source))
    kills = []
    for moment in range(6):
        process = start(web, killed, source, workers=moment % 2)
        before = num_done(killed)
        wanted = before + 2 + 3 * moment
        while process.poll() is None and num_done(killed) < wanted:
            time.sleep(0.002)
        time.sleep(0.003 * moment)
        process.kill()
        _, said = process.communicate()
        if process.returncode != -signal.SIGKILL:
            assert process.returncode == 0, said.decode()
            break  # it was done before
        if killed.exists():
            break  # it was published before, and killed on its way out
        kills.append(num_done(killed))
        assert kills[-1] >= before
    assert len(kills) >= 3
    if not killed.exists():
        finish(start(web, killed, source))
    assert content(killed) == content(whole)
    assert not list(killed.parent.glob(".*")), "nothing is left beside the set"

    dataset = open_dataset(killed)
    found = texts(dataset)
    assert found.pop(web.url("/0.jpg")) == ["picture 0", "the first again"]
    assert found == {web.url(f"/{n}.jpg"): [f"picture {n}"] for n in range(1, NUM_ITEMS)}
    rejected = [json.loads(line) for line in content(killed)["rejected.jsonl"].splitlines()]
    assert len(rejected) == len(BAD)
    for entry in rejected:
        kind = entry["image"].rpartition("/")[2].partition(".")[0]
        assert BAD[kind][1] in entry["reason"], entry


def test_it_is_taken_up_where_it_stopped_and_says_what_changed(web: Any, tmp_path: Path) -> None:
    source = url_list(web, tmp_path)
    out = tmp_path / "out" / "set"
    process = start(web, out, source)
    while process.poll() is None and num_done(out) < 30:
        time.sleep(0.002)
    process.kill()
    process.communicate()
    done = num_done(out)
    assert 30 <= done < NUM_ITEMS

    again = start(web, out, source, tmp_path / "more.csv")
    _, said = again.communicate(timeout=60)
    assert again.returncode == 1
    assert b"it was begun otherwise: the sources was [" in said
    assert num_done(out) == done, "it is still there"

    asked = len(web.seen)
    finish(start(web, out, source))
    paths = [path for path, _ in web.seen[asked:]]
    assert "/1.jpg" not in paths, "what is done is not fetched again"
    assert f"/{NUM_ITEMS - 1}.jpg" in paths
    assert len(texts(open_dataset(out))) == NUM_ITEMS


def test_two_at_a_time_are_refused(web: Any, tmp_path: Path) -> None:
    source = url_list(web, tmp_path)
    first = start(web, tmp_path / "set", source)
    while first.poll() is None and num_done(tmp_path / "set") < 5:
        time.sleep(0.002)
    first.send_signal(signal.SIGSTOP)
    second = start(web, tmp_path / "set", source)
    _, said = second.communicate(timeout=100)
    assert b"another ingest is at work in" in said
    first.kill()
    first.communicate()
