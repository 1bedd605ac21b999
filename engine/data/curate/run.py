"""A whole run of curation: check, score, decide, write.

What can be wrong is looked for first: the pipeline, the sets, the place of the output. Scores of a
part are on disk before the next begins, so a run that is killed goes on where it was. Damage and
too many bad items are told before anything of the output is written.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from carillon.engine.config import UserError
from carillon.engine.data.curate.decide import Scored, decide
from carillon.engine.data.curate.pipeline import Pipeline, pipeline_hash
from carillon.engine.data.curate.report import REPORT_NAME, report_html
from carillon.engine.data.curate.score import DAMAGED, PASSED, UNREADABLE, Part
from carillon.engine.data.curate.state import State, parts_of, run_identity
from carillon.engine.data.curate.workers import Job, score_parts
from carillon.engine.data.curate.write import Curated, write_kept
from carillon.engine.data.manifest import FORMAT, MANIFEST_NAME
from carillon.engine.data.publish import check_target, json_of
from carillon.engine.data.shards import Dataset, open_dataset

Scorer = Callable[[Job, Sequence[Part], Callable[[Part], None]], None]


@dataclass(frozen=True, kw_only=True)
class CurateOptions:
    """How to run; none of it changes what comes out."""

    workers: int = 1
    memory_limit_bytes: int = 8 << 30
    overwrite: bool = False
    scorer: Scorer | None = None  # another way to score parts, such as Ray's


def curate(
    pipeline: Pipeline,
    sources: Sequence[str],
    out: Path,
    *,
    against: Sequence[str] = (),
    name: str | None = None,
    options: CurateOptions | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> tuple[Dataset, Curated]:
    """Curate data sets into a new one; returns it and what was decided.

    Raises UserError for sets that cannot be read or are damaged, too many bad items, an `out` that
    exists or lies inside a source, or a disk that refuses.
    """
    options = options or CurateOptions()
    _check(out, sources, against, options)
    datasets = [open_dataset(source) for source in sources]
    evaluations = [open_dataset(source) for source in against]
    _check_sets(datasets, evaluations, pipeline)
    state = State(out, run_identity(pipeline_hash(pipeline), datasets, evaluations))
    try:
        state.clear_partial_outputs(out)
        parts = parts_of([*datasets, *evaluations])
        job = Job(
            pipeline,
            tuple(str(Path(source).absolute()) for source in [*sources, *against]),
            len(datasets),
            state.folder,
            options.memory_limit_bytes,
        )
        _score(job, parts, state, options, progress)
        curated = _decided(pipeline, datasets, evaluations, parts, state)
        _judge(curated)
        page = report_html(curated).encode("utf-8", "replace")
        state.begin_writing(out)
        write_kept(
            curated,
            out,
            name=name or out.absolute().name,
            attachments={REPORT_NAME: page},
            overwrite=options.overwrite,
        )
        state.remove()
        return open_dataset(out), curated
    finally:
        state.close()


def _score(
    job: Job,
    parts: Sequence[Part],
    state: State,
    options: CurateOptions,
    progress: Callable[[int, int], None],
) -> None:
    missing = [part for part in parts if not state.is_scored(part)]
    total = sum(part.end - part.start for part in parts)
    counted = total - sum(part.end - part.start for part in missing)
    progress(counted, total)

    def done(part: Part) -> None:
        nonlocal counted
        counted += part.end - part.start
        progress(counted, total)

    if not missing:
        return
    if options.scorer is not None:
        options.scorer(job, missing, done)
    else:
        score_parts(job, missing, workers=options.workers, done=done)


def _decided(
    pipeline: Pipeline,
    datasets: Sequence[Dataset],
    evaluations: Sequence[Dataset],
    parts: Sequence[Part],
    state: State,
) -> Curated:
    own = [part for part in parts if part.source < len(datasets)]
    others = [part for part in parts if part.source >= len(datasets)]
    scored = Scored.of(state.tables(own), state.tables(others))
    verdict = decide(pipeline, scored)
    return Curated(pipeline, datasets, evaluations, parts, scored, verdict)


def _judge(curated: Curated) -> None:
    """Raise UserError for damage, for too many bad items, and when nothing is left."""
    dropped_by = curated.verdict.dropped_by[: curated.num_rows]
    reasons = curated.scored.column("reason")
    damaged = np.flatnonzero(dropped_by == DAMAGED)
    if len(damaged) and curated.pipeline.damaged == "refuse":
        dataset, part, _ = curated.place_of(int(damaged[0]))
        key = curated.scored.column("key")[int(damaged[0])].as_py()
        raise UserError(
            f"{dataset.path}: {len(damaged):,} samples do not match their checksums, first {key!r} "
            f"of {part.split}: {reasons[int(damaged[0])].as_py()}. Nothing was written. Copy the "
            "set again, or set `damaged: quarantine` to go on without them."
        )
    bad = np.flatnonzero(dropped_by <= UNREADABLE)
    if len(bad) > curated.pipeline.max_bad_share * curated.num_rows:
        found = Counter(reasons[int(row)].as_py() for row in bad[:10_000]).most_common(3)
        listed = "; ".join(f"{reason} ({count:,})" for reason, count in found)
        raise UserError(
            f"{len(bad):,} of {curated.num_rows:,} items cannot be used, above max_bad_share "
            f"{curated.pipeline.max_bad_share:g}. Nothing was written. Reasons: {listed}."
        )
    if not (dropped_by == PASSED).any():
        raise UserError("the pipeline keeps no item at all, so nothing was written")


def _check(
    out: Path, sources: Sequence[str], against: Sequence[str], options: CurateOptions
) -> None:
    if not sources:
        raise UserError("no data set is given")
    if options.workers < 1:
        raise UserError(f"--workers {options.workers}: at least one process is needed")
    check_target(out, "data set", _is_data_set, overwrite=options.overwrite)
    place = out.resolve()
    for given in [*sources, *against]:
        source = Path(given).resolve()
        if source == place or source in place.parents or place in source.parents:
            raise UserError(
                f"--out {out} and {given} lie inside each other. Nothing was removed: a version "
                "is never written over or into what it is made of."
            )


def _check_sets(
    datasets: Sequence[Dataset], evaluations: Sequence[Dataset], pipeline: Pipeline
) -> None:
    for dataset in [*datasets, *evaluations]:
        if not any(len(split) for split in dataset.splits.values()):
            raise UserError(f"{dataset.path} has no samples")
    seen: dict[str, Any] = {}
    for dataset in datasets:
        if dataset.fingerprint in seen:
            raise UserError(
                f"{dataset.path} and {seen[dataset.fingerprint]} hold the same bytes; give one"
            )
        seen[dataset.fingerprint] = dataset.path
    if evaluations and not pipeline.set_stages:
        raise UserError(
            "--against compares by a duplicates stage, and the pipeline has none; add for example "
            "`- type: near_pictures`"
        )


def _is_data_set(folder: Path) -> bool:
    return json_of(folder / MANIFEST_NAME).get("format") == FORMAT
