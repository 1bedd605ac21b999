"""`carillon config settings`: every setting of a config, from the dataclasses that define them.

docs/settings.md is this command's output, and a test compares the two, so the page cannot fall
behind. Help, type, range and default stand in the dataclasses alone. Left out: what a named
backbone sets, which is in engine/models/catalog.py.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

from carillon.engine.config import Documented, UserError, documented
from carillon.engine.data.publish import publish_file

EXAMPLES = """examples:
  carillon config settings data.augment           one section
  carillon config settings --out docs/settings.md
"""

_INTRODUCTION = """# Settings

Written by `carillon config settings --out docs/settings.md`; do not edit it by hand.

A config is a YAML file of these settings, in sections. On the command line a setting is
`key=value`, as in `data.batch_size=64`, its value read as YAML. A setting that is left out has its
default; an unknown one is an error. `<name>` is a name of your choice.

A *hashed* setting can change the result: it is part of the config's hash, which names the run. The
others say where, how fast and how loudly, and can change when a run is resumed."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("section", nargs="?", default="", help="as in data.augment (default: all)")
    parser.add_argument("--out", type=Path, default=None, help="write the page to this file")


def main(args: argparse.Namespace) -> int:
    from carillon.engine.train.run_config import RunConfig

    listed = list(documented(RunConfig))
    if args.section:
        listed = [one for one in listed if f"{one.key}.".startswith(f"{args.section}.")]
    if not listed:
        raise UserError(f"no setting or section {args.section!r}; leave it out to see all")
    page = "\n".join(_tables(listed)) if args.section else settings_page(listed)
    if args.out is None:
        print(page.strip())
        return 0
    publish_file(args.out, page.encode())
    return 0


def settings_page(settings: list[Documented]) -> str:
    """The whole page as Markdown."""
    return "\n".join([_INTRODUCTION, *_tables(settings)])


def _tables(settings: list[Documented]) -> Iterator[str]:
    """A table per section, in the order of their first settings."""
    sections: dict[str, list[Documented]] = {}
    for one in settings:
        where = f"`{one.key.rpartition('.')[0]}`"
        if one.kind is not None:
            where += f", `type: {one.kind}`"
        sections.setdefault(where, []).append(one)
    for section, members in sections.items():
        yield f"\n## {section}\n"
        yield "| setting | value | default | hashed | what it does |"
        yield "| --- | --- | --- | --- | --- |"
        for one in members:
            name = one.key.rpartition(".")[2]
            hashed = "yes" if one.hashed else "no"
            yield f"| `{name}` | {one.type} | `{one.default}` | {hashed} | {_cell(one.help)} |"
    yield ""


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;")
