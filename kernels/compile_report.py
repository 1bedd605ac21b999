"""Compiles every CUDA source and Triton kernel for sm_90 and records what each costs a thread.

Registers, spills, shared memory and the use of tensor-core instructions are known without a GPU.
They stand in docs/gpu-status.md, and a test compares them with a fresh compile, so that a kernel
that grows is seen in the commit that grows it. Triton kernels are compiled at the tile sizes that
they are launched with (`compile_cases` of each triton_impl).
Run in the checkout: python -m carillon.kernels.compile_report
Left out: dynamic shared memory of CUDA kernels (chosen at launch), and occupancy.
"""

import importlib
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

STATUS_FILE = Path("docs", "gpu-status.md")
MAX_SHARED_BYTES = 227 * 1024  # of one block on sm_90
_ENTRY = re.compile(r"Compiling entry function '(?P<kernel>[^']+)'")
_SPILLS = re.compile(r"(?P<stores>\d+) bytes spill stores, (?P<loads>\d+) bytes spill loads")
_REGISTERS = re.compile(r"Used (?P<registers>\d+) registers")
_SHARED = re.compile(r"(?P<shared>\d+) bytes smem")
_TRITON_USAGE = re.compile(r"REG:(?P<registers>\d+) .*LOCAL:(?P<local>\d+)")
_TRITON_STACK = re.compile(r"STACK:(?P<stack>\d+)")
_ROW = re.compile(
    r"^\| (?P<op>\w+) \| `(?P<kernel>[^`]+)` \| (?P<registers>\d+) \| (?P<spills>\d+) "
    r"\| (?P<shared>\d+) \| (?P<wgmma>yes|no) \|$"
)
_NAMESPACE = re.compile(r"(\(anonymous namespace\)|\w+)::")
_HEADER = "| op | kernel | registers | spilled bytes | shared bytes | wgmma |"
_VERSIONS = re.compile(r"^Figures of (?P<versions>.+), sm_90a:$", re.MULTILINE)


class KernelFigures(NamedTuple):
    """What one kernel costs: registers and spills of a thread, static shared memory of a block."""

    registers: int
    spilled_bytes: int
    shared_bytes: int
    wgmma: bool


class CompileCase(NamedTuple):
    """One Triton kernel at the sizes that it is launched with.

    `signature` has Triton's type of each argument that is not a constexpr ("*bf16", "i32", ...).
    `divisible` names whole numbers that are multiples of 16 where it is launched so, which lets
    Triton load whole vectors; that pointers are aligned to 16 bytes is taken for granted.
    """

    name: str
    kernel: Any
    signature: Mapping[str, str]
    constexprs: Mapping[str, Any]
    num_warps: int = 4
    num_stages: int = 2
    divisible: tuple[str, ...] = ()


Report = dict[tuple[str, str], KernelFigures]


def compile_all(root: Path) -> Report:
    """Compiles csrc/<op>/*.cu and kernels/<op>/triton_impl.py under `root`, by (op, kernel).

    Raises:
        FileNotFoundError: nvcc or cuobjdump cannot be found.
        RuntimeError: a source does not compile; the message is the compiler's.
    """
    report: Report = {}
    for source in sorted((root / "csrc").glob("*/*.cu")):
        report |= {
            (source.parent.name, kernel): figures
            for kernel, figures in compile_source(source, root / "csrc")
        }
    for module in sorted((root / "kernels").glob("*/triton_impl.py")):
        folder = module.parent.name
        implementation = importlib.import_module(f"carillon.kernels.{folder}.triton_impl")
        for case in implementation.compile_cases():
            report[folder, f"triton {case.name}"] = compile_triton(case)
    return report


