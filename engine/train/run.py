"""A run on disk: its config, its name, its folder, and how it is opened again.

runs/<name>-<first 8 of the config hash>/ holds config.yaml (resolved), run.json (hashes, commit,
versions, data fingerprint, seeds), tokenizer.json, metrics.jsonl, checkpoints/ and pictures. The
name follows from the config, so the same YAML finds its run again and resumes it; `fresh` moves the
old folder aside. A lock keeps two launches out of one folder.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import platform
import subprocess
import time
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import IO, Any

from torch import Tensor

from carillon.engine.config import UserError, build, config_hash, read_values, to_yaml
from carillon.engine.data.tokenizer import Tokenizer
from carillon.engine.data.training_data import TrainingData
from carillon.engine.models.towers.dual_encoder import DualEncoder, DualEncoderConfig
from carillon.engine.train.checkpoint import Checkpoint, list_checkpoints
from carillon.engine.train.checkpoint_reader import read_tensors
from carillon.engine.train.checkpoint_seal import write_durably
from carillon.engine.train.run_config import RunConfig, new_dual_encoder, run_name


class RunFolder:
    """The folder of a run that is being trained; held locked until `close`."""

    def __init__(self, config: RunConfig, *, fresh: bool) -> None:
        self.config = config
        self.path = Path(config.logging.output) / run_name(config)
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._lock = self._acquire(self.path.parent / f".{self.path.name}.lock")
            if fresh and self.path.exists():
                self.path.rename(self.path.with_name(f"{self.path.name}.{time.time_ns()}.old"))
            self.path.mkdir(exist_ok=True)
        except OSError as error:
            raise UserError(
                f"run folder {self.path} cannot be made: {error.strerror}; "
                "set logging.output to a folder that you can write"
            ) from None

    def _acquire(self, path: Path) -> IO[str]:
        lock = path.open("w")
        try:
            # Not flock: forked loader workers would hold it on after this process is killed.
            fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.close()
            raise UserError(
                f"run {self.path} is being trained by another process; wait for it, or give this "
                "one another experiment.name"
            ) from None
        return lock

    def record(self, facts: dict[str, Any]) -> None:
        """Write config.yaml and run.json, or check that an earlier start used the same data.

        Raises UserError when the run exists with another data set or tokenizer.
        """
        file = self.path / "run.json"
        if file.is_file():
            before = _read_facts(file)
            for what, name in (("data", "data set"), ("tokenizer", "tokenizer")):
                then, now = before[f"{what}_fingerprint"], facts[f"{what}_fingerprint"]
                if then != now:
                    raise UserError(
                        f"run {self.path} was trained with another {name} (fingerprint "
                        f"{then[:12]}, now {now[:12]}); restore it, or start anew with --fresh"
                    )
            return
        text = to_yaml(self.config).encode()
        facts = facts | {"config_sha256": hashlib.sha256(text).hexdigest()}
        write_durably(self.path / "config.yaml", text)
        write_durably(file, (json.dumps(facts, indent=2) + "\n").encode())

    def close(self) -> None:
        self._lock.close()


def _read_facts(file: Path) -> dict[str, Any]:
    try:
        facts = json.loads(file.read_bytes())
        return {name: str(facts[name]) for name in ("data_fingerprint", "tokenizer_fingerprint")}
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(
            f"{file} is damaged: it is not what a run writes; start anew with --fresh"
        ) from None


def describe_run(config: RunConfig, data: TrainingData, tokenizer: Tokenizer) -> dict[str, Any]:
    """What run.json holds beside the config."""
    return {
        "config_hash": config_hash(config),
        "seed": config.experiment.seed,
        "data_fingerprint": data.fingerprint,
        "data_sets": [
            {
                "name": one.dataset.name,
                "split": one.split.name,
                "fingerprint": one.dataset.fingerprint,
                "path": one.dataset.place,
            }
            for one in data.sets
        ],
        "tokenizer_fingerprint": tokenizer.fingerprint,
        "git_commit": git_commit(),
        "python": platform.python_version(),
        "packages": {name: package_version(name) for name in PACKAGES},
        "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


PACKAGES = ("carillon-engine", "torch", "numpy", "pillow", "tokenizers", "safetensors")


def package_version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"


def git_commit() -> str | None:
    """Commit of the checkout that the package runs from, with + when it has changes; else None."""
    folder = Path(__file__).resolve().parent
    try:
        _git(folder, "ls-files", "--error-unmatch", Path(__file__).name)  # not another's checkout
        head = _git(folder, "rev-parse", "HEAD")
        return head + ("+" if _git(folder, "status", "--porcelain", "-uno") else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def _git(folder: Path, *arguments: str) -> str:
    command = ["git", "-C", str(folder), *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def _check_unchanged(path: Path, tokenizer: Tokenizer) -> None:
    """Raise UserError when config.yaml or tokenizer.json is not what the run was trained with."""
    try:
        facts = json.loads((path / "run.json").read_bytes())
        recorded = str(facts["config_sha256"]), str(facts["tokenizer_fingerprint"])
        now = hashlib.sha256((path / "config.yaml").read_bytes()).hexdigest(), tokenizer.fingerprint
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(
            f"{path / 'run.json'} is missing or damaged: it says what the run was trained with"
        ) from None
    for name, then, here in zip(("config.yaml", "tokenizer.json"), recorded, now, strict=True):
        if then != here:
            raise UserError(
                f"{path / name} is not the file that the run was trained with; restore it"
            )


@dataclass(frozen=True, kw_only=True)
class LoadedRun:
    """A trained model and what it needs, ready for inference."""

    config: RunConfig
    model: DualEncoder
    tokenizer: Tokenizer
    path: Path
    step: int
    checkpoint_hash: str


def find_run(run: str | Path) -> Path:
    """The folder of a run given by path or by name under runs/."""
    for candidate in (Path(run), Path("runs") / run):
        if (candidate / "config.yaml").is_file():
            return candidate
    known = sorted(p.parent.name for p in Path("runs").glob("*/config.yaml"))
    names = f"; runs/ has {', '.join(known[:8])}" if known else ""
    raise UserError(f"{run} is no run (no config.yaml there or under runs/){names}")


def find_checkpoint(path: Path, which: str) -> Checkpoint:
    """`latest`, `best` or a step number among a run's complete checkpoints."""
    found = list_checkpoints(path / "checkpoints")
    if not found:
        raise UserError(f"run {path} has no complete checkpoint yet")
    if which == "latest":
        return found[-1]
    if which == "best":
        scored = [c for c in found if c.state.get("metric") is not None]
        return max(scored, key=lambda c: (c.state["metric"], -c.step)) if scored else found[-1]
    for checkpoint in found:
        if which.isdecimal() and checkpoint.step == int(which):
            return checkpoint
    steps = ", ".join(str(c.step) for c in found)
    raise UserError(f"checkpoint {which!r}: give latest, best or one of the steps {steps}")


