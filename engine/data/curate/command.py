"""`carillon curate`: data sets through a pipeline of stages into a new version."""

from __future__ import annotations

import argparse
import os
import shutil
import textwrap
from collections.abc import Iterator
from pathlib import Path

from rich.progress import Progress

from carillon.engine.config import UserError, documented
from carillon.engine.data.curate.catalog import STAGES
from carillon.engine.data.curate.pipeline import load_pipeline, pipeline_hash
from carillon.engine.data.curate.run import CurateOptions, curate
from carillon.engine.data.curate.write import Curated, lineage
from carillon.engine.data.shards import Dataset
from carillon.engine.registry.command import add_registry, open_registry
from carillon.engine.registry.store import Registry

EXAMPLES = """examples:
  carillon curate recipes/curate/pictures.yaml data/raw --out data/clean
  carillon curate recipes/curate/pictures.yaml data/a data/b --out data/ab --against data/test
  carillon curate recipes/curate/pictures.yaml data/raw --out data/clean --ray auto
  carillon curate --stages                           every stage with its settings
a pipeline is a YAML file with a list of stages; --out gets the kept items, removed-000.parquet
with what was taken out and why, and report.html. A run that is cut short goes on when given again
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `carillon curate`."""
    add = parser.add_argument
    add("pipeline", nargs="?", metavar="PIPELINE", help="YAML file with the stages")
    add("datasets", nargs="*", metavar="DATASET", help="data sets to curate together")
    add("--out", type=Path, metavar="DATASET", help="folder to write")
    add("--name", help="name of the new set (default: the folder's)")
    add(
        "--against",
        nargs="+",
        default=[],
        metavar="EVALSET",
        help="evaluation sets: what duplicates one of their items leaves",
    )
    add(
        "--workers", type=int, default=os.cpu_count() or 1, help="processes (default: one per core)"
    )
    add("--worker-memory-gb", type=float, default=8.0, help="limit of a process (default 8)")
    add("--ray", metavar="ADDRESS", help="score by Ray Data: a cluster's address, auto, or local")
    add_registry(parser)
    add("--no-registry", action="store_true", help="enter nothing in the registry")
    add("--overwrite", action="store_true", help="replace an existing data set")
    add("--stages", action="store_true", help="list the stages and their settings, and end")


def main(args: argparse.Namespace) -> int:
    """Run `carillon curate` and print what was kept. Raises UserError."""
    if args.stages:
        print("\n".join(stage_list()))
        return 0
    if args.pipeline is None or not args.datasets or args.out is None:
        raise UserError("give PIPELINE, DATASET and --out, or --stages; see carillon curate --help")
    if args.worker_memory_gb <= 0:
        raise UserError(f"--worker-memory-gb {args.worker_memory_gb:g}: it must be above 0")
    pipeline = load_pipeline(args.pipeline)
    options = _options(args)
    # Opened before the work, so that a registry that cannot be used costs none of it.
    registry = None if args.no_registry else open_registry(args.registry)
    with Progress(*Progress.get_default_columns(), transient=True) as bar:
        task = bar.add_task("scoring", total=None)
        dataset, curated = curate(
            pipeline,
            args.datasets,
            args.out,
            against=args.against,
            name=args.name,
            options=options,
            progress=lambda done, total: bar.update(task, completed=done, total=total),
        )
    _tell(dataset, curated)
    if registry is not None:
        register(registry, dataset, curated)
    return 0


def register(registry: Registry, dataset: Dataset, curated: Curated) -> None:
    """Enter the set, its parents and the links between them in the registry."""
    registry.record_derived(
        dataset,
        curated.datasets,
        relation="curate",
        details={"pipeline_hash": pipeline_hash(curated.pipeline)},
    )


def stage_list() -> Iterator[str]:
    """Every stage with its settings, as `carillon curate --stages` prints them."""
    width = min(100, shutil.get_terminal_size((100, 24)).columns)
    for name, stage in STAGES.items():
        described = (stage.__doc__ or "").strip().split("\n")[0]
        needs = f" Needs the extra [{stage.extra}]." if stage.packages else ""
        yield f"{name}: {described}{needs}"
        for one in documented(stage):
            if one.key == "type":
                continue
            text = f"{one.key} ({one.type}; {one.default}): {one.help}"
            yield textwrap.fill(text, width, initial_indent="  ", subsequent_indent="      ")


def _options(args: argparse.Namespace) -> CurateOptions:
    scorer = None
    if args.ray is not None:
        from carillon.engine.data.curate.ray_scorer import ray_scorer

        scorer = ray_scorer(args.ray, args.workers)
    return CurateOptions(
        workers=args.workers,
        memory_limit_bytes=int(args.worker_memory_gb * (1 << 30)),
        overwrite=args.overwrite,
        scorer=scorer,
    )


def _tell(dataset: Dataset, curated: Curated) -> None:
    told = lineage(curated)
    print(f"{dataset.path}  fingerprint {dataset.fingerprint[:16]}")
    print(f"  kept {told['kept']:,} of {told['items']:,}; quarantined {told['quarantined']:,}")
    for stage, count in told["dropped"].items():
        if count:
            print(f"  dropped by {stage}: {count:,}")
    print(f"  report: {dataset.path / 'report.html'}")
