"""Scores a model on the sets that a config names, in training or by `carillon eval run`.

Pictures of a set are encoded once and shared by its languages. Nothing here knows of processes: a
trainer calls it where it wants the numbers. `carillon eval run` leaves evaluation.json and
retrieval.png in the run; with options that change what is scored, files of other names beside them
and registry rows of other names. Left out: captioning, questions, grounding.
"""

import argparse
import hashlib
import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from carillon.engine.config import UserError, section, setting
from carillon.engine.data.config import DataConfig
from carillon.engine.data.publish import publish_file
from carillon.engine.data.tokenizer import Tokenizer
from carillon.engine.eval.scoring import (
    DIRECTIONS,
    METRICS,
    EncodedSet,
    Resampling,
    encode_set,
    score_set,
    score_zeroshot,
)
from carillon.engine.eval.sets import (
    RetrievalSetConfig,
    ZeroShotSetConfig,
    choose_items,
    default_retrieval_sets,
)
from carillon.engine.index.encoder import Encoder, run_encoder
from carillon.engine.index.source import choose_split
from carillon.engine.models.towers.dual_encoder import DualEncoder

if TYPE_CHECKING:
    from carillon.engine.train.run import LoadedRun

OnEncoded = Callable[[str, EncodedSet, RetrievalSetConfig], None]


@dataclass(frozen=True, kw_only=True)
class InTrainingConfig:
    """`evaluation.in_training`: the shorter evaluation that runs every n steps."""

    every: int = setting(0, "Steps between evaluations; 0: none during training.", min=0)
    sets: tuple[str, ...] = setting((), "Names of retrieval sets; empty: the first one.")
    languages: tuple[str, ...] = setting((), "Languages to score; empty: as the set says.")
    max_queries: int = setting(500, "Pictures per language.", min=2)


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    """`evaluation`: what a model is scored on."""

    retrieval: dict[str, RetrievalSetConfig] = setting(
        {}, "Retrieval sets by name; none: held-out rows and every split not trained on."
    )
    zeroshot: dict[str, ZeroShotSetConfig] = setting({}, "Zero-shot sets by name.")
    in_training: InTrainingConfig = section(InTrainingConfig)
    bootstrap_samples: int = setting(1000, "Resamples behind each 95% interval.", min=1)
    batch_size: int = setting(128, "Pictures or texts encoded at once.", min=1)
    seed: int = setting(0, "Fixes the choice of items and the resamples.", min=0)

    def check(self) -> list[str]:
        unknown = [n for n in self.in_training.sets if self.retrieval and n not in self.retrieval]
        known = ", ".join(self.retrieval)
        return [f"in_training.sets: {name} is not among {known}" for name in unknown]


def evaluate(
    encoder: Encoder,
    config: EvaluationConfig,
    data: DataConfig,
    *,
    retrieval: Mapping[str, RetrievalSetConfig],
    zeroshot: Mapping[str, ZeroShotSetConfig],
    on_encoded: OnEncoded | None = None,
) -> dict[str, Any]:
    """Score the sets given as a JSON-able dict.

    Keys: retrieval -> set -> languages -> language -> direction -> metric, with means; zeroshot.
    Raises: UserError for sets that cannot be read, ValueError for a model that gives no numbers.
    """
    resampling = Resampling(config.bootstrap_samples, config.seed)
    results: dict[str, Any] = {"retrieval": {}, "zeroshot": {}}
    for name, one in retrieval.items():
        encoded = encode_set(encoder, one, data, seed=config.seed)
        results["retrieval"][name] = score_set(encoded, one, resampling)
        if on_encoded is not None:
            on_encoded(name, encoded, one)
    for name, classes in zeroshot.items():
        results["zeroshot"][name] = score_zeroshot(encoder, classes, data, resampling)
    return results


def evaluate_in_training(
    model: DualEncoder,
    tokenizer: Tokenizer,
    config: EvaluationConfig,
    data: DataConfig,
    *,
    bf16: bool = False,
    before_batch: Callable[[], None] | None = None,
) -> dict[str, float]:
    """The shorter evaluation as flat metrics, `retrieval/SET/DIRECTION/METRIC`, means of languages.

    `retrieval/mean_r@10`, over sets and directions, is what keep-best compares. The model's
    training mode is restored. `before_batch` is called before each batch of pictures or texts and
    may end the evaluation by raising. Raises: as evaluate.
    """
    sets = in_training_sets(config, data)
    encoder = Encoder(
        model,
        tokenizer,
        context=data.augment.text.max_len,
        bf16=bf16,
        batch_size=config.batch_size,
        before_batch=before_batch,
    )
    was_training = model.training
    model.eval()
    try:
        return flat_means(evaluate(encoder, config, data, retrieval=sets, zeroshot={}))
    finally:
        model.train(was_training)


