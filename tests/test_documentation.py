"""What the documentation says can be done: its commands parse, its links lead somewhere, the map
names every source file, and the settings page has every setting.

Commands are those of ```bash blocks. Here the program's own parser reads them all;
test_documented_commands.py runs those that it can.
"""

import contextlib
import io
import re
import runpy
import shlex
import subprocess
from pathlib import Path

import pytest

from carillon.engine import cli
from carillon.engine.config import Documented, documented
from carillon.engine.train.run_config import RunConfig
from carillon.engine.train.settings_page import settings_page

SHARED = runpy.run_path(str(Path(__file__).with_name("documented_commands.py")))
ROOT, PAGES, Command = SHARED["ROOT"], SHARED["PAGES"], SHARED["Command"]
commands_in = SHARED["commands_in"]
DOCUMENTED = sorted(set(SHARED["documented_commands"]()))
MAPPED = ("engine", "kernels", "csrc", "serve", "recipes")
_LINK = re.compile(r"(?<!!)\[[^\]]+\]\((?!https?:|mailto:)([^)\s]+)\)")
_PICTURE = re.compile(r"!\[[^\]]*\]\((?!https?:)([^)\s]+)\)")
_HEADING = re.compile(r"^#+ (.+)$", re.MULTILINE)
_PLACEHOLDER = re.compile(r"[A-Z]{2,}|\b[A-Z]\.yaml")  # as in recipes/X.yaml and RUN
TARGETS = set(re.findall(r"^([a-z][\w-]*):", (ROOT / "Makefile").read_text(), re.MULTILINE))


def problem(words: tuple[str, ...]) -> str:
    """Why a command cannot work; empty where it can."""
    if words[0] == "carillon":
        return carillon_problem(list(words[1:]))
    if words[0] == "make":
        goals = [word for word in words[1:] if "=" not in word and not word.startswith("-")]
        return ", ".join(f"no make target {goal}" for goal in goals if goal not in TARGETS)
    return torchrun_problem(words)


def carillon_problem(arguments: list[str]) -> str:
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said), contextlib.redirect_stdout(said):
            cli._parser(arguments).parse_args(arguments)
    except SystemExit as stop:
        return said.getvalue() if stop.code else ""
    return ""


def torchrun_problem(words: tuple[str, ...]) -> str:
    files = [word for word in words if word.endswith((".py", ".yaml"))]
    if not any(word.endswith(".py") for word in files):
        return "names no script"
    missing = [file for file in files if not _PLACEHOLDER.search(file)]
    return ", ".join(f"no file {file}" for file in missing if not (ROOT / file).is_file())


@pytest.mark.parametrize("command", DOCUMENTED, ids=lambda command: shlex.join(command.words))
def test_documented_command_parses(command: Command) -> None:
    assert problem(command.words) == ""


def test_commands_are_found_and_broken_ones_noticed() -> None:
    """Guards the guard."""
    assert DOCUMENTED
    text = "$ A=1 make test && .venv/bin/carillon runs \\\n  list  # x\nls; torchrun a.py\n"
    found = [command.words for command in commands_in(Path("x.md"), f"```bash\n{text}```\n")]
    assert found == [("make", "test"), ("carillon", "runs", "list"), ("torchrun", "a.py")]
    assert "no make target nothing" in problem(("make", "nothing"))
    assert "invalid choice" in problem(("carillon", "nothing"))
    assert "unrecognized arguments: --nothing" in problem(("carillon", "runs", "--nothing"))
    assert "no file recipes/absent.yaml" in problem(
        ("torchrun", "recipes/train.py", "--config", "recipes/absent.yaml")
    )
    assert problem(("torchrun", "recipes/train.py", "--config", "recipes/X.yaml")) == ""


ACTIONS = [("tokenizer", "train"), ("tokenizer", "show")]
ACTIONS += [("checkpoint", action) for action in ("inspect", "verify", "convert")]
ACTIONS += [("runs", action) for action in ("list", "show", "lineage")]
ASKED_FOR_HELP = [
    *(command.words for command in cli.COMMANDS),
    *((noun,) for noun in cli.NOUNS),
    *ACTIONS,
]


