"""Follows docs/add-a-kernel.md to the letter in a copy of the checkout: writes what the page says,
builds, and runs the tests that the page writes.

Objects of an earlier build are taken along where they are newer than their source and every header,
so that two files are compiled and not all.
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "add-a-kernel.md"
COPIED = ("CMakeLists.txt", "README.md", "Makefile", "setup.py", "pyproject.toml")
COPIED_FOLDERS = ("csrc", "docs", "engine", "kernels", "recipes", "serve", "src", "tests")
BUILD = f"cmake-{torch.__version__}-py{sys.version_info.major}{sys.version_info.minor}"
_STEP = re.compile(
    r"^(?:Write|In) `(?P<path>[^`]+)`(?:, (?P<where>after|before) the line `(?P<line>[^`]+)`"
    r"|(?P<end>, at the end))?:\n\n```\w+\n(?P<text>.*?)^```$",
    re.DOTALL | re.MULTILINE,
)


class Step(NamedTuple):
    """Text for a new file, or to be put before or after a line or at the end of an old one."""

    path: str
    text: str
    where: str = ""
    line: str = ""

    def follow(self, root: Path) -> None:
        path = root / self.path
        if not self.where:
            assert not path.exists(), f"{self.path} exists already"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(self.text)
            return
        lines = path.read_text().splitlines(keepends=True)
        if self.where == "end":
            lines.append("\n\n" + self.text)
        else:
            (found,) = [i for i, line in enumerate(lines) if line.strip() == self.line]
            lines.insert(found + (self.where == "after"), self.text)
        path.write_text("".join(lines))


def steps() -> list[Step]:
    return [
        Step(m["path"], m["text"], m["where"] or ("end" if m["end"] else ""), m["line"] or "")
        for m in _STEP.finditer(PAGE.read_text())
    ]


def copy_checkout(target: Path) -> None:
    def left_out(folder: str, names: list[str]) -> set[str]:
        return {name for name in names if name == "__pycache__" or name.endswith(".so")}

    for name in COPIED:
        shutil.copy2(ROOT / name, target / name)
    for name in COPIED_FOLDERS:
        shutil.copytree(ROOT / name, target / name, symlinks=True, ignore=left_out)


def take_objects(target: Path) -> None:
    """Configures for make, which asks for times alone, and puts newer objects where it looks."""
    folder = target / "build" / BUILD
    command = [
        *("cmake", "-S", str(target), "-B", str(folder), "-G", "Unix Makefiles"),
        *("-DCARILLON_CUDA=OFF", f"-DPython_EXECUTABLE={sys.executable}"),
        f"-DCMAKE_PREFIX_PATH={torch.utils.cmake_prefix_path}",
    ]
    subprocess.run(command, check=True, capture_output=True)
    headers = max(path.stat().st_mtime for path in (ROOT / "csrc").rglob("*.h"))
    objects = Path("CMakeFiles", "_C.dir", "csrc")
    for path in (ROOT / "build" / BUILD / objects).rglob("*.o"):
        name = path.relative_to(ROOT / "build" / BUILD / objects)
        source = ROOT / "csrc" / name.with_suffix("")
        if source.exists() and path.stat().st_mtime > max(headers, source.stat().st_mtime):
            shutil.copy(path, folder / objects / name)
    (folder / objects / "bindings.cpp.o").unlink(missing_ok=True)


def run(root: Path, *command: str) -> str:
    environment = os.environ | {
        "PYTHONPATH": str(root / "src"),
        "CMAKE_ARGS": "-DCARILLON_CUDA=OFF",
    }
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_page_adds_an_op_that_works(tmp_path: Path) -> None:
    python = sys.executable
    copy_checkout(tmp_path)
    for step in steps():
        step.follow(tmp_path)
    take_objects(tmp_path)
    run(tmp_path, python, "setup.py", "-q", "build_ext", "--inplace")
    tests = [
        "tests/kernels/row_scale",
        "tests/kernels/test_any_arguments.py::test_every_op_has_arguments",
        "tests/kernels/test_any_arguments.py::test_native_does_as_the_reference[row_scale]",
        "tests/kernels/test_table.py::test_every_op_is_whole[row_scale]",
        "tests/test_documentation.py::test_map_names_every_source_file_and_no_other",
    ]
    said = run(tmp_path, python, "-m", "pytest", "-p", "no:cacheprovider", "-vv", *tests)
    for provider in ("native", "reference", "triton"):
        assert re.search(rf"test_matches_definition\[.*{provider}\] PASSED", said), said
    assert "skipped" not in said.splitlines()[-1]
    new = [step.path for step in steps() if step.path.endswith(".py")]
    run(tmp_path, python, "-m", "ruff", "check", *new)
    run(tmp_path, python, "-m", "ruff", "format", "--check", *new)
    code = (
        "from carillon.kernels.compile_report import compile_triton\n"
        "from carillon.kernels.row_scale.triton_impl import compile_cases\n"
        "print([compile_triton(case).spilled_bytes for case in compile_cases()])\n"
    )
    if shutil.which("nvcc"):  # its cuobjdump reads the figures
        assert run(tmp_path, "env", "TRITON_INTERPRET=0", python, "-c", code) == "[0, 0]\n"


@pytest.mark.parametrize(
    "path",
    [
        *(f"kernels/row_scale/{name}.py" for name in ("reference", "triton_impl", "registration")),
        *("csrc/row_scale/cpu.cpp", "csrc/bindings.cpp"),
        *("kernels/table.py", "kernels/tolerances.py", "README.md"),
        *("tests/kernels/row_scale/test_row_scale.py", "tests/kernels/any_arguments.py"),
    ],
)
def test_page_has_a_step_for(path: str) -> None:
    """A file that the page no longer writes is seen at once."""
    assert path in {step.path for step in steps()}