def in_training_sets(config: EvaluationConfig, data: DataConfig) -> dict[str, RetrievalSetConfig]:
    """The sets of the shorter evaluation. Raises: UserError for a name that is no set."""
    short = config.in_training
    known = retrieval_sets(config, data)
    names = short.sets or tuple(known)[:1]
    missing = [name for name in names if name not in known]
    if missing or not names:
        listed = ", ".join(known) or "none: set data.validation_every or evaluation.retrieval"
        raise UserError(f"evaluation.in_training.sets: {missing or names} given, there is {listed}")
    return {name: shortened(known[name], short.languages, short.max_queries) for name in names}


def check_in_training(config: EvaluationConfig, data: DataConfig) -> None:
    """Choose the items of the shorter evaluation once, before training has cost anything.

    Raises: UserError for a set, a split or a language that is not there.
    """
    if config.in_training.every:
        for one in in_training_sets(config, data).values():
            choose_items(one, data, seed=config.seed)


def retrieval_sets(config: EvaluationConfig, data: DataConfig) -> dict[str, RetrievalSetConfig]:
    """The config's retrieval sets, or those that the training data offers."""
    return dict(config.retrieval) or default_retrieval_sets(data)


def shortened(
    one: RetrievalSetConfig, languages: Sequence[str], max_queries: int | None
) -> RetrievalSetConfig:
    """The set with other languages, if any are given, and at most `max_queries` pictures."""
    changed = {
        "languages": tuple(languages) or one.languages,
        "max_queries": min(one.max_queries, max_queries or one.max_queries),
    }
    return RetrievalSetConfig(**{**vars(one), **changed})


def flat_means(results: Mapping[str, Any]) -> dict[str, float]:
    """Means over languages by set and direction, and `retrieval/mean_r@10` over those."""
    flat = {
        f"retrieval/{name}/{direction}/{metric}": float(one["mean"][direction][metric]["value"])
        for name, one in results["retrieval"].items()
        for direction in DIRECTIONS
        for metric in METRICS
    }
    tens = [value for name, value in flat.items() if name.endswith("/r@10")]
    return flat | ({"retrieval/mean_r@10": sum(tens) / len(tens)} if tens else {})


def evaluate_run(
    run: "LoadedRun",
    *,
    sets: Sequence[str] = (),
    extra: RetrievalSetConfig | None = None,
    languages: Sequence[str] = (),
    max_queries: int | None = None,
    on_encoded: OnEncoded | None = None,
) -> dict[str, Any]:
    """Score a run's checkpoint on its config's sets, some of them, or the `extra` set alone.

    Raises: UserError for an unknown set, and as evaluate.
    """
    config, data = run.config.evaluation, run.config.data
    known: dict[str, RetrievalSetConfig] = {}
    if extra is None:
        known = retrieval_sets(config, data)
    unknown = [name for name in sets if name not in known and name not in config.zeroshot]
    if unknown and extra is None:
        listed = ", ".join([*known, *config.zeroshot]) or "none"
        raise UserError(f"--set {unknown[0]}: the run's sets are {listed}")
    chosen = known if extra is None else {sets[0] if sets else "data": extra}
    if sets and extra is None:
        chosen = {name: one for name, one in known.items() if name in sets}
    zeroshot = {
        name: one
        for name, one in config.zeroshot.items()
        if extra is None and (not sets or name in sets)
    }
    started = time.time()
    results = evaluate(
        run_encoder(run, batch_size=config.batch_size),
        config,
        data,
        retrieval={n: shortened(one, languages, max_queries) for n, one in chosen.items()},
        zeroshot=zeroshot,
        on_encoded=on_encoded,
    )
    return {
        "run": run.path.name,
        "step": run.step,
        "checkpoint_hash": run.checkpoint_hash,
        "evaluated": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(started)),
        "wall_s": round(time.time() - started, 1),
        **results,
    }


