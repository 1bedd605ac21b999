"""Builds carillon._C by CMake: this file only finds the tools, calls them and places the module.

CMakeLists.txt is the only compiler description. The build folder is fixed per torch and Python
version (build/cmake-<torch>-py<version>), so that a re-install recompiles what changed. The
editable module is one file, src/carillon/_C.*.so, built for one torch: a second environment with
another torch installs the same checkout as a wheel (`pip install . --no-build-isolation`).
Arguments for CMake come from the environment variable CMAKE_ARGS.
"""

import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py
from setuptools.errors import ExecError

ROOT = Path(__file__).resolve().parent
LINKED_FOLDERS = ("engine", "kernels", "serve", "recipes")


def restore_links() -> None:
    """Recreates the links in src/carillon that an archive or a checkout without links lost."""
    for name in LINKED_FOLDERS:
        link = ROOT / "src" / "carillon" / name
        if not link.is_dir() and (ROOT / name).is_dir():
            link.unlink(missing_ok=True)
            link.symlink_to(Path("..", "..", name), target_is_directory=True)


def require_tools() -> None:
    """Raises ExecError, naming what to install, where CMake or a C++ compiler is missing."""
    if shutil.which("cmake") is None:
        raise ExecError(
            "building carillon's C++ operators needs CMake 3.22 or later, and no 'cmake' is on "
            "PATH: install it by 'apt-get install cmake' or 'pip install cmake', then repeat"
        )
    compiler = os.environ.get("CXX", "")
    candidates = [shlex.split(compiler)[0]] if compiler else ["c++", "g++", "clang++"]
    if not any(shutil.which(candidate) for candidate in candidates):
        raise ExecError(
            "building carillon's C++ operators needs a C++20 compiler, and none of "
            f"{', '.join(candidates)} is on PATH: install one by 'apt-get install g++' or name "
            "yours in the environment variable CXX, then repeat"
        )


def import_torch_version() -> tuple[str, str]:
    """The installed torch's version and the folder of its CMake files."""
    try:
        import torch
    except ImportError as error:
        raise ExecError(
            "building carillon's C++ operators needs the torch that they will run with: install "
            "torch first, then 'pip install -e . --no-build-isolation'"
        ) from error
    return torch.__version__, torch.utils.cmake_prefix_path


class CMakeBuild(build_ext):
    """Builds an extension by the CMake target of its own last name."""

    def build_extension(self, ext: Extension) -> None:
        require_tools()
        torch_version, prefix_path = import_torch_version()
        python_tag = f"py{sys.version_info.major}{sys.version_info.minor}"
        folder = ROOT / "build" / f"cmake-{torch_version}-{python_tag}"
        folder.mkdir(parents=True, exist_ok=True)
        self.configure(folder, prefix_path)
        jobs = str(self.parallel or os.cpu_count() or 1)
        self.call(["cmake", "--build", str(folder), "--parallel", jobs])
        target = Path(self.get_ext_fullpath(ext.name))
        target.parent.mkdir(parents=True, exist_ok=True)
        self.copy_file(str(folder / "_C.so"), str(target))

    def configure(self, folder: Path, prefix_path: str) -> None:
        generator = ["-G", "Ninja"] if shutil.which("ninja") else ["-G", "Unix Makefiles"]
        if (folder / "CMakeCache.txt").exists():
            generator = []  # a folder keeps the generator that it was made with
        arguments = [
            f"-DCMAKE_PREFIX_PATH={prefix_path}",
            f"-DPython_EXECUTABLE={sys.executable}",
            *shlex.split(os.environ.get("CMAKE_ARGS", "")),
        ]
        self.call(["cmake", "-S", str(ROOT), "-B", str(folder), *generator, *arguments])

    def call(self, command: list[str]) -> None:
        try:
            subprocess.run(command, check=True)
        except subprocess.CalledProcessError as error:
            raise ExecError(
                f"'{shlex.join(command)}' failed with exit code {error.returncode}; "
                "the compiler's own messages stand above"
            ) from error


class CleanBuildPy(build_py):
    """Starts from an empty folder: a module deleted from the source must not reach the wheel."""

    def run(self) -> None:
        if not self.editable_mode:
            shutil.rmtree(self.build_lib, ignore_errors=True)
        super().run()


restore_links()
setup(
    ext_modules=[Extension("carillon._C", sources=[])],
    cmdclass={"build_ext": CMakeBuild, "build_py": CleanBuildPy},
)
