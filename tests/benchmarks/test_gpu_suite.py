"""benchmarks/gpu/run.sh from end to end on the CPU.

What a GPU alone can show (events, memory, profilers, the build with CUDA) is not tested here.
"""

import json
import subprocess
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from carillon import _C

ROOT = Path(__file__).resolve().parents[2]
SUITE = ROOT / "benchmarks" / "gpu"
# One run of the suite serves all tests of this file; another file would need another.
KEEP = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import keep
out = Path(sys.argv[2])
keep.RESULTS, keep.STATUS = out / "results", out / "status.md"
sys.argv = ["keep.py", str(out)]
keep.main()
"""
RunSuite = Callable[..., subprocess.CompletedProcess[str]]
Side = Callable[[str, str], dict[str, Any]]


@pytest.fixture
def side(summary: dict[str, Any]) -> Side:
    """A side of the first timed case of an operator."""

    def find(op: str, name: str) -> dict[str, Any]:
        case = next(case for case in summary["cases"] if case["op"] == op)
        (found,) = (side for side in case["sides"] if side["side"] == name)
        return dict(found)

    return find


def test_every_stage_has_a_status(summary: dict[str, Any]) -> None:
    stages = {stage["name"]: stage["status"] for stage in summary["stages"]}
    passed = ("machine", "build", "rates", "train")
    failed = ("wheels", "check", "bar", "tests")
    assert stages == dict.fromkeys(passed, "passed") | dict.fromkeys(failed, "failed")
    assert all(stage["seconds"] <= stage["budget_s"] for stage in summary["stages"])


def test_machine_and_rates_are_recorded(summary: dict[str, Any]) -> None:
    machine = summary["machine"]
    assert machine["python"].startswith(f"{sys.version_info.major}.{sys.version_info.minor}.")
    assert machine["versions"]["torch"] != "not installed"
    assert machine["versions"]["flash-attn"] == "not installed"
    assert len(machine["sources"]) == 16
    assert summary["rates"]["measured"]["bytes_per_s"] > 1e6
    assert summary["rates"]["measured"]["flops_per_s"] > 1e6
    assert summary["build"]["with_cuda"] == str(_C.WITH_CUDA)


def test_a_real_operator_is_checked_and_timed(summary: dict[str, Any], side: Side) -> None:
    checks = [row for row in summary["checks"] if row["module"] == "grouped_mm"]
    native = [row for row in checks if row["side"] == "native"]
    assert [row["status"] for row in native] == ["ok", "ok"]
    for row in native:  # the product and two gradients
        assert len(row["errors"]) == 3
        assert all(float(error) <= row["limit"] for error in row["errors"])
    timed = side("grouped_mm", "native")
    assert 0 < timed["low_ms"] <= timed["median_ms"] <= timed["high_ms"]
    assert timed["over_floor"] == pytest.approx(timed["median_ms"] / timed["floor_ms"], rel=0.01)
    assert timed["floor_of"] == "this run"
    rate = 6.0 * 24 * 2 * 16 * 32 / timed["median_ms"] / 1e9
    assert timed["teraflop_per_s"] == pytest.approx(rate, abs=0.01)


def test_training_steps_are_timed(summary: dict[str, Any], side: Side, dry_run: Path) -> None:
    (case,) = (case for case in summary["cases"] if case["op"] == "training")
    assert case["group"] == "train"
    assert [bar["met"] for bar in case["bars"]] == [False]  # no machine takes so many
    for name in ("bf16", "fp8"):
        found = side("training", name)
        assert found["status"] == "ok", found
        assert found["images_per_s"] == pytest.approx(4e3 / found["median_ms"], abs=0.1)
        assert 0 < found["mfu"] < 1
    assert "on a GPU alone" in side("training", "bf16 compile")["reason"]
    page = (dry_run / "summary.md").read_text()
    assert f"{side('training', 'bf16')['images_per_s']:g} images/s, MFU" in page
    assert "at least 1e+09 images/s" in page


def test_a_side_that_cannot_run_here_says_why(side: Side) -> None:
    for name, why in (("triton", "in Triton's interpreter only"), ("torch._grouped_mm", "a GPU")):
        found = side("grouped_mm", name)
        assert found["status"] == "unavailable"
        assert why in found["reason"]


@pytest.mark.parametrize(
    ("name", "status", "reason"),
    [
        ("crash", "crashed", "ended by SIGSEGV"),
        ("hang", "timed out", "no result within 6 s"),
        ("fill", "out of memory", "4 TiB"),
        ("reach_outside", "CUDA error", "illegal memory access"),
        ("break_down", "error", "no such setting"),
        ("absent", "unavailable", "absent is not installed"),
    ],
)
def test_a_bad_end_is_recorded(side: Side, name: str, status: str, reason: str) -> None:
    found = side("faulty", name)
    assert found["status"] == status
    assert reason in found["reason"]


def test_what_comes_after_a_bad_end_is_measured(summary: dict[str, Any], side: Side) -> None:
    assert side("faulty", "right")["status"] == "ok"
    assert side("faulty", "slower")["status"] == "ok"
    (case,) = (case for case in summary["cases"] if case["op"] == "faulty")
    assert [bar["met"] for bar in case["bars"]] == [True, False, None, True, None]
    assert "absent is not installed" in case["bars"][2]["reason"]
    assert "on a GPU alone" in case["bars"][4]["reason"]


def test_a_wrong_result_is_seen(summary: dict[str, Any]) -> None:
    checks = {row["side"]: row for row in summary["checks"] if row["module"] == "faulty"}
    statuses = {name: row["status"] for name, row in checks.items()}
    assert statuses == {"wrong": "wrong", "right": "ok", "not a number": "wrong"}
    assert float(checks["wrong"]["errors"][0]) == pytest.approx(5e-4, rel=0.01)
    assert checks["not a number"]["errors"] == ["inf"]


def test_tests_go_on_after_one_that_kills_its_process(summary: dict[str, Any]) -> None:
    (folder,) = summary["tests"]
    assert (folder["passed"], folder["failed"]) == (2, 3)
    failures = {x["test"].rpartition("::")[2]: x["said"] for x in folder["failures"]}
    assert "SIGKILL" in failures["test_crashes"]
    assert "assert 1 == 2" in failures["test_fails"]
    assert "device-side assert" in failures["test_loses_the_context"]


def test_wheels_are_named(summary: dict[str, Any]) -> None:
    outcome = summary["wheels"]["outcome"]
    assert outcome["flash_attn"] == "not in the folder"
    assert "ninja" in outcome["ninja"]
    assert "installed" not in outcome["ninja"]


def test_few_files_come_back(dry_run: Path) -> None:
    files = {"summary.json", "summary.md", "records.jsonl", "logs.tar.gz"}
    assert {path.name for path in dry_run.iterdir()} == files
    page = (dry_run / "summary.md").read_text()
    for words in ("| faulty | timed | right |", "SIGSEGV", "NO", "absent"):
        assert words in page
    with tarfile.open(dry_run / "logs.tar.gz") as logs:
        assert "logs/bar-faulty.log" in logs.getnames()


PLAN = """
import json, sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from case import GROUPS, load
for path in sorted(Path(sys.argv[1], "cases").glob("*.py")):
    module = load(path)
    assert path.stem == module.OP
    for case in module.cases(False):
        assert case.group in GROUPS
        sides = [side.name for side in module.sides(case, "cuda")]
        peers = [bar.peer for bar in case.bars if bar.peer]
        about = [module.OP, case.group, case.name, sides, peers, len(case.costs), case.bars]
        print(json.dumps(about))
