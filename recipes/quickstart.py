"""What `make quickstart` runs: fetch, train on two processes, evaluate, draw, and say how to go on.

Each step is a public command, printed before it runs, so a reader can repeat any of them.
"""

from __future__ import annotations

import shlex
import subprocess
import sys
from pathlib import Path

from carillon.engine.train.run_config import load_config, run_name


def run(*command: str) -> None:
    """Run one command of the recipe; its failure ends the quickstart with its exit code."""
    print(f"\n$ {shlex.join(command)}", flush=True)
    scripts = Path(sys.executable).parent
    code = subprocess.run([str(scripts / command[0]), *command[1:]], check=False).returncode
    if code != 0:
        sys.exit(code)


def main() -> int:
    recipe = sys.argv[1] if len(sys.argv) > 1 else "recipes/emoji_quickstart.yaml"
    config = load_config(recipe, sys.argv[2:])
    folder = Path(config.logging.output) / run_name(config)
    run("carillon", "data", "emoji", "--out", str(config.data.path), "--size", "64")
    launch = ("torchrun", "--nproc-per-node=2", "recipes/train.py", "--config", recipe)
    run(*launch, *sys.argv[2:])
    run("carillon", "eval", "run", str(folder))
    print(f"""
Done. In {folder}/:
  loss.png, retrieval.png   pictures to look at
  evaluation.json           the tables above
  metrics.jsonl, tensorboard/, config.yaml, checkpoints/

Go on:
  search        carillon search {folder} "un chien qui court"
  train longer  torchrun --nproc-per-node=2 recipes/train.py --config recipes/emoji_small.yaml
  resume        a stopped run goes on when its command is given again
  your data     carillon ingest FOLDER --out data/mine
  all runs      carillon runs list""")
    return 0


if __name__ == "__main__":
    sys.exit(main())
