"""`carillon data delete-subject`: erases a subject's items, and says what was trained on them.

Which items: by keys, by what their JSON says (`author=...`), or by a text in their captions. A text
fits by chance, so that way a dry run must come first; it gives a code for what it found, and the
erasure is given that code. Items whose media are the same bytes go along: the picture of a subject
is not gone while a copy of it stays. What follows is in erase.py.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from carillon.engine.config import UserError
from carillon.engine.data.explore.erase import (
    RELATION,
    Request,
    aside,
    check_parent,
    files_of,
    purge,
    write_without,
)
from carillon.engine.data.explore.holders import holders_of
from carillon.engine.data.explore.lineage import lineage_of, trained_tables
from carillon.engine.data.explore.selection import (
    Condition,
    Found,
    keyed,
    parse_conditions,
    select,
    with_copies,
)
from carillon.engine.data.explore.terminal import print_tables, size, table
from carillon.engine.data.shards import Dataset, open_dataset
from carillon.engine.registry.command import add_registry, open_registry
from carillon.engine.registry.datasets import find_dataset, supersede
from carillon.engine.registry.store import Registry

SHOWN = 50

EXAMPLES = """examples:
  carillon data delete-subject data/set --where author=Ada --dry-run
  carillon data delete-subject data/set --where author=Ada --out data/b --reason R --requested-by X
  carillon data delete-subject data/set --text "Ada B." --dry-run       its code is for --confirm
  carillon data delete-subject data/set --keys-file keys.txt --dry-run --purge
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `carillon data delete-subject`."""
    add_registry(parser)
    add = parser.add_argument
    add("dataset", metavar="DATASET", help="a data set's folder")
    add("--key", action="append", default=[], metavar="KEY", help="erase this item (repeatable)")
    add("--keys-file", type=Path, metavar="FILE", help="erase the items of a file, a key a line")
    add(
        "--where",
        action="append",
        default=[],
        metavar="FIELD=VALUE",
        help="erase the items of which this holds, such as author=... (repeated: all must hold)",
    )
    add("--text", metavar="TEXT", help="erase the items whose captions contain this; see --confirm")
    add("--out", type=Path, metavar="DATASET", help="folder of the new version")
    add("--name", help="name of the new version (default: the old one's)")
    add("--reason", help="why, for the tombstones")
    add("--requested-by", metavar="WHO", help="who asked for it, for the tombstones")
    add("--dry-run", action="store_true", help="show what would be erased, and do nothing")
    add("--confirm", metavar="CODE", help="the code that a dry run gave for these items")
    add("--drop-damaged", action="store_true", help="leave out samples that cannot be read, too")
    add("--purge", action="store_true", help="remove the old version's files at the end")
    add("--json", action="store_true", help="print JSON")


def main(args: argparse.Namespace) -> int:
    """Run `carillon data delete-subject`. Raises UserError."""
    old = Path(args.dataset).absolute()
    if args.purge and not old.exists() and aside(old).exists():
        purge(old)  # an earlier purge was cut short
        print(f"{old}: removed")
        return 0
    _check(args, old)
    dataset = open_dataset(args.dataset)
    chosen = _chosen(args, dataset)
    request = Request(
        items=with_copies(dataset, chosen),
        reason=args.reason or "",
        requested_by=args.requested_by or "",
        drop_damaged=args.drop_damaged,
    )
    if not request.items:
        raise UserError(f"no item of {dataset.path} fits; nothing was done")
    if args.confirm is not None and args.confirm != request.code(dataset):
        raise UserError(
            f"--confirm {args.confirm} is not of these {len(request.items):,} items: run the same "
            "with --dry-run, look at what it shows, and give its code"
        )
    if args.dry_run:
        _tell_plan(args, dataset, request, len(request.items) - len(chosen))
        return 0
    _erase(args, dataset, request)
    return 0


def _check(args: argparse.Namespace, old: Path) -> None:
    """What can be told before anything is read."""
    given = [bool(args.key or args.keys_file), bool(args.where), args.text is not None]
    if sum(given) != 1:
        raise UserError("say which items by one of --key or --keys-file, --where, and --text")
    if args.text is not None and not args.text.strip():
        raise UserError("--text is empty, so it fits every caption; give a text")
    if args.purge and old.is_symlink():
        raise UserError(f"{old} is a symbolic link; give the folder itself to purge it")
    if args.dry_run:
        return
    for option, value in (
        ("--out", args.out),
        ("--reason", args.reason),
        ("--requested-by", args.requested_by),
    ):
        if not value:
            raise UserError(f"give {option}, or --dry-run to see what would be erased")
    if args.text is not None and args.confirm is None:
        raise UserError("a text fits by chance: run with --dry-run first, then give its --confirm")


def _chosen(args: argparse.Namespace, dataset: Dataset) -> list[Found]:
    if args.key or args.keys_file:
        return keyed(dataset, [*args.key, *_keys_in(args.keys_file)])
    conditions = parse_conditions(args.where)
    if args.text is not None:
        conditions = [Condition("text", "~", args.text.strip())]
    selected = select(dataset, conditions)
    if selected.unreadable and not args.drop_damaged:
        first = selected.unreadable[0]
        raise UserError(
            f"{dataset.path}: the JSON of {len(selected.unreadable):,} items cannot be read, so "
            f"nobody can say whether they are meant; first {first.key!r}: {first.error}. Copy the "
            "set again, or use --drop-damaged"
        )
    return selected.found


def _keys_in(path: Path | None) -> list[str]:
    if path is None:
        return []
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError:
        raise UserError(f"{path} is no text of keys, one a line, in UTF-8") from None
    keys = [line.strip() for line in lines if line.strip()]
    if not keys:
        raise UserError(f"{path} holds no key")
    return keys


def _tell_plan(
    args: argparse.Namespace, dataset: Dataset, request: Request, num_copies: int
) -> None:
    code = request.code(dataset)
    files = files_of(dataset.path) if args.purge else []
    if args.json:
        plan = {
            "dataset": str(dataset.path),
            "items": [one._asdict() for one in request.items],
            "confirm": code,
            "purge": [name for name, _ in files],
        }
        print(json.dumps(plan, indent=1))
        return
    _tell_items(dataset, request.items)
    if num_copies:
        print(f"{num_copies:,} of them fit by their media alone, the same bytes as another's")
    if args.purge:
        _tell_files(dataset.path, files)
    print(f"nothing was done; to erase them: --confirm {code}")


def _tell_items(dataset: Dataset, items: Sequence[Found]) -> None:
    rows = [(one.split, one.key, one.sha256[:16]) for one in items[:SHOWN]]
    title = f"{len(items):,} items of {dataset.name}" + (
        f", the first {SHOWN}" if len(items) > SHOWN else ""
    )
    print_tables(table(title, ("split", "key", "sha256"), rows))


def _tell_files(folder: Path, files: Sequence[tuple[str, int]]) -> None:
    rows = [(name, size(size_bytes)) for name, size_bytes in files]
    print_tables(table(f"files of {folder} that are removed", ("file", "size"), rows))


def _erase(args: argparse.Namespace, dataset: Dataset, request: Request) -> None:
    check_parent(dataset, args.out)
    registry = open_registry(args.registry)  # before the copy: what it says must be kept
    made = _copied(args, dataset, request)
    details = {
        "num_items": len(request.items),
        "reason": request.reason,
        "requested_by": request.requested_by,
    }
    registry.record_derived(made, [dataset], relation=RELATION, details=details)
    uris = [f"{one.split}/{one.key}" for one in request.items]
    rows_removed = supersede(registry, dataset.fingerprint, uris)
    files = files_of(dataset.path) if args.purge else []
    result: dict[str, Any] = {
        "dataset": str(dataset.path),
        "new_version": str(made.path),
        "fingerprint": made.fingerprint,
        "num_erased": len(request.items),
        "registry_rows_removed": rows_removed,
        **_touched(registry, dataset, made, request),
        "purged": [name for name, _ in files],
    }
    if args.json:
        print(json.dumps(result, indent=1))
    else:
        _tell_result(result)
        if args.purge:
            _tell_files(dataset.path, files)
    if args.purge:
        purge(dataset.path)


def _copied(args: argparse.Namespace, dataset: Dataset, request: Request) -> Dataset:
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("copying the others", total=None)
        return write_without(
            dataset,
            request,
            args.out,
            name=args.name or dataset.name,
            progress=lambda done, total: bar.update(task, completed=done, total=total),
        )


def _touched(
    registry: Registry, dataset: Dataset, made: Dataset, request: Request
) -> dict[str, Any]:
    """The sets that hold the items beside the old version, and what was made with any of these."""
    with registry.reading() as session:
        lineages = [lineage_of(session, find_dataset(session, dataset.fingerprint))]
        holders = holders_of(lineages[0], made.fingerprint, request.items)
        related = [find_dataset(session, one["fingerprint"]) for one in holders]
        lineages += [lineage_of(session, row) for row in related]
    touched: dict[str, Any] = {"also_held_by": holders}
    for name in ("runs", "checkpoints"):
        touched[name] = [one for lineage in lineages for one in lineage[name]]
    touched["indexes"] = sorted({one for lineage in lineages for one in lineage["indexes"]})
    return touched


def _tell_result(result: Mapping[str, Any]) -> None:
    print(f"{result['num_erased']:,} items erased; {result['dataset']} is superseded")
    print(f"new version: {result['new_version']}, fingerprint {result['fingerprint'][:16]}")
    tables = []
    if result["also_held_by"]:
        rows = [
            (one["name"], one["num_items"], one["folder"], one["note"])
            for one in result["also_held_by"]
        ]
        tables.append(table("other sets to look at", ("data set", "items", "folder", ""), rows))
    tables += trained_tables(result)
    print_tables(*tables)
    if not any(result[name] for name in ("runs", "checkpoints", "indexes")):
        print("nothing in the registry was trained on it")
