"""Tables in the terminal, for text that nobody vouches for.

Control characters and bidirectional overrides go (text_layout.shown), and nothing is read as
markup: neither a caption nor a licence can repaint a terminal or reorder what stands beside it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from carillon.engine.eval.text_layout import shown

if TYPE_CHECKING:
    from rich.table import Table


def table(title: str, columns: Sequence[str], rows: Iterable[Sequence[object]]) -> Table:
    """A table; numbers stand at the right."""
    from rich.markup import escape
    from rich.table import Table

    made = Table(title=escape(shown(title)), title_justify="left")
    listed = [list(row) for row in rows]
    for place, column in enumerate(columns):
        numbers = bool(listed) and all(isinstance(row[place], (int, float)) for row in listed)
        made.add_column(column, overflow="fold", justify="right" if numbers else "left")
    for row in listed:
        made.add_row(*(escape(cell(value)) for value in row))
    return made


def cell(value: object) -> str:
    """A value as a table shows it."""
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:,.4g}" if abs(value) < 1000 else f"{value:,.0f}"
    return shown(str(value))


def print_tables(*tables: Table) -> None:
    """Print tables; a pipe has no width, so each row stays on one line there."""
    from rich.console import Console

    console = Console()
    if not console.is_terminal:
        console.width = 200
    for one in tables:
        console.print(one)


def size(num_bytes: int) -> str:
    """Bytes for people."""
    amount = float(num_bytes)
    for unit in ("B", "KB", "MB", "GB"):
        if amount < 1000:
            return f"{amount:.0f} {unit}" if unit == "B" else f"{amount:.3g} {unit}"
        amount /= 1000
    return f"{amount:,.3g} TB"
