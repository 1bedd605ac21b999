"""`carillon runs`: reads the registry and prints tables."""

import argparse
from collections.abc import Iterable, Mapping
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sqlalchemy import select

from carillon.engine.registry.database import RegistryError
from carillon.engine.registry.store import Registry
from carillon.engine.registry.tables import (
    CheckpointRow,
    EvaluationRow,
    TrainingRunRow,
    utc_now,
)

if TYPE_CHECKING:
    from rich.table import Table

    from carillon.engine.registry.lineage import ReadSet

DEFAULT_REGISTRY = "runs/registry.sqlite"

EXAMPLES = """examples:
  carillon runs                                   all runs, the newest first
  carillon runs show flickr8k-3f9a1c              one run: its data, checkpoints, evaluations
  carillon runs lineage runs/flickr8k-3f9a1c/checkpoints/step-00001000
  carillon runs lineage 3f9a1c0b                  from a checkpoint's hash back to its shards
  carillon runs list --registry postgresql+psycopg://user@host/carillon
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `carillon runs`."""
    add_registry(parser)
    parser.set_defaults(action="list")
    actions = parser.add_subparsers(title="actions", metavar="{list,show,lineage}")
    for name, argument, text in (
        ("list", None, "all runs, the newest first (the default)"),
        ("show", ("name", "NAME", "a run's name, or how it begins"), "one run in full"),
        (
            "lineage",
            ("checkpoint", "CHECKPOINT", "a checkpoint's folder or content hash"),
            "a checkpoint's run, config, data set and shards",
        ),
    ):
        action = actions.add_parser(name, help=text, description=text)
        action.set_defaults(action=name)
        # Without a default of its own it would overwrite a --registry given before the action.
        add_registry(action, default=argparse.SUPPRESS)
        if argument:
            action.add_argument(argument[0], metavar=argument[1], help=argument[2])


def main(args: argparse.Namespace) -> int:
    """Runs `carillon runs`; raises RegistryError."""
    registry = Registry.open(args.registry, create=False)
    if args.action == "show":
        show(registry, args.name)
    elif args.action == "lineage":
        show_lineage(registry, args.checkpoint)
    else:
        list_runs(registry)
    return 0


def list_runs(registry: Registry) -> None:
    """Prints one line per run."""
    with registry.reading() as session:
        rows = session.scalars(
            select(TrainingRunRow).order_by(TrainingRunRow.start_time.desc())
        ).all()
        lines = [_summary(row) for row in rows]
    columns = ("name", "status", "steps", "loss", "best", "started", "duration", "config", "commit")
    _print(_table("runs", columns, lines))


def show(registry: Registry, name: str) -> None:
    """Prints the newest run whose name begins with `name`: data, checkpoints, evaluations."""
    from carillon.engine.registry.lineage import sets_of

    with registry.reading() as session:
        run = session.scalar(
            select(TrainingRunRow)
            .where(TrainingRunRow.name.startswith(name, autoescape=True))
            .order_by((TrainingRunRow.name == name).desc(), TrainingRunRow.start_time.desc())
        )
        if run is None:
            raise RegistryError(f"no run '{name}' is registered: `carillon runs` lists them")
        checkpoints = session.scalars(
            select(CheckpointRow)
            .where(CheckpointRow.training_run_id == run.id)
            .order_by(CheckpointRow.step)
        ).all()
        evaluations = session.execute(
            select(CheckpointRow.step, EvaluationRow)
            .join(CheckpointRow, EvaluationRow.checkpoint_id == CheckpointRow.id)
            .where(CheckpointRow.training_run_id == run.id)
            .order_by(CheckpointRow.step, EvaluationRow.suite_name)
        ).all()
        tables = [
            _pairs(f"run {run.name}", _run_details(run)),
            _read_sets(sets_of(session, run.id)),
            _checkpoints(checkpoints),
            _table(
                "evaluations",
                ("step", "suite", "metrics"),
                [(step, row.suite_name, _metrics(row.metrics)) for step, row in evaluations],
            ),
        ]
    _print(*tables)


def show_lineage(registry: Registry, checkpoint: str) -> None:
    """Prints a checkpoint's way back to its shards."""
    from carillon.engine.registry.lineage import trace

    found = trace(registry, checkpoint)
    tables = [
        _pairs(
            f"checkpoint {found.checkpoint.content_hash[:12]}",
            {
                "content hash": found.checkpoint.content_hash,
                "step": found.checkpoint.step,
                "folder": found.checkpoint.uri,
                "evaluations": ", ".join(row.suite_name for row in found.evaluations) or "-",
            },
        ),
        _pairs(f"run {found.run.name}", _run_details(found.run)),
    ]
    for one in found.datasets:
        tables += _dataset_tables(one)
    _print(*tables)


