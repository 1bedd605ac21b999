"""What the commands of the sets share: arguments, reuse of a finished set, building, a summary.

A set is a `Recipe`: settings that name it, and a function that fetches what it is made of and lists
its jobs. A job is made into an `Item` by the recipe's `make`, in other processes where there are
any, and written in the order of the jobs, so the same packages and settings give the same bytes. A
set with equal settings is reused without fetching anything. What cannot be used is not lost: it is
listed with its reason in left-out.jsonl beside the shards.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, TypeVar

from carillon.engine.config import UserError
from carillon.engine.data.manifest import MANIFEST_NAME
from carillon.engine.data.process_map import ordered_map
from carillon.engine.data.samples import SampleError
from carillon.engine.data.shards import Dataset, ShardWriter, open_dataset

LEFT_OUT = "left-out.jsonl"
HELDOUT_ONE_IN = 10
MAX_PER_LANGUAGE = 20_000

Job = TypeVar("Job")


@dataclass(frozen=True, kw_only=True)
class Item:
    """A sample to write."""

    key: str
    split: str
    members: Mapping[str, bytes]
    meta: Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class LeftOut:
    """What could have been a sample, and why it is none."""

    key: str
    reason: str


@dataclass(frozen=True, kw_only=True)
class Collected(Generic[Job]):
    """What a set is made from: sums of what was fetched, versions of programs, the jobs."""

    packages: Mapping[str, str | None]
    jobs: Sequence[Job]
    left_out: Sequence[LeftOut] = ()
    tools: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Recipe(Generic[Job]):
    """One kind of set; `version` is raised when the same settings would give other bytes.

    `make` is called in other processes, so it and the jobs must be picklable.
    """

    name: str
    version: int
    settings: Mapping[str, Any]
    collect: Callable[[], Collected[Job]]
    make: Callable[[Job], Item | LeftOut]


def build_set(
    recipe: Recipe[Job],
    out: Path,
    *,
    limit: int | None = None,
    workers: int = 1,
    overwrite: bool = False,
) -> Dataset:
    """Build the set at `out`, or open it when it was built with the same settings.

    `limit` takes that many jobs, spread over all. Raises UserError for bad settings, missing
    packages or programs, or another set at `out`.
    """
    if limit is not None and limit < 1:
        raise UserError(f"--limit {limit}: at least one sample is needed")
    if workers < 1:
        raise UserError(f"--workers {workers}: at least one process is needed")
    settings = {"kind": recipe.name, "recipe": recipe.version, **recipe.settings, "limit": limit}
    settings = json.loads(json.dumps(settings))  # as it reads after a round trip
    if (out / MANIFEST_NAME).is_file() and not overwrite:
        dataset = open_dataset(out)
        found = dataset.manifest.source
        if {name: found.get(name) for name in settings} == settings:
            return dataset
        raise UserError(f"{out} was built with other settings. Give --out or --overwrite.")
    # Opened first: an `out` that cannot be written is told before anything is fetched.
    with ShardWriter(out, name=recipe.name, source=settings, overwrite=overwrite) as writer:
        collected = recipe.collect()
        writer.describe(packages=dict(collected.packages), tools=dict(collected.tools))
        jobs = _spread(collected.jobs, limit)
        left_out = list(collected.left_out)
        for made in _make_all(recipe, jobs, workers):
            left_out += _written(writer, made)
        lines = (json.dumps(vars(one), ensure_ascii=False) + "\n" for one in left_out)
        writer.attach(LEFT_OUT, "".join(lines).encode())
    return open_dataset(out)


def parse_languages(text: str) -> tuple[str, ...]:
    """What `--languages` lists."""
    return tuple(part.strip() for part in text.split(",") if part.strip())


def check_languages(languages: Sequence[str], known: Iterable[str]) -> None:
    """Raise UserError unless each of the languages is known and given once."""
    allowed = list(known)
    if not languages or len(set(languages)) != len(languages) or set(languages) - set(allowed):
        raise UserError(
            f"--languages {','.join(languages)}: give each once, of {', '.join(allowed)}"
        )


def is_heldout(name: str, one_in: int = HELDOUT_ONE_IN) -> bool:
    """Whether a concept, text or speaker belongs to the held-out share: by hash, so for ever."""
    return hash_of(name) % one_in == 0


def hash_of(name: str) -> int:
    """A number of 64 bits that is the same on every machine."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big")