_TRACKERS = ("wandb", "mlflow")
_PLACES = ("backend", "device", "fp8_provider")


def read_config(path: Path) -> RunConfig:
    """The config of a run on disk, less what bound it to the machine that trained it."""
    values = read_values(path / "config.yaml")
    for name, portable in (("distributed", _PLACES), ("logging", _TRACKERS)):
        section_values = values.get(name)
        if isinstance(section_values, dict):
            for key in portable:
                section_values.pop(key, None)
    return build(RunConfig, values, source=str(path / "config.yaml"))


def load_run(run: str | Path, *, checkpoint: str = "latest") -> LoadedRun:
    """Open a run for inference: the averaged weights when it kept an average, in eval mode.

    Raises UserError for a path that is no run, a missing or damaged checkpoint.
    """
    path = find_run(run)
    config = read_config(path)
    if not isinstance(config.model, DualEncoderConfig):
        raise UserError(
            f"run {path} trained a {config.model.type}, which embeds nothing; give the run of a "
            "dual encoder. What a decoder scores on held-out rows is in its metrics.jsonl"
        )
    found = find_checkpoint(path, checkpoint)
    found.verify()
    tokenizer = Tokenizer.load(path / "tokenizer.json")
    _check_unchanged(path, tokenizer)
    model = new_dual_encoder(config, tokenizer.vocab_size)
    prefix = "model" if config.optimization.ema_decay is None else "average"
    weights: dict[str, Tensor] = {f"{prefix}.{n}": p for n, p in model.named_parameters()}
    read_tensors(found, {name: value.detach() for name, value in weights.items()}, partial=True)
    return LoadedRun(
        config=config,
        model=model.eval().requires_grad_(False),
        tokenizer=tokenizer,
        path=path,
        step=found.step,
        checkpoint_hash=found.content_hash,
    )
