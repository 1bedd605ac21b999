"""Train a recipe.

torchrun --nproc-per-node=N recipes/train.py --config recipes/X.yaml [key=value ...]
"""

from __future__ import annotations

import argparse
import sys

from carillon.engine.cli import main as carillon


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config", required=True, help="a YAML config, such as those in recipes/")
    parser.add_argument("--fresh", action="store_true", help="start anew; the old run is kept")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings to change")
    args = parser.parse_intermixed_args()  # key=value may stand before and after --fresh
    fresh = ["--fresh"] if args.fresh else []
    return carillon(["train", args.config, *args.overrides, *fresh])


if __name__ == "__main__":
    sys.exit(main())