"""


def test_every_case_is_whole_and_its_bars_name_sides() -> None:
    """As a GPU would run them, without one: names are unique, each side is ours, or a peer that is
    there or says why it is not."""
    command = [sys.executable, "-c", PLAN, str(SUITE)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    plan = [json.loads(line) for line in done.stdout.splitlines()]
    assert len({(op, group, name) for op, group, name, *_ in plan}) == len(plan)
    for op, group, name, sides, peers, num_costs, _ in plan:
        assert sides, (op, name)
        assert "peers" not in sides, f"{op}: its peers cannot be imported"
        assert set(peers) <= set(sides), (op, name)
        assert num_costs, (op, group)
    ops = {path.stem for path in (SUITE / "cases").glob("*.py")}
    for group in ("check", "bar", "sweep"):
        assert {op for op, of, *_ in plan if of == group} == ops - {"training"}
    goals = {name: bars for op, group, name, *_, bars in plan if group == "train"}
    assert goals == {
        "ViT-L/14 128 pairs": [["images/s", 750.0, ""]],
        "ViT-B/16 256 pairs": [],
        "ViT-B/32 512 pairs": [],
    }
    names = [name for op, group, name, *_ in plan if (op, group) == ("contrastive", "bar")]
    assert names == ["softmax N=32768 D=768 bf16"]


def test_a_run_that_is_out_of_time_says_what_it_left_out(
    run_suite: RunSuite, tmp_path: Path
) -> None:
    done = run_suite("--dry-run", "--seconds", "14", str(tmp_path))
    assert done.returncode == 0
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert {stage["status"] for stage in summary["stages"]} == {"not run: the time was up"}
    assert "not run: the time was up" in done.stdout


def test_profile_writes_a_table_and_a_trace(run_suite: RunSuite, tmp_path: Path) -> None:
    options = ("--dry-run", "--module", str(_C.__file__), "--profile", "image_normalize::reference")
    done = run_suite(*options, str(tmp_path))
    assert done.returncode == 0, done.stderr
    with tarfile.open(tmp_path / "profile.tar.gz") as profile:
        names = profile.getnames()
        table = profile.extractfile("profile/kernels.txt")
        assert table is not None
        assert "aten::" in table.read().decode()
    assert "profile/trace.json" in names


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ((), "OUTDIR is missing"),
        (("--nothing", "out"), "unknown option --nothing"),
        (("--seconds", "soon", "out"), "--seconds must be a whole number, got soon"),
        (("--module",), "--module needs a value"),
        (("one", "two"), "one OUTDIR is expected, got one and two"),
    ],
)
def test_bad_options_are_named(run_suite: RunSuite, options: tuple[str, ...], said: str) -> None:
    done = run_suite(*options)
    assert done.returncode == 2
    assert said in done.stderr


def test_wheels_are_listed(run_suite: RunSuite) -> None:
    listed = run_suite("--list-wheels").stdout
    assert "open_clip_torch: OpenCLIP's losses" in listed


# What stays of a run in the repository, and what does not (keep.py).


def keep(out: Path, summary: dict[str, Any]) -> subprocess.CompletedProcess[str]:
    """Calls keep.py on a summary, with another place for what it writes."""
    (out / "summary.json").write_text(json.dumps(summary))
    command = [sys.executable, "-c", KEEP, str(SUITE), str(out)]
    return subprocess.run(command, capture_output=True, text=True)


def test_results_of_a_gpu_are_kept(summary: dict[str, Any], tmp_path: Path) -> None:
    gpu = {"gpus": [{"name": "NVIDIA H100 80GB HBM3"}], "commit": "unknown"}
    page = (ROOT / "docs" / "gpu-status.md").read_text()
    (tmp_path / "status.md").write_text(page)
    done = keep(tmp_path, summary | {"machine": summary["machine"] | gpu})
    assert done.returncode == 0, done.stderr
    kept = {path.stem for path in (tmp_path / "results").iterdir()}
    assert kept == {"grouped_mm", "faulty", "training", "tests"}
    faulty = json.loads((tmp_path / "results" / "faulty.json").read_text())
    assert faulty["machine"]["gpus"] == gpu["gpus"]
    assert len(faulty["machine"]["commit"]) >= 40  # of this checkout: the machine had no git
    assert {side["side"] for side in faulty["cases"][0]["sides"]} >= {"right", "hang", "absent"}
    written = (tmp_path / "status.md").read_text()
    rows = [line for line in written.splitlines() if line.startswith("| faulty | timed | right |")]
    assert [row.split("|")[-2].split(":")[0].strip() for row in rows] == [
        *("yes", "no", "not known", "yes", "not known")
    ]
    text = [line for line in page.splitlines() if not line.startswith("|")]
    assert [line for line in written.splitlines() if not line.startswith("|")] == text


@pytest.mark.parametrize(
    ("machine", "said"),
    [
        ({}, "the run had no GPU"),
        ({"sources": "0123456789abcdef"}, "the run was of sources 0123456789abcdef, this checkout"),
    ],
)
def test_what_is_not_kept(
    summary: dict[str, Any], tmp_path: Path, machine: dict[str, str], said: str
) -> None:
    done = keep(tmp_path, summary | {"machine": summary["machine"] | machine})
    assert done.returncode == 1
    assert said in done.stderr
    assert not (tmp_path / "results").exists()
