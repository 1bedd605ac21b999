"""`carillon checkpoint`: looks into, verifies and converts checkpoints, in one process on a CPU."""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

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
    checkpoint = _find(args.checkpoint)[-1]
    if not _is_foreign(checkpoint.path):
        checkpoint.verify()
    from carillon.engine.train.checkpoint_forms import open_tensors

    source = open_tensors(checkpoint.path, checkpoint.step)
    if args.action == "inspect":
        _inspect(checkpoint, source, tensors=args.tensors)
    else:
        _convert(checkpoint, source, args)
    return 0


def _is_foreign(path: Path) -> bool:
    """Whether Megatron-Core wrote the folder: it has no manifest to verify it by."""
    from carillon.engine.train.checkpoint import MANIFEST
    from carillon.engine.train.checkpoint_megatron import is_torch_dist

    return is_torch_dist(path) and not (path / MANIFEST).is_file()


def _find(given: str) -> list[Checkpoint]:
    """The checkpoint of a folder, or all of a run, oldest first."""
    from carillon.engine.config import UserError
    from carillon.engine.train.checkpoint import MANIFEST, Checkpoint, list_checkpoints
    from carillon.engine.train.run import find_run

    path = Path(given)
    if (path / MANIFEST).is_file():
        one = Checkpoint(path=path, step=0)
        return [Checkpoint(path=path, step=int(one.state.get("step", 0)))]
    if _is_foreign(path):
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


def _convert(checkpoint: Checkpoint, source: TensorSource, args: argparse.Namespace) -> None:
    from carillon.engine.access import explained
    from carillon.engine.config import UserError
    from carillon.engine.data.publish import check_target
    from carillon.engine.train.checkpoint import seal
    from carillon.engine.train.checkpoint_writer import write_tensors

    out: Path = args.out.absolute()
    if not args.shard_gb > 0:
        raise UserError(f"--shard-gb {args.shard_gb:g} given; more than 0 is allowed")
    names = _weights(source) if args.weights else {name: name for name in source.entries}
    check_target(out, "checkpoint", lambda _: False, overwrite=False)
    partial = out.with_name(f"{out.name}.tmp")
    try:
        partial.mkdir(parents=True)
        write_tensors(args.to, partial, source, names, int(args.shard_gb * 1e9))
        if _is_foreign(checkpoint.path):
            seal(partial, {"step": source.step, "converted_from": "torch_dist"})
        else:
            seal(partial, checkpoint.state | {"converted_from": checkpoint.content_hash})
    except OSError as error:
        raise UserError(f"{out} cannot be written: {explained(error)}") from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    print(f"{out}: {len(names)} tensors as {args.to}")


def _weights(source: TensorSource) -> Mapping[str, str]:
    """The model's names and those in the checkpoint."""
    from carillon.engine.config import UserError

    for prefix in ("average.", "model."):
        names = {n.removeprefix(prefix): n for n in source.entries if n.startswith(prefix)}
        if names:
            return names
    raise UserError("--weights: the checkpoint holds no model's weights by that name; leave it out")
