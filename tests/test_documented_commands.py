"""The documented commands are run: page by page, in their order, in a folder as a reader has it.

A command is run as it stands. Only placeholders are replaced, by what STANDS_FOR says, and CUTS are
appended, as a user could, so that it takes seconds. What a CPU machine cannot do in seconds is in
NOT_RUN, with the reason and the file that tests it instead.
"""

import json
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from PIL import Image

from carillon.engine.cli import main as carillon
from carillon.engine.data.shard_writer import ShardWriter
from carillon.engine.train.checkpoint import list_checkpoints
from carillon.engine.train.run_config import load_config

TESTS = Path(__file__).resolve().parent
SHARED = runpy.run_path(str(TESTS / "documented_commands.py"))
ROOT, DOCUMENTED = SHARED["ROOT"], list(SHARED["documented_commands"]())
TINY_SET = runpy.run_path(str(TESTS / "recipes" / "tiny_set.py"))
RECIPE = "recipes/emoji_quickstart.yaml"


class NotRun(NamedTuple):
    """Why a documented command is not run here, and the file that tests what it does."""

    reason: str
    tested: str


_NPM = NotRun("fetches packages with npm, or needs them", "tests/engine/data/sets/test_emoji.py")
_SETS = "tests/engine/data/sets"
_DEBIAN = "fetches packages of Debian"
_BUILD = NotRun("builds the environment that this test runs in", ".ci/run")
NOT_RUN = {
    "make install": _BUILD,
    "make install-dev": _BUILD,
    "make test": NotRun("is what runs this test", ".ci/run"),
    "make asan": NotRun(
        "builds the operators anew, for minutes", "tests/kernels/sanitizers/run.sh"
    ),
    "make quickstart": NotRun(
        "fetches packages and trains for minutes; the commands it gives are run here",
        "tests/recipes/test_recipes.py",
    ),
    "carillon data emoji --size 64 --out data/emoji": _NPM,
    "carillon data emoji --data TARBALLS": _NPM,
    "carillon data emoji": _NPM,
    "carillon data stamps": NotRun(_DEBIAN, f"{_SETS}/test_stamps.py"),
    "carillon data stamps --limit 100 --out data/stamps-100": NotRun(
        _DEBIAN, f"{_SETS}/test_stamps.py"
    ),
    "carillon data prompts": NotRun(_DEBIAN, f"{_SETS}/test_prompts.py"),
    "carillon data text-lines": NotRun(_DEBIAN, f"{_SETS}/test_text_lines.py"),
    "carillon data text-lines --languages ar,hi,th --per-language 50 --seed 1 "
    "--out data/lines-three": NotRun(_DEBIAN, f"{_SETS}/test_text_lines.py"),
    "carillon data clips": NotRun("fetches packages with npm", f"{_SETS}/test_clips.py"),
    "carillon data speech": NotRun("fetches packages with npm", f"{_SETS}/test_speech.py"),
    "make prove-sets": NotRun("builds every set, for minutes", "benchmarks/prove_sets.py"),
    "torchrun --nnodes=2 --nproc-per-node=8 --rdzv-backend=c10d --rdzv-endpoint=HOST:29500 "
    "recipes/train.py --config recipes/X.yaml": NotRun(
        "needs two machines of eight processes", "tests/engine/train/test_launch.py"
    ),
}

# Appended to a command that begins so. In several processes a run is another than in one.
_PAIRS = (*TINY_SET["SMALL"], "evaluation.bootstrap_samples=10")
_ROWS = TINY_SET["SMALL_DECODER"]
CUTS = {
    "carillon train": _PAIRS,
    "carillon train recipes/emoji_decoder.yaml": _ROWS,
    "torchrun": (*_PAIRS, "optimization.steps=3"),
    "torchrun --nproc-per-node=2 recipes/train.py --config recipes/emoji_decoder.yaml": (
        *_ROWS,
        "optimization.steps=3",
    ),
    "carillon ingest": ("--workers=1",),
}


# What is put in the place of a placeholder, as a pattern in the folder of runs: the newest match.
STANDS_FOR = {
    "runs/RUN/checkpoints/step-00001000": f"{Path(RECIPE).stem}-????????/checkpoints/step-*",
    "runs/RUN": f"{Path(RECIPE).stem}-????????",
    "RUN": f"{Path(RECIPE).stem}-????????",
}


def filled(word: str) -> str:
    """The word, or the path under runs/ that stands for it; a run's name for RUN alone."""
    if word not in STANDS_FOR:
        return word
    found = max(Path("runs").glob(STANDS_FOR[word]), key=lambda path: path.stat().st_mtime_ns)
    return found.name if word == "RUN" else str(found)


