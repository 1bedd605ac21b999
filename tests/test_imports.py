"""The directions of imports, and the folders and links that make the import name work.

The sources are parsed, not imported: an import inside a function counts too.
"""

import ast
import functools
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("engine", "kernels", "serve", "recipes")

# What each folder may import of the project; a name stands for itself and all below it.
ALLOWED = {
    "kernels": ("carillon.kernels", "carillon._C"),
    "engine": ("carillon.engine", "carillon.kernels", "carillon.__version__"),
    "serve": (
        "carillon.serve",
        "carillon.kernels",
        "carillon.__version__",
        "carillon.engine.config",
        "carillon.engine.models",
        "carillon.engine.generate",
        "carillon.engine.index",
        "carillon.engine.data.fetch",
        "carillon.engine.data.decode",
        "carillon.engine.data.tokenizer",
        "carillon.engine.registry",
        "carillon.engine.safety",
    ),
    "recipes": ("carillon.engine",),
}


class Import(NamedTuple):
    """One imported name and where it stands."""

    name: str
    place: str


@functools.cache
def imports(folder: str) -> tuple[Import, ...]:
    return tuple(_parsed(folder))


def _parsed(folder: str) -> Iterator[Import]:
    for path in sorted((ROOT / folder).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            place = f"{path.relative_to(ROOT)}:{getattr(node, 'lineno', 0)}"
            if isinstance(node, ast.Import):
                for alias in node.names:
                    yield Import(alias.name, place)
            elif isinstance(node, ast.ImportFrom):
                module = "." * node.level + (node.module or "")
                for alias in node.names:
                    yield Import(f"{module}.{alias.name}", place)


def within(name: str, allowed: tuple[str, ...]) -> bool:
    return any(name == item or name.startswith(f"{item}.") for item in allowed)


@pytest.mark.parametrize("folder", FOLDERS)
def test_imports_point_one_way(folder: str) -> None:
    own = [item for item in imports(folder) if within(item.name, ("carillon",))]
    assert [item for item in own if not within(item.name, ALLOWED[folder])] == []


def test_kernels_need_torch_and_triton_alone() -> None:
    """The GPU suite runs them on machines where the engine's dependencies are missing."""
    known = (*sys.stdlib_module_names, "torch", "triton", "carillon")
    assert [item for item in imports("kernels") if not within(item.name, known)] == []


@pytest.mark.parametrize("folder", [*FOLDERS, "tests", "benchmarks"])
def test_no_bare_or_relative_import_makes_a_second_module(folder: str) -> None:
    """`import engine` would load a second copy of every module, and so a second op table."""
    assert [
        item for item in imports(folder) if within(item.name, FOLDERS) or item.name[0] == "."
    ] == []


@pytest.mark.parametrize("folder", [*FOLDERS, "tests", "benchmarks"])
def test_nothing_imports_recipes(folder: str) -> None:
    assert [item for item in imports(folder) if within(item.name, ("carillon.recipes",))] == []


def test_blocks_name_no_mesh() -> None:
    meshes = ("carillon.engine.parallel", "torch.distributed")
    assert [item for item in imports("engine/nn") if within(item.name, meshes)] == []


@pytest.mark.parametrize("folder", ["engine", "kernels", "serve"])
def test_nothing_imports_the_command_line(folder: str) -> None:
    assert [item for item in imports(folder) if within(item.name, ("carillon.engine.cli",))] == []


@pytest.mark.parametrize("folder", FOLDERS)
def test_folders_are_linked_and_have_no_init(folder: str) -> None:
    """Hugging Face's `kernels` must keep winning that name when the checkout is on sys.path."""
    link = ROOT / "src" / "carillon" / folder
    assert link.is_symlink()
    assert link.readlink() == Path("..", "..", folder)
    assert not (ROOT / folder / "__init__.py").exists()


def test_tests_are_no_package() -> None:
    assert list((ROOT / "tests").rglob("__init__.py")) == []
    assert not (ROOT / "conftest.py").exists()


def test_the_parser_sees_imports_inside_functions() -> None:
    """Guards the guard: kernels/table.py imports the built module inside a function."""
    assert any(item.name == "carillon._C" for item in imports("kernels"))