@pytest.mark.parametrize("words", ASKED_FOR_HELP, ids=" ".join)
def test_every_command_has_help_with_examples_that_parse(words: tuple[str, ...]) -> None:
    said = io.StringIO()
    arguments = [*words, "--help"]
    with contextlib.redirect_stdout(said), pytest.raises(SystemExit) as stop:
        cli._parser(arguments).parse_args(arguments)
    assert stop.value.code == 0
    described, _, examples_text = said.getvalue().partition("examples:")
    assert len(described.split("\n\n")) > 2, "no description"
    examples = [line.strip() for line in examples_text.splitlines()]
    lines = [re.split(r"\s{2,}", line)[0] for line in examples if line.startswith("carillon ")]
    assert lines, "no examples"
    assert [line for line in lines if carillon_problem(shlex.split(line)[1:])] == []


@pytest.mark.parametrize("page", PAGES, ids=str)
def test_links_lead_somewhere(page: Path) -> None:
    text = (ROOT / page).read_text()
    broken = []
    for link in [*_LINK.findall(text), *_PICTURE.findall(text)]:
        target, _, anchor = link.partition("#")
        path = (ROOT / page.parent / target) if target else ROOT / page
        if not path.exists() or (anchor and anchor not in anchors(path.read_text())):
            broken.append(link)
    assert broken == []


def anchors(text: str) -> set[str]:
    """The anchors that a page's headings get."""
    plain = (re.sub(r"[^\w\- ]", "", heading.lower()) for heading in _HEADING.findall(text))
    return {heading.strip().replace(" ", "-") for heading in plain}


def mapped_files(text: str) -> list[str]:
    """Paths that a map names: a file or folder a line, inside the folder that is less indented."""
    files: list[str] = []
    folders: list[str] = []
    for line in text.splitlines():
        name = line.split()[0]
        depth = (len(line) - len(line.lstrip())) // 2
        folders[depth:] = [name]
        if not name.endswith("/"):
            assert len(line.split()) > 1, f"{name}: the map says nothing of it"
            files.append("".join(folders))
    return files


def source_files() -> list[str]:
    """What git tracks; an archive without git has no other files either."""
    try:
        command = ["git", "ls-files", *MAPPED]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        found = [path for folder in MAPPED for path in (ROOT / folder).rglob("*.*")]
        return [path.relative_to(ROOT).as_posix() for path in found if path.suffix != ".pyc"]
    return [name for name in done.stdout.splitlines() if (ROOT / name).exists()]


def test_map_names_every_source_file_and_no_other() -> None:
    (text,) = re.findall(r"^```text\n(.*?)^```", (ROOT / "README.md").read_text(), re.DOTALL | re.M)
    named = mapped_files(text)
    assert len(named) == len(set(named))
    assert sorted(set(source_files()) - set(named)) == [], "not in the README's map"
    assert [name for name in named if not (ROOT / name).is_file()] == []


def test_map_is_read_by_indentation() -> None:
    """Guards the guard."""
    text = "a/\n  b.py   one\n  c/\n    d.py  two\n  e.py  three\nf/\n  g.py four\n"
    assert mapped_files(text) == ["a/b.py", "a/c/d.py", "a/e.py", "f/g.py"]


def test_folders_of_the_map_exist() -> None:
    folders = re.findall(r"^\| `([\w/]+)/` \|", (ROOT / "README.md").read_text(), re.MULTILINE)
    assert set(MAPPED) <= set(folders)
    assert [folder for folder in folders if not (ROOT / folder).is_dir()] == []


SETTINGS = list(documented(RunConfig))


def test_settings_page_is_up_to_date() -> None:
    written = (ROOT / "docs" / "settings.md").read_text(encoding="utf-8")
    assert written == settings_page(SETTINGS), "carillon config settings --out docs/settings.md"


@pytest.mark.parametrize("one", SETTINGS, ids=lambda one: one.key)
def test_setting_is_explained(one: Documented) -> None:
    assert one.help.endswith("."), one
    assert one.help[0].isupper() or one.help[0].isdigit(), one
    assert "typing." not in one.type
    assert "carillon." not in one.type


def test_settings_under_names_of_the_users_choice_are_listed() -> None:
    keys = {one.key for one in SETTINGS}
    assert "evaluation.retrieval.<name>.split" in keys
    assert "evaluation.zeroshot.<name>.templates" in keys
