"""`carillon data verify`: every checksum of a set, and that its tables say what its samples are.

The manifest's own, the SHA-256 of each shard, index and items table, the CRC-32 of each index row
and each sample, and each row of the items against the sample that it describes; the counts of the
manifest against what was found; that nothing erased is there again. Every byte is read. All damage
is named, not only the first; a shard is a unit of work, several run at once.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict
from pathlib import Path
from typing import Any

from carillon.engine.config import UserError
from carillon.engine.data.explore.shard_check import Problem, ShardReport, ShardTask, check_shard
from carillon.engine.data.explore.terminal import print_tables, size, table
from carillon.engine.data.manifest import MANIFEST_NAME, Manifest, read_manifest
from carillon.engine.data.shards import open_dataset
from carillon.engine.eval.text_layout import shown

SHOWN = 50
EXIT_DAMAGED = 2

EXAMPLES = """examples:
  carillon data verify data/emoji
  carillon data verify data/emoji --workers 8 --json
the exit code is 2 when anything is damaged
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `carillon data verify`."""
    parser.add_argument("dataset", metavar="DATASET", help="a data set's folder")
    parser.add_argument(
        "--workers", type=int, default=os.cpu_count() or 1, help="processes (default: one per core)"
    )
    parser.add_argument("--json", action="store_true", help="print JSON, with all problems")


def main(args: argparse.Namespace) -> int:
    """Run `carillon data verify`; returns 2 when the set is damaged. Raises UserError."""
    from rich.console import Console
    from rich.progress import Progress

    if args.workers < 1:
        raise UserError(f"--workers {args.workers}: it must be 1 or more")
    with Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("verifying", total=None)
        found = verify(
            args.dataset,
            workers=args.workers,
            progress=lambda done, total: bar.update(task, completed=done, total=total),
        )
    if args.json:
        print(json.dumps(found, indent=1))
    else:
        _tell(found)
    return EXIT_DAMAGED if found["num_problems"] else 0


def verify(
    path: str,
    *,
    workers: int = 1,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, Any]:
    """Check a set; returns what was checked and all problems.

    Raises UserError when there is no set, or its manifest cannot be believed.
    """
    manifest, tasks = _tasks(path)
    total = sum(task.files.size_bytes for task in tasks)
    reports: dict[int, ShardReport] = {}
    done = 0
    for number, report in _checked(tasks, workers):
        reports[number] = report
        done += tasks[number].files.size_bytes
        progress(done, total)
    # Whatever the order in which shards ended, problems are told in that of the manifest.
    ordered = [reports[number] for number in range(len(tasks))]
    problems = [problem for report in ordered for problem in report.problems]
    num_problems = sum(report.num_problems for report in ordered)
    if not num_problems and all(task.files.items is not None for task in tasks):
        problems = list(_wrong_counts(manifest, tasks, ordered))
        num_problems = len(problems)
    return {
        "name": manifest.name,
        "fingerprint": manifest.fingerprint,
        "shards": len(tasks),
        "samples_read": sum(report.num_samples for report in ordered),
        "bytes": total,
        "num_problems": num_problems,
        "problems": [asdict(one) for one in problems],
    }


def _tasks(path: str) -> tuple[Manifest, list[ShardTask]]:
    folder = Path(path).absolute()
    if (folder / MANIFEST_NAME).is_file():
        # Not by open_dataset, which stops at the first shard that is missing or cut short.
        manifest = read_manifest(folder / MANIFEST_NAME)
        source = str(folder)
    else:
        manifest = open_dataset(path).manifest
        source = path
    tasks = []
    for split, files in manifest.splits.items():
        start = 0
        for shard in files.shards:
            tasks.append(ShardTask(source, split, start, shard))
            start += shard.num_samples
    return manifest, tasks


def _checked(tasks: list[ShardTask], workers: int) -> Iterator[tuple[int, ShardReport]]:
    if workers == 1 or len(tasks) == 1:
        yield from enumerate(map(check_shard, tasks))
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(min(workers, len(tasks)), mp_context=context) as pool:
        futures = {pool.submit(check_shard, task): number for number, task in enumerate(tasks)}
        try:
            for future in as_completed(futures):
                yield futures[future], future.result()
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def _wrong_counts(
    manifest: Manifest, tasks: Sequence[ShardTask], reports: Sequence[ShardReport]
) -> Iterator[Problem]:
    """What the manifest counts otherwise than the shards."""
    for split, files in manifest.splits.items():
        for what in ("languages", "licences", "modalities"):
            found: Counter[str] = Counter()
            for task, report in zip(tasks, reports, strict=True):
                if task.split == split:
                    found.update(report.counts.get(what, {}))
            said = getattr(files, what)
            wrong = [name for name in {**said, **found} if said.get(name, 0) != found[name]]
            if wrong:
                detail = f"{wrong[0]}: {said.get(wrong[0], 0):,} said, {found[wrong[0]]:,} found"
                reason = f"its {what} of {split} are not the set's: {detail}"
                yield Problem(MANIFEST_NAME, None, reason)


def _tell(found: dict[str, Any]) -> None:
    checked = (
        f"{shown(found['name'])}: {found['shards']:,} shards, {found['samples_read']:,} samples, "
        f"{size(found['bytes'])}"
    )
    if not found["num_problems"]:
        print(f"{checked}: whole")
        return
    rows = [(one["file"], one["key"], one["what"]) for one in found["problems"][:SHOWN]]
    print_tables(table("damaged", ("file", "item", "what"), rows))
    left = found["num_problems"] - len(rows)
    print(f"{checked}: {found['num_problems']:,} problems" + (f", {left:,} not shown" * bool(left)))
    print("copy the files named again, or build the set again")