def compile_source(source: Path, include: Path) -> Iterator[tuple[str, KernelFigures]]:
    """Yields (kernel, figures) of one CUDA source."""
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        raise FileNotFoundError("nvcc is not on PATH: install the CUDA toolkit")
    target = ["-gencode=arch=compute_90a,code=sm_90a", "-Xptxas", "-v"]
    options = ["-std=c++20", "-O3", f"-I{include}", *target]
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder, "kernels.cubin")
        command = [nvcc, *options, "-cubin", "-o", str(cubin), str(source)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{source} does not compile for sm_90a:\n{done.stderr}")
        with_wgmma = set(functions_with_wgmma(demangle(_cuobjdump("-sass", cubin))))
    for kernel, figures in parse(demangle(done.stderr)):
        yield kernel, figures._replace(wgmma=kernel in with_wgmma)


def compile_case(case: CompileCase) -> Any:
    """Compiles one Triton kernel for sm_90, without a GPU; returns Triton's compiled kernel."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    attributes = {
        (position,): [["tt.divisibility", 16]]
        for position, name in enumerate(case.kernel.arg_names)
        if name in case.divisible or str(case.signature.get(name, "")).startswith("*")
    }
    source = ASTSource(case.kernel, dict(case.signature), dict(case.constexprs), attributes)
    options = {"num_warps": case.num_warps, "num_stages": case.num_stages}
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)


def compile_triton(case: CompileCase) -> KernelFigures:
    """What one Triton kernel costs on sm_90."""
    compiled = compile_case(case)
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder, "kernel.cubin")
        cubin.write_bytes(compiled.asm["cubin"])
        usage = _cuobjdump("-res-usage", cubin)
    found, stack = _TRITON_USAGE.search(usage), _TRITON_STACK.search(usage)
    if found is None or stack is None:
        raise RuntimeError(f"cuobjdump says nothing of {case.name}:\n{usage}")
    return KernelFigures(
        registers=int(found["registers"]),
        spilled_bytes=int(found["local"]) + int(stack["stack"]),
        shared_bytes=int(compiled.metadata.shared),
        wgmma="wgmma" in compiled.asm["ptx"],
    )


def _cuobjdump(what: str, cubin: Path) -> str:
    """The toolkit's program, or the one that Triton brings."""
    program = shutil.which("cuobjdump")
    if program is None:
        import triton

        program = triton.knobs.nvidia.cuobjdump.path
    return subprocess.run([program, what, str(cubin)], capture_output=True, text=True).stdout


def demangle(messages: str) -> str:
    command = ["c++filt", "--no-params"]
    return subprocess.run(
        command, input=messages, capture_output=True, text=True, check=True
    ).stdout


def parse(messages: str) -> Iterator[tuple[str, KernelFigures]]:
    """Yields (kernel, figures) from the messages of `ptxas -v`."""
    kernel, spilled = "", 0
    for line in messages.splitlines():
        if entry := _ENTRY.search(line):
            kernel = short_name(entry["kernel"])
        elif spills := _SPILLS.search(line):
            spilled = int(spills["stores"]) + int(spills["loads"])
        elif registers := _REGISTERS.search(line):
            shared = _SHARED.search(line)
            shared_bytes = int(shared["shared"]) if shared else 0
            yield kernel, KernelFigures(int(registers["registers"]), spilled, shared_bytes, False)


def functions_with_wgmma(sass: str) -> Iterator[str]:
    """Names of the functions whose machine code has tensor-core products of a warp group."""
    function = ""
    for line in sass.splitlines():
        if "Function :" in line:
            function = short_name(line.partition("Function :")[2].strip())
        elif "HGMMA" in line or "QGMMA" in line:
            yield function


def short_name(kernel: str) -> str:
    """Drops the return type and all namespaces, those of template arguments too."""
    return _NAMESPACE.sub("", kernel.removeprefix("void "))


def versions() -> str:
    """The compilers whose figures these are."""
    import triton

    nvcc = shutil.which("nvcc")
    said = subprocess.run([nvcc or "nvcc", "--version"], capture_output=True, text=True).stdout
    release = re.search(r"release ([\d.]+)", said)
    return f"nvcc {release[1] if release else '?'} -O3 and Triton {triton.__version__}"


def read_status(root: Path) -> Report:
    """The figures that docs/gpu-status.md records."""
    rows = map(_ROW.match, (root / STATUS_FILE).read_text().splitlines())
    return {
        (row["op"], row["kernel"]): KernelFigures(
            registers=int(row["registers"]),
            spilled_bytes=int(row["spills"]),
            shared_bytes=int(row["shared"]),
            wgmma=row["wgmma"] == "yes",
        )
        for row in rows
        if row
    }


def read_versions(root: Path) -> str:
    """The compilers that the recorded figures are of."""
    found = _VERSIONS.search((root / STATUS_FILE).read_text())
    return found["versions"] if found else ""


def write_status(root: Path, report: Report, compilers: str) -> None:
    """Replaces the table of docs/gpu-status.md, leaving the text around it."""
    path = root / STATUS_FILE
    text = _VERSIONS.sub(f"Figures of {compilers}, sm_90a:", path.read_text())
    before, _, after = text.partition(_HEADER)
    rest = after.splitlines(keepends=True)[1:]
    while rest and rest[0].startswith("|"):
        rest.pop(0)
    rows = [
        f"| {op} | `{kernel}` | {of.registers} | {of.spilled_bytes} | {of.shared_bytes} "
        f"| {'yes' if of.wgmma else 'no'} |\n"
        for (op, kernel), of in sorted(report.items())
    ]
    rule = "\n| --- | --- | --- | --- | --- | --- |\n"
    path.write_text("".join([before, _HEADER, rule, *rows, *rest]))


def worse(recorded: Report, measured: Report) -> list[str]:
    """Says which kernels grew, lost their tensor-core products, appeared or vanished."""
    problems = [
        f"{op}: {kernel} is recorded but not compiled"
        for op, kernel in recorded.keys() - measured.keys()
    ]
    for (op, kernel), now in measured.items():
        before = recorded.get((op, kernel))
        if before is None:
            problems.append(f"{op}: {kernel} is not recorded")
        elif any(a > b for a, b in zip(now[:3], before[:3], strict=True)) or (
            before.wgmma and not now.wgmma
        ):
            problems.append(f"{op}: {kernel} had {before} and has {now}")
        if now.shared_bytes > MAX_SHARED_BYTES:
            problems.append(f"{op}: {kernel} takes {now.shared_bytes} bytes of shared memory")
    return sorted(problems)


def main() -> int:
    root = Path.cwd()
    if not (root / STATUS_FILE).exists():
        print(f"{root} has no {STATUS_FILE}: run this in the checkout", file=sys.stderr)
        return 2
    report = compile_all(root)
    if "--check" in sys.argv[1:]:
        problems = worse(read_status(root), report)
        print("\n".join(problems) or "no kernel grew")
        return 1 if problems else 0
    write_status(root, report, versions())
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
