"""Installs the wheels of a folder that the suite knows, each by itself, and records what came.

`python wheels.py LIST FOLDER TARGET RECORDS`. Neither the folder nor any wheel has to be there.
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

from records import append


def known(listing: Path) -> dict[str, str]:
    """Distributions by name, and what each is for."""
    lines = [line for line in listing.read_text().splitlines() if line and line[0] != "#"]
    return {name: purpose for name, _, purpose in (line.partition(": ") for line in lines)}


def name_of(wheel: Path) -> str:
    return re.sub(r"[-_.]+", "_", wheel.name.partition("-")[0]).lower()


def install(wheel: Path, target: Path) -> str:
    """Empty where it was installed, else why not."""
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "install", "--quiet"]
    offline = ["--no-index", "--no-deps", "--no-compile", "--upgrade", "--target", str(target)]
    done = subprocess.run([*pip, *offline, str(wheel)], capture_output=True, text=True)
    return "" if done.returncode == 0 else (done.stderr or done.stdout)[-500:]


def main() -> int:
    listing, folder, target, records = (Path(argument) for argument in sys.argv[1:])
    wanted = known(listing)
    there = {name_of(wheel): wheel for wheel in sorted(folder.glob("*.whl"))}
    outcome = dict.fromkeys(wanted, "not in the folder")
    for name in sorted(there.keys() - wanted.keys()):
        outcome[name] = "not known to the suite, left out"
    for name in wanted.keys() & there.keys():
        problem = install(there[name], target)
        outcome[name] = problem or f"installed {there[name].name}"
    append(records, "wheels", folder=str(folder), outcome=outcome)
    for name, what in sorted(outcome.items()):
        print(f"{name}: {what}")
    bad = [name for name in wanted.keys() & there.keys() if "installed" not in outcome[name]]
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
