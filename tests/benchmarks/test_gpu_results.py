"""benchmarks/gpu/keep.py: what stays of a run in the repository, and what does not."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
SUITE = ROOT / "benchmarks" / "gpu"
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