EXAMPLES = """examples:
  carillon eval run emoji-1a2b3c4d
  carillon eval run emoji-1a2b3c4d --checkpoint best --set heldout_vendor --languages en,fr,ar
  carillon eval run emoji-1a2b3c4d --data data/my-photos --split all --max-queries 500 --json

The results go to RUN/evaluation.json and the registry. With --set, --data, --split, --languages or
--max-queries they go to RUN/evaluation-HASH.json instead, HASH being that of the options, and rows
that are not of a whole set enter the registry under a name with the data and the options.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", help="a run folder, or its name under runs/")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        dest="sets",
        metavar="NAME",
        help="score this set of the config only; may be repeated (default: all)",
    )
    parser.add_argument(
        "--checkpoint", default="latest", help="latest, best or a step (default latest)"
    )
    parser.add_argument("--data", default=None, help="score another data set instead")
    parser.add_argument("--split", default=None, help="its split, or one of the training data")
    parser.add_argument(
        "--languages", default="", help="as in en,fr, or all (default: as the set says)"
    )
    parser.add_argument(
        "--max-queries", type=int, default=None, help="at most so many pictures per language"
    )
    parser.add_argument("--json", action="store_true", help="print the results as JSON")


def main(args: argparse.Namespace) -> int:
    from carillon.engine.eval.report import RetrievalPicture
    from carillon.engine.train.run import load_run

    if args.max_queries is not None and args.max_queries < 2:
        raise UserError(f"--max-queries {args.max_queries}: at least 2 pictures are needed")
    languages = tuple(code.strip() for code in args.languages.split(",") if code.strip())
    run = load_run(args.run, checkpoint=args.checkpoint)
    if not os.access(run.path, os.W_OK):
        raise UserError(
            f"the folder {run.path} cannot be written, and the results go there; "
            "evaluate a copy of it"
        )
    extra, scope = None, _narrowing(languages, args.max_queries)
    if args.data is not None or args.split is not None:
        extra = RetrievalSetConfig(path=args.data, split=args.split)
        scope = [*_data_scored(args.data, args.split, run.config.data), *scope]
    suffix = _file_suffix([*(f"set={name}" for name in sorted(set(args.sets))), *scope])
    file = run.path / f"evaluation{suffix}.json"
    picture = RetrievalPicture(run.path / f"retrieval{suffix}.png")
    results = evaluate_run(
        run,
        sets=args.sets,
        extra=extra,
        languages=languages,
        max_queries=args.max_queries,
        on_encoded=picture.draw_first,
    )
    if suffix:
        results["options"] = {"sets": args.sets, "scope": scope}
    write_results(file, results)
    note = record_results(run, results, scope)
    if args.json:
        print(json.dumps(results, ensure_ascii=False, indent=2))
    else:
        _print_results(results, file, [*picture.notes, *note])
    return 0


def _narrowing(languages: Sequence[str], max_queries: int | None) -> list[str]:
    """The options that make a set's numbers others than those of the config, as `name=value`."""
    given = [f"languages={','.join(languages)}"] if languages else []
    return [*given, f"max-queries={max_queries}"] if max_queries is not None else given


def _data_scored(path: str | None, split: str | None, data: DataConfig) -> list[str]:
    """The data and split scored in place of the config's sets, as `name=value`."""
    dataset, chosen = choose_split(path, split, data)
    return [f"data={dataset.name}@{dataset.fingerprint[:12]}", f"split={chosen.name}"]


def _file_suffix(options: Sequence[str]) -> str:
    """What tells the files of these options from others; empty for the full evaluation."""
    return f"-{hashlib.sha256(json.dumps(options).encode()).hexdigest()[:8]}" if options else ""


def write_results(path: Path, results: Mapping[str, Any]) -> None:
    """Write the results whole or not at all. Raises: UserError when they cannot be written."""
    publish_file(path, (json.dumps(results, ensure_ascii=False, indent=2) + "\n").encode())


def record_results(
    run: "LoadedRun", results: Mapping[str, Any], scope: Sequence[str] = ()
) -> list[str]:
    """Enter each set's result in the run's registry; returns what the user should be told.

    With a `scope`, of other data or a part of a set, rows are named for it and stand beside those
    of the whole sets. The results are in a file already, so a registry that cannot take them stops
    nothing.
    """
    from carillon.engine.registry.database import RegistryError
    from carillon.engine.registry.store import Registry

    location = run.config.logging.registry or run.path.parent / "registry.sqlite"
    scored = f" ({' '.join(scope)})" if scope else ""
    try:
        registry = Registry.open(location, create=False)
        for task in ("retrieval", "zeroshot"):
            for name, result in results[task].items():
                registry.add_evaluation(run.checkpoint_hash, f"{task}/{name}{scored}", result)
    except RegistryError as error:
        return [f"not entered in the registry: {error}"]
    return []


def _print_results(results: Mapping[str, Any], file: Path, notes: Sequence[str]) -> None:
    from carillon.engine.eval.table import print_tables

    print_tables(results)
    for note in notes:
        print(note)
    print(f"results: {file}")
