"""The wheel, installed outside the checkout beside another package named `kernels`.

Nothing is downloaded: the wheel goes into an environment of its own that sees the dependencies of
the running one through a path file, but not this checkout.
"""

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
Run = Callable[..., str]


def run(command: list[str], cwd: Path) -> str:
    """Runs with a clean environment; returns what was printed."""
    hidden = ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV")
    environment = {name: value for name, value in os.environ.items() if name not in hidden}
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("wheel")
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    options = ["--no-build-isolation", "--no-deps", "--no-index", "--quiet", "-w", str(out)]
    run([*pip, "wheel", str(ROOT), *options], cwd=out)
    (built,) = out.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Runs a program of an environment that has the wheel, in an empty folder."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder / "env", with_pip=False)
    programs = folder / "env" / "bin"
    python = str(programs / "python")
    (site,) = (folder / "env" / "lib").glob("python*/site-packages")
    # A path file of this kind is not followed into the path files found there, so the editable
    # install of the checkout stays out of sight.
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    (site / "kernels").mkdir()
    (site / "kernels" / "__init__.py").write_text("OWNER = 'another project'\n")
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--python", python]
    run([*pip, "install", "--no-deps", "--no-index", "--quiet", str(wheel)], cwd=folder)
    work = folder / "work"
    work.mkdir()
    return lambda program, *arguments: run([str(programs / program), *arguments], cwd=work)


def test_wheel_holds_the_package_alone(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0] for name in names if ".dist-info/" not in name} == {"carillon"}
    for needed in (
        "carillon/py.typed",
        "carillon/_C.pyi",
        "carillon/engine/cli.py",
        "carillon/kernels/image_normalize/reference.py",
        "carillon/engine/registry/migrations/env.py",
        "carillon/engine/registry/migrations/versions/first_tables.py",
        "carillon/recipes/train.py",
    ):
        assert needed in names
    for recipe in (ROOT / "recipes").glob("*.yaml"):
        assert f"carillon/recipes/{recipe.name}" in names
    assert any(name.startswith("carillon/_C.") and name.endswith(".so") for name in names)
    assert any(name.endswith("/licenses/LICENSE") for name in names)
    assert not [name for name in names if name.endswith((".pyc", ".cpp", ".cu"))]


def test_wheel_runs_outside_the_checkout(installed: Run) -> None:
    assert "carillon" in installed("carillon", "--help")
    assert installed("carillon", "--version").startswith("carillon ")


def test_wheel_ingests_trains_and_searches(installed: Run) -> None:
    script = """
from pathlib import Path
from PIL import Image
import carillon
Path("photos").mkdir()
for i in range(20):
    Image.new("RGB", (40, 30), (12 * i, 0, 255 - 12 * i)).save(f"photos/{i}.png")
    Path(f"photos/{i}.txt").write_text(f"colour {i}")
print(Path(carillon.__file__).parent / "recipes" / "flickr8k_small.yaml")
"""
    recipe = installed("python", "-c", script).strip()
    installed("carillon", "ingest", "photos", "--out", "set", "--language", "en", "--workers", "1")
    small = ["model.vision.depth=1", "model.text.depth=1", "data.tokenizer.vocab_size=300"]
    short = ["data.batch_size=4", "optimization.steps=1", "optimization.epochs=null"]
    rest = ["optimization.warmup_steps=0", "data.num_workers=0", "experiment.name=tiny"]
    installed("carillon", "train", recipe, "data.path=set", *small, *short, *rest)
    run = installed("python", "-c", "import os; print(*os.listdir('runs'))").split()
    (name,) = (entry for entry in run if entry.startswith("tiny-"))
    hits = json.loads(installed("carillon", "search", name, "a colour", "--k", "3", "--json"))
    assert [hit["rank"] for hit in hits["hits"]] == [1, 2, 3]
    assert len({hit["key"] for hit in hits["hits"]}) == 3
    assert name in installed("carillon", "runs")


def test_native_ops_of_the_wheel_run_beside_another_kernels(installed: Run) -> None:
    script = """
import carillon, kernels, torch
from carillon.kernels.table import resolve
assert str(carillon.__file__).startswith(__import__("sys").prefix), carillon.__file__
op = resolve("image_normalize", "cpu")
out = op(torch.zeros(1, 2, 2, 3, dtype=torch.uint8), [0.5] * 3, [0.5] * 3, torch.float32)
print(kernels.OWNER, out.unique().tolist())
"""
    assert installed("python", "-c", script) == "another project [-1.0]\n"


def test_wheel_migrates_a_registry(installed: Run) -> None:
    script = "from carillon.engine.registry.store import Registry; Registry.open('new.sqlite')"
    installed("python", "-c", script)
    assert "runs" in installed("carillon", "runs", "--registry", "new.sqlite")


def test_source_archive_can_build(tmp_path: Path) -> None:
    script = f"""
from setuptools.build_meta import build_sdist
build_sdist({str(tmp_path)!r})
"""
    run([sys.executable, "-c", script], cwd=ROOT)
    (archive,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(archive) as content:
        members = {member.name.partition("/")[2]: member for member in content}
    for needed in ("setup.py", "CMakeLists.txt", "LICENSE", "csrc/bindings.cpp"):
        assert needed in members
    sources = [path.relative_to(ROOT).as_posix() for path in (ROOT / "csrc").rglob("*.*")]
    assert set(sources) <= set(members)
    module = members["src/carillon/engine/cli.py"]
    assert module.isfile()
    assert not [name for name in members if name.endswith(".so")]


@pytest.fixture
def bare_checkout(tmp_path: Path) -> Path:
    """A checkout whose links were lost: one missing, one turned into a text file by an archive."""
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE", "CMakeLists.txt"):
        shutil.copy(ROOT / name, tmp_path / name)
    package = tmp_path / "src" / "carillon"
    package.mkdir(parents=True)
    shutil.copy(ROOT / "src" / "carillon" / "__init__.py", package)
    for name in ("engine", "kernels"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "marker.py").touch()
    (package / "kernels").write_text("../../kernels")
    return tmp_path


def test_setup_restores_lost_links(bare_checkout: Path) -> None:
    run([sys.executable, "setup.py", "--quiet", "--name"], cwd=bare_checkout)
    for name in ("engine", "kernels"):
        assert (bare_checkout / "src" / "carillon" / name).readlink() == Path("..", "..", name)
        assert (bare_checkout / "src" / "carillon" / name / "marker.py").exists()


@pytest.mark.parametrize(
    ("tools", "message"),
    [([], "apt-get install cmake"), (["cmake"], "apt-get install g++")],
    ids=["no CMake", "no compiler"],
)
def test_missing_build_tool_is_named(
    bare_checkout: Path, tmp_path: Path, tools: list[str], message: str
) -> None:
    path = tmp_path / "tools"
    path.mkdir()
    for tool in tools:
        (path / tool).symlink_to("/bin/true")
    environment = {"PATH": str(path), "HOME": str(tmp_path)}
    command = [sys.executable, "setup.py", "--quiet", "build_ext"]
    done = subprocess.run(
        command, cwd=bare_checkout, env=environment, capture_output=True, text=True
    )
    assert done.returncode != 0
    assert message in done.stderr
    assert "Traceback" not in done.stderr