def draw_photos(folder: Path) -> None:
    """40 pictures of noise with a caption beside each; the last is a copy of the first."""
    folder.mkdir()
    for i in range(40):
        noise = np.random.default_rng(i % 39).integers(0, 256, (10, 12, 3), np.uint8)
        pixels = noise.repeat(8, axis=0).repeat(8, axis=1)
        Image.fromarray(pixels).save(folder / f"{i:02d}.jpg")
        (folder / f"{i:02d}.txt").write_text(f"a photo of noise number {i}\n")


def write_portraits(folder: Path) -> None:
    """A set whose items have authors."""
    picture = Path("photos/00.jpg").read_bytes()
    with ShardWriter(folder, name="portraits", source={}) as writer:
        for number, author in enumerate(("Ada", "Bo", "Cy")):
            meta = {"captions": {"en": [f"a portrait by {author}"]}, "author": author}
            writer.write(f"p{number}", {"jpg": picture + bytes(number)}, meta)


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder: the recipes, the set they name, and what a reader brings."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    Path("recipes").symlink_to(ROOT / "recipes")
    TINY_SET["write_set"](Path("data/emoji"), load_config(RECIPE, []))
    draw_photos(Path("photos"))
    write_portraits(Path("data/portraits"))
    shutil.copy("photos/00.jpg", "dog.jpg")
    rows = [f"photos/{i:02d}.jpg,a photo,ein Foto" for i in range(40)]
    Path("pairs.csv").write_text("\n".join(["image,caption_en,caption_de", *rows]) + "\n")
    return tmp_path


def run(words: tuple[str, ...], capfd: pytest.CaptureFixture[str]) -> str:
    """Run one command in the current folder; returns what it printed."""
    starts = [start for start in CUTS if shlex.join(words).startswith(start)]
    given = [*map(filled, words), *CUTS.get(max(starts, key=len, default=""), ())]
    capfd.readouterr()
    if given[0] == "carillon":
        code = carillon(given[1:])
    else:
        code = subprocess.run(given, timeout=300, check=False).returncode
    said, errors = capfd.readouterr()
    assert code == 0, f"{shlex.join(given)}\n{errors}"
    return said


def check(words: tuple[str, ...], said: str) -> None:
    """That a command did what its words ask for."""
    if "--out" in words:
        assert Path(words[words.index("--out") + 1]).exists()
    if "--json" in words:
        json.loads(said)
    if words[:2] == ("carillon", "train") or words[0] == "torchrun":
        newest = max(Path("runs").glob("*/metrics.jsonl"), key=lambda path: path.stat().st_mtime_ns)
        steps = [json.loads(line)["step"] for line in newest.read_text().splitlines()]
        saved = max(c.step for c in list_checkpoints(newest.parent / "checkpoints"))
        assert max(steps) == saved == (3 if words[0] == "torchrun" else 2)
        assert "--fresh" not in words or list(Path("runs").glob("*.old"))
    else:
        assert said.strip(), f"{shlex.join(words)} prints nothing"


def left_by_a_run() -> Iterator[str]:
    """The files that docs/run-a-recipe.md says a run leaves, without those of special cases."""
    page = (ROOT / "docs" / "run-a-recipe.md").read_text(encoding="utf-8")
    table = page.partition("## What a run leaves")[2].partition("\n## ")[0]
    for names, about in re.findall(r"^\| (`.*`) \| (.*) \|$", table, re.MULTILINE):
        if "if any" not in about and "with `" not in about:
            yield from (name.replace("step-N", "step-*") for name in re.findall("`(.*?)`", names))


RUNNABLE = [command for command in DOCUMENTED if shlex.join(command.words) not in NOT_RUN]


@pytest.mark.parametrize("page", sorted({command.page for command in RUNNABLE}), ids=str)
def test_the_commands_of_a_page_run(
    page: Path, workplace: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    for command in RUNNABLE:
        if command.page == page:
            check(command.words, run(command.words, capfd))
    if page.name == "run-a-recipe.md":
        listed, finished = list(left_by_a_run()), Path(filled("runs/RUN"))
        assert len(listed) > 5
        assert [name for name in listed if not list(finished.glob(name))] == []


def test_every_command_is_run_or_listed_with_a_reason() -> None:
    documented = {shlex.join(command.words) for command in DOCUMENTED}
    assert [line for line in NOT_RUN if line not in documented] == [], "no page has it any more"
    others = [line for line in documented - NOT_RUN.keys() if line.startswith("make ")]
    assert others == [], "make is not run here: list it in NOT_RUN"
    for one in NOT_RUN.values():
        assert one.reason
        assert (ROOT / one.tested).is_file()
