"""`carillon train CONFIG [key=value ...]`: one process, or the processes that torchrun starts."""

from __future__ import annotations

import argparse

EXAMPLES = """examples:
  carillon train recipes/emoji_quickstart.yaml
  carillon train recipes/flickr8k_small.yaml data.path=photos optimization.lr=5e-4
  torchrun --nproc-per-node=2 recipes/train.py --config recipes/emoji_small.yaml
The same command resumes a run that was stopped; --fresh starts it anew (the old folder is kept).
Exit codes: 0 done, 2 the input cannot be used, 3 given up after too many bad steps, 75 stopped by
a signal with its state saved: start it again."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", help="a YAML config, such as those in recipes/")
    add_shared_arguments(parser)


def add_shared_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="key=value",
        help="settings to change; `carillon config settings` lists them",
    )
    parser.add_argument("--fresh", action="store_true", help="start anew; the old run is kept")


def main(args: argparse.Namespace) -> int:
    # Imported here: torch takes seconds, and a wrong flag should answer at once.
    from carillon.engine.parallel.start import told_by_one
    from carillon.engine.train.launch import train
    from carillon.engine.train.run_config import load_config

    with told_by_one():
        config = load_config(args.config, args.overrides)
    return train(config, fresh=args.fresh)
