"""`carillon checkpoint`: looks into, verifies and converts checkpoints, in one process on a CPU."""

from __future__ import annotations

import argparse
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from carillon.engine.train.checkpoint import Checkpoint
    from carillon.engine.train.checkpoint_forms import TensorSource

EXAMPLES = """examples:
  carillon checkpoint inspect RUN                     the newest checkpoint of a run
  carillon checkpoint inspect RUN/checkpoints/step-00001000 --tensors
  carillon checkpoint verify RUN                      all of a run's, byte by byte
  carillon checkpoint convert RUN --to safetensors --weights --out weights
  carillon checkpoint convert RUN --to zarr --out all.zarr-checkpoint
  carillon checkpoint convert RUN --to torch_dist --out iter_0001000
"""
_SHARD_GB = 5.0
_LARGEST_SHARD_GB = 1_000_000
_FORMS = ("dcp", "safetensors", "zarr", "torch_dist")  # checkpoint_forms' too, which imports torch


def add_arguments(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(dest="action", required=True)
    for name, text in (
        ("inspect", "what a checkpoint is of and holds"),
        ("verify", "compare every file with its recorded SHA-256"),
        ("convert", "write the tensors in another form: dcp, safetensors, zarr or Megatron-Core's"),
    ):
        action = actions.add_parser(name, help=text, description=text)
        action.add_argument("checkpoint", help="a checkpoint's folder, or a run's")
        if name == "inspect":
            action.add_argument("--tensors", action="store_true", help="list every tensor")
        if name == "convert":
            action.add_argument("--to", required=True, choices=_FORMS)
            action.add_argument("--out", required=True, type=Path, help="the folder to make")
            action.add_argument(
                "--weights",
                action="store_true",
                help="the model alone, by its own names: averaged weights where there are some",
            )
            action.add_argument(
                "--shard-gb",
                type=float,
                default=_SHARD_GB,
                help=f"largest safetensors file, in GB (default {_SHARD_GB:g})",
            )


def main(args: argparse.Namespace) -> int:
    """Raises UserError for a path that is no checkpoint, and for a damaged one."""
    if args.action == "verify":
        return _verify(args.checkpoint)
    checkpoint, step = _find(args.checkpoint)[-1], 0
    if args.action == "convert":  # before the files are compared, which may take long
        _check_convert(checkpoint, args)
    if not _is_foreign(checkpoint.path):
        checkpoint.verify()
        step = int(checkpoint.state["step"])
    from carillon.engine.train.checkpoint_forms import open_tensors

    source = open_tensors(checkpoint.path, step)
    if args.action == "inspect":
        _inspect(checkpoint, source, tensors=args.tensors)
    else:
        _convert(checkpoint, source, args)
    return 0


def _is_foreign(path: Path) -> bool:
    """Whether Megatron-Core wrote the folder: it has no manifest to verify it by."""
    from carillon.engine.train.checkpoint_megatron import is_torch_dist
    from carillon.engine.train.checkpoint_seal import MANIFEST

    return is_torch_dist(path) and not (path / MANIFEST).is_file()


def _find(given: str) -> list[Checkpoint]:
    """The checkpoint of a folder, its step not read yet, or all of a run, oldest first."""
    from carillon.engine.config import UserError
    from carillon.engine.train.checkpoint import Checkpoint, list_checkpoints
    from carillon.engine.train.checkpoint_seal import MANIFEST
    from carillon.engine.train.run import find_run

    path = Path(given)
    if (path / MANIFEST).is_file() or _is_foreign(path):
        return [Checkpoint(path=path, step=0)]
    if path.is_dir() and not (path / "config.yaml").is_file():
        raise UserError(f"{path} is no checkpoint: it has no {MANIFEST}, and it is no run")
    run = find_run(given)
    found = list_checkpoints(run / "checkpoints")
    if not found:
        raise UserError(f"run {run} has no complete checkpoint yet")
    return found


def _verify(given: str) -> int:
    from carillon.engine.config import UserError

    for checkpoint in _find(given):
        if _is_foreign(checkpoint.path):
            raise UserError(
                f"{checkpoint.path} is Megatron-Core's own: it has no manifest to verify it by"
            )
        checkpoint.verify()
        print(f"{checkpoint.path}: good, {checkpoint.content_hash}")
    return 0


def _inspect(checkpoint: Checkpoint, source: TensorSource, *, tensors: bool) -> None:
    from carillon.engine.train.checkpoint_forms import counted

    is_foreign = _is_foreign(checkpoint.path)
    state = {"step": source.step} if is_foreign else checkpoint.state
    print(f"{checkpoint.path}: {'not verified, it has no manifest' if is_foreign else 'good'}")
    print(f"  form        {source.form}")
    if not is_foreign:
        print(f"  hash        {checkpoint.content_hash}")
    for label, key in (("step", "step"), ("config", "config_hash"), ("processes", "world_size")):
        if key in state:
            print(f"  {label:<12}{state[key]}")
    groups: dict[str, list[str]] = {}
    for name in source.entries:
        groups.setdefault(name.partition(".")[0], []).append(name)
    for group, names in groups.items():
        num, values, size = counted(source.entries[name] for name in names)
        print(f"  {group:<12}{num} tensors, {values:,} values, {size / 1e6:,.1f} MB")
    if tensors:
        for name, entry in source.entries.items():
            shape = " x ".join(map(str, entry.shape)) or "one value"
            print(f"  {name}  {shape}  {str(entry.dtype).removeprefix('torch.')}")


def _check_convert(checkpoint: Checkpoint, args: argparse.Namespace) -> None:
    """Raises UserError for a size that is none, and for a place that is taken or in a checkpoint:
    what is put there would be a file that its manifest does not name."""
    from carillon.engine.config import UserError
    from carillon.engine.train.checkpoint_seal import MANIFEST, STATE

    if not 0 < args.shard_gb <= _LARGEST_SHARD_GB:
        raise UserError(
            f"--shard-gb {args.shard_gb:g} given; more than 0 and at most {_LARGEST_SHARD_GB:,} "
            "is allowed"
        )
    if os.path.lexists(args.out):
        raise UserError(f"--out: {args.out} exists; give another place, or remove it")
    source, parent = checkpoint.path.resolve(), args.out.absolute().parent.resolve()
    for folder in (parent, *parent.parents):
        if folder == source or all((folder / name).is_file() for name in (MANIFEST, STATE)):
            raise UserError(f"--out: {args.out} is in the checkpoint {folder}; give another place")


def _convert(checkpoint: Checkpoint, source: TensorSource, args: argparse.Namespace) -> None:
    from carillon.engine.access import explained
    from carillon.engine.config import UserError
    from carillon.engine.train.checkpoint_seal import complete, sync
    from carillon.engine.train.checkpoint_writer import write_tensors

    out: Path = args.out.absolute()
    state: dict[str, Any] = {"step": source.step, "converted_from": "torch_dist"}
    if not _is_foreign(checkpoint.path):
        state = checkpoint.state | {"converted_from": checkpoint.content_hash}
    names = _weights(source) if args.weights else {name: name for name in source.entries}
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        # A folder that only this process knows; the one in it has the user's own rights.
        with tempfile.TemporaryDirectory(
            prefix=".convert-", dir=out.parent, ignore_cleanup_errors=True
        ) as own:
            partial = Path(own) / "checkpoint"
            partial.mkdir()
            write_tensors(args.to, partial, source, names, int(args.shard_gb * 1e9))
            complete(partial, state)
            partial.rename(out)  # fails where something stands by now, unless it is an empty folder
            sync(out.parent)
    except OSError as error:
        raise UserError(f"{out} cannot be written: {explained(error)}") from None
    except MemoryError:
        raise UserError(
            f"memory does not hold the tensors of {checkpoint.path} for --to {args.to}; "
            "safetensors and zarr are written some tensors at a time"
        ) from None
    print(f"{out}: {len(names)} tensors as {args.to}")


def _weights(source: TensorSource) -> Mapping[str, str]:
    """The model's names and those in the checkpoint."""
    from carillon.engine.config import UserError

    for prefix in ("average.", "model."):
        names = {n.removeprefix(prefix): n for n in source.entries if n.startswith(prefix)}
        if names:
            return names
    raise UserError("--weights: the checkpoint holds no model's weights by that name; leave it out")
