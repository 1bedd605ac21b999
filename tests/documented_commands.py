"""The command lines that the pages give, for the tests that parse them and that run them.

Commands are those of ```bash blocks, in the order in which they stand there. Tests get this file by
`runpy.run_path`, since they are no package.
"""

import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted(
    path.relative_to(ROOT)
    for pattern in ("*.md", "docs/*.md", "benchmarks/*.md", "serve/*.md")
    for path in ROOT.glob(pattern)
)
PROGRAMS = ("carillon", "make", "torchrun")
_BLOCK = re.compile(r"^```bash\n(.*?)^```", re.DOTALL | re.MULTILINE)


class Command(NamedTuple):
    """A documented command line."""

    page: Path
    words: tuple[str, ...]


def commands_in(page: Path, text: str) -> Iterator[Command]:
    """The commands of a page: lines joined, comments, assignments and .venv/bin/ dropped."""
    for block in _BLOCK.findall(text):
        for line in block.replace("\\\n", " ").splitlines():
            lexer = shlex.shlex(line.removeprefix("$ "), posix=True, punctuation_chars="|&;<>")
            lexer.whitespace_split = True
            words: list[str] = []
            for word in [*lexer, ";"]:
                if not set(word) <= set("|&;<>"):
                    words.append(word)
                    continue
                while words and re.fullmatch(r"[A-Z_]+=\S*", words[0]):
                    words.pop(0)
                if words and words[0].removeprefix(".venv/bin/") in PROGRAMS:
                    yield Command(page, (words[0].removeprefix(".venv/bin/"), *words[1:]))
                words = []


def documented_commands() -> Iterator[Command]:
    """The commands of every page."""
    for page in PAGES:
        yield from commands_in(page, (ROOT / page).read_text(encoding="utf-8"))