def add_build_arguments(
    parser: argparse.ArgumentParser, name: str, *, packages: str, workers: bool = False
) -> None:
    """Declare the options that all sets have; `packages` says what `--data` is a folder of."""
    parser.add_argument(
        "--out", type=Path, default=Path("data") / name, help=f"folder to write (data/{name})"
    )
    parser.add_argument(
        "--data", type=Path, help=f"folder of the {packages}, when they cannot be fetched from here"
    )
    parser.add_argument("--limit", type=int, help="build this many samples only (all)")
    if workers:
        parser.add_argument(
            "--workers", type=int, default=os.cpu_count() or 1, help="processes (all cores)"
        )
    parser.add_argument(
        "--overwrite", action="store_true", help="replace a set built with other settings"
    )


def add_drawn_arguments(parser: argparse.ArgumentParser, known: Iterable[str], noun: str) -> None:
    """Declare the options of sets that draw so many samples of each language."""
    codes = ",".join(known)
    parser.add_argument("--languages", default=codes, help=f"comma-separated CLDR codes ({codes})")
    parser.add_argument(
        "--per-language", type=int, default=100, help=f"{noun} of each language (100)"
    )
    parser.add_argument("--seed", type=int, default=0, help="what is drawn by chance (0)")


def drawn_settings(
    languages: Sequence[str], known: Iterable[str], per_language: int, seed: int
) -> dict[str, Any]:
    """Those options as settings of a recipe. Raises UserError when they are out of range."""
    check_languages(languages, known)
    if not 1 <= per_language <= MAX_PER_LANGUAGE:
        raise UserError(f"--per-language {per_language}: 1 to {MAX_PER_LANGUAGE:,} are allowed")
    return {"languages": list(languages), "per_language": per_language, "seed": seed}


def shared(args: argparse.Namespace) -> dict[str, Any]:
    """What `add_build_arguments` declared but for --out, as a set's builder takes it."""
    names = ("data", "limit", "workers", "overwrite")
    return {name: getattr(args, name) for name in names}


def told(dataset: Dataset, noun: str) -> int:
    """Print what a set holds; the exit code."""
    for line in summary(dataset, noun):
        print(line)
    return 0


def summary(dataset: Dataset, noun: str = "samples") -> Iterator[str]:
    """The set in a few lines: samples by split, texts by language, licences."""
    manifest = dataset.manifest
    yield f"{dataset.path}  fingerprint {dataset.fingerprint[:16]}"
    for name, split in manifest.splits.items():
        yield f"  {name:16} {split.num_samples:7,} {noun}"
    for title, attribute in (("texts", "languages"), ("licences", "licences")):
        total: Counter[str] = Counter()
        for split in manifest.splits.values():
            total.update(getattr(split, attribute))
        yield f"  {title}: " + ", ".join(f"{name} {n:,}" for name, n in sorted(total.items()))
    left_out = dataset.path / LEFT_OUT
    if left_out.is_file() and (lines := left_out.read_bytes().splitlines()):
        yield f"  left out: {len(lines):,}, with reasons in {left_out}"


def _spread(jobs: Sequence[Job], limit: int | None) -> Sequence[Job]:
    """`limit` jobs at equal distances, so that a small part has some of everything."""
    if limit is None or limit >= len(jobs):
        return jobs
    return [jobs[number * len(jobs) // limit] for number in range(limit)]


def _make_all(recipe: Recipe[Job], jobs: Sequence[Job], workers: int) -> Iterator[Item | LeftOut]:
    from rich.progress import track

    made = ordered_map(recipe.make, jobs, workers=workers)
    yield from track(made, total=len(jobs), description=f"building {recipe.name}")


def _written(writer: ShardWriter, made: Item | LeftOut) -> list[LeftOut]:
    if isinstance(made, LeftOut):
        return [made]
    try:
        writer.write(made.key, made.members, made.meta, split=made.split)
    except SampleError as error:
        return [LeftOut(key=error.key, reason=error.reason)]
    return []