def _read_sets(sets: Iterable["ReadSet"]) -> "Table":
    rows = [
        (
            one.link.name or "-",
            one.dataset.name,
            one.link.split or "-",
            one.link.from_position,
            one.dataset.fingerprint[:12],
        )
        for one in sets
    ]
    return _table("data sets", ("name", "data set", "split", "from", "fingerprint"), rows)


def _checkpoints(checkpoints: Iterable[CheckpointRow]) -> "Table":
    rows = [(r.step, r.content_hash[:12], _metrics(r.val_metrics), r.uri) for r in checkpoints]
    return _table("checkpoints", ("step", "hash", "metrics", "folder"), rows)


def _dataset_tables(one: "ReadSet") -> list["Table"]:
    row = one.dataset
    details = {
        "fingerprint": row.fingerprint,
        "folder": row.source_uri,
        "split": one.link.split or "not recorded",
    }
    if one.link.name:
        details |= {"in the mixture": one.link.name, "from position": f"{one.link.from_position:,}"}
    if row.superseded_at is not None:
        details["superseded"] = f"{row.superseded_at:%Y-%m-%d %H:%M} UTC"
    shards = [(s.split, s.file, s.num_samples, s.sha256) for s in one.shards]
    tables = [
        _pairs(f"data set {row.name}", details),
        _table("shards", ("split", "file", "samples", "sha256"), shards),
    ]
    if one.ancestors:
        made = [(a.steps, a.relation, a.dataset.name, a.dataset.fingerprint) for a in one.ancestors]
        tables.append(_table("made from", ("steps", "by", "data set", "fingerprint"), made))
    return tables


def add_registry(parser: argparse.ArgumentParser, default: str = DEFAULT_REGISTRY) -> None:
    """The option --registry, the same for every command that reads or writes it."""
    parser.add_argument(
        "--registry",
        default=default,
        metavar="LOCATION",
        help=f"a SQLite file or postgresql+psycopg://... (default {DEFAULT_REGISTRY})",
    )


def open_registry(location: str) -> Registry:
    """Opens the registry that a command writes to; the folder of the default one is made.

    Raises:
        RegistryError: see database.open_database.
    """
    if location == DEFAULT_REGISTRY:
        Path(location).parent.mkdir(exist_ok=True)
    return Registry.open(location)


def _summary(row: TrainingRunRow) -> tuple[object, ...]:
    best = {name: value for name, value in row.metrics.items() if name.startswith("best")}
    return (
        row.name,
        row.status,
        row.step,
        _number(row.metrics.get("loss")),
        _metrics(best),
        f"{row.start_time:%Y-%m-%d %H:%M}",
        _duration(row.start_time, row.end_time),
        row.config_hash[:12],
        (row.git_commit or "-")[:10],
    )


def _run_details(row: TrainingRunRow) -> dict[str, object]:
    return {
        "status": row.status,
        "step": row.step,
        "metrics": _metrics(row.metrics),
        "started": f"{row.start_time:%Y-%m-%d %H:%M:%S} UTC",
        "duration": _duration(row.start_time, row.end_time),
        "config hash": row.config_hash,
        "git commit": row.git_commit or "-",
        "folder": row.artifacts_uri,
    }


def _duration(start: datetime, end: datetime | None) -> str:
    seconds = int(((end or utc_now()) - start).total_seconds())
    return f"{seconds // 3600}:{seconds // 60 % 60:02}:{seconds % 60:02}"


def _number(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    return "-" if value is None else str(value)


def _metrics(metrics: Mapping[str, Any]) -> str:
    plain = {name: value for name, value in metrics.items() if not isinstance(value, (dict, list))}
    return ", ".join(f"{name} {_number(value)}" for name, value in plain.items()) or "-"


def _table(title: str, columns: Iterable[str], rows: Iterable[Iterable[object]]) -> "Table":
    from rich.markup import escape
    from rich.table import Table

    table = Table(title=title, title_justify="left")
    for column in columns:
        table.add_column(column, overflow="fold")  # a hash or path must not be cut short
    for row in rows:
        table.add_row(*(escape(str(cell)) for cell in row))
    return table


def _pairs(title: str, values: Mapping[str, object]) -> "Table":
    table = _table(title, ("", ""), values.items())
    table.show_header = False
    return table


def _print(*tables: "Table") -> None:
    from rich.console import Console

    console = Console()
    if not console.is_terminal:
        console.width = 200  # a file or pipe has no width: keep each row on one line
    for table in tables:
        console.print(table)
