"""Pass 3: the kept items as a new data set, and the list of those that are not.

Samples are copied in the order of the inputs, with the changes that stages made to their JSON.
What stages say of a kept item stands there under `curation`: `flags` with reasons, `scores` of
stages that annotate. The manifest's source names the parents by fingerprint, the pipeline by hash
and content, and how many items each stage dropped. Where two sets have the same key, the later
item's gets its set's fingerprint behind it.
removed-NNN.parquet lists every dropped, quarantined and flagged item with stage, reason and scores.
Nothing stands under the final name until all is written and synced (shard_writer.py).
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from carillon.engine.config import UserError
from carillon.engine.data.curate.decide import Scored, Verdict, counts_by_stage
from carillon.engine.data.curate.pipeline import Pipeline, pipeline_hash, pipeline_values
from carillon.engine.data.curate.score import DAMAGED, PASSED, UNREADABLE, Part
from carillon.engine.data.samples import RawSample, SampleError
from carillon.engine.data.shards import Dataset, ShardWriter

REMOVED_ROWS = 1_000_000
_BATCH_ROWS = 4096
_WRITTEN = ("key", "reason", "split", "flags", "noted", "changes")

REMOVED_SCHEMA = pa.schema(
    [
        pa.field("dataset", pa.string()),
        pa.field("split", pa.string()),
        pa.field("key", pa.string()),
        pa.field("outcome", pa.string()),  # dropped, quarantined or flagged
        pa.field("stage", pa.string()),
        pa.field("reason", pa.string()),
        pa.field("match", pa.string()),  # the key of the item that it duplicates
        pa.field("scores", pa.string()),  # JSON {stage: {score: value}}
    ]
)


class Curated:
    """All that is known when pass 3 begins."""

    def __init__(
        self,
        pipeline: Pipeline,
        datasets: Sequence[Dataset],
        against: Sequence[Dataset],
        parts: Sequence[Part],
        scored: Scored,
        verdict: Verdict,
    ) -> None:
        self.pipeline, self.datasets, self.against = pipeline, datasets, against
        self.parts, self.scored, self.verdict = parts, scored, verdict
        # Where each part begins among the rows of the joined table.
        self.starts = np.cumsum([0, *(part.end - part.start for part in parts)]).tolist()

    @property
    def num_rows(self) -> int:
        return self.scored.num_rows

    def label(self, place: int) -> str:
        """The name of a stage, or of what pass 1 does without one."""
        if place >= 0:
            return self.pipeline.stages[place].label
        return {UNREADABLE: "unreadable", DAMAGED: "damaged"}[place]

    def place_of(self, row: int) -> tuple[Dataset, Part, int]:
        """Data set, part and row in its split."""
        at = int(np.searchsorted(self.starts, row, side="right")) - 1
        part = self.parts[at]
        sets = [*self.datasets, *self.against]
        return sets[part.source], part, part.start + row - self.starts[at]

    def read(self, row: int) -> RawSample:
        dataset, part, number = self.place_of(row)
        return dataset.splits[part.split].read(number)

    def judged_by(self, place: int) -> Iterator[tuple[int, str, int]]:
        """(row, reason, match) of all that a stage dropped or flagged, in no order of rows."""
        reasons = self.scored.column("reason")
        for row in np.flatnonzero(self.verdict.dropped_by[: self.num_rows] == place).tolist():
            judgement = self.verdict.told.get(row, {}).get(place)
            if judgement is not None:
                yield row, judgement.reason, judgement.match
            else:
                yield row, str(reasons[row].as_py()), -1
        yield from self._flagged_by(place)

    def _flagged_by(self, place: int) -> Iterator[tuple[int, str, int]]:
        for row, places in self.verdict.flagged.items():
            if place in places and self.verdict.dropped_by[row] == PASSED:
                judgement = self.verdict.told[row][place]
                yield row, judgement.reason, judgement.match
        label, row = self.label(place), 0
        for chunk in self.scored.column("flags").slice(0, self.num_rows).chunks:
            for text in chunk.to_pylist():
                if text and self.verdict.dropped_by[row] == PASSED:
                    flags = json.loads(text)
                    if label in flags:
                        yield row, str(flags[label]), -1
                row += 1

    def scores_of(self, row: int) -> dict[str, dict[str, float]]:
        """Scores that pass 1 gave a row, and those by which set stages judged it."""
        scores: dict[str, dict[str, float]] = {}
        for place, stage in enumerate(self.pipeline.stages):
            for name in stage.score_names:
                column = f"score{place}.{name}"
                if column in self.scored.table.column_names:
                    value = self.scored.column(column)[row].as_py()
                    if value is not None:
                        scores.setdefault(stage.label, {})[name] = round(value, 6)
        for place, judgement in self.verdict.told.get(row, {}).items():
            name = self.pipeline.stages[place].score_names[0]
            scores[self.label(place)] = {name: round(judgement.score, 6)}
        return scores


def lineage(curated: Curated) -> dict[str, Any]:
    """What the manifest says of where a set comes from."""
    dropped = curated.verdict.dropped_by[: curated.num_rows]
    return {
        "kind": "curate",
        "parents": [_named(dataset) for dataset in curated.datasets],
        "against": [_named(dataset) for dataset in curated.against],
        "pipeline_hash": pipeline_hash(curated.pipeline),
        "pipeline": pipeline_values(curated.pipeline),
        "items": curated.num_rows,
        "kept": int((dropped == PASSED).sum()),
        "quarantined": int((dropped < PASSED).sum()),
        "dropped": dict(counts_by_stage(curated.pipeline, curated.verdict, curated.num_rows)),
    }


def write_kept(
    curated: Curated, out: Path, *, name: str, attachments: Mapping[str, bytes], overwrite: bool
) -> None:
    """Write the new version. Raises UserError when nothing is kept or the disk refuses."""
    parents = [dataset.path for dataset in curated.datasets]
    refused: dict[int, str] = {}
    with ShardWriter(
        out, name=name, source=lineage(curated), overwrite=overwrite, parents=parents
    ) as writer:
        taken: set[str] = set()
        for row, sample, told in _kept(curated):
            key = sample.key
            refusal = writer.tombstones.refusal_of(key, sample.members)
            if refusal is not None:
                refused[row] = refusal
                continue
            dataset, part, _ = curated.place_of(row)
            if key in taken:
                key = f"{key}-{dataset.fingerprint[:8]}"
            taken.add(key)
            meta = _meta(curated, row, sample, told)
            split = told["split"] or part.split
            try:
                writer.write(key, sample.members, meta, split=split)
            except SampleError as error:
                raise UserError(f"{error}; the pipeline made it unusable") from None
        if refused:
            writer.describe(erased=len(refused))
        for file, data in [*removed_files(curated, refused), *attachments.items()]:
            writer.attach(file, data)


def removed_files(curated: Curated, refused: Mapping[int, str]) -> Iterator[tuple[str, bytes]]:
    """removed-NNN.parquet, at most REMOVED_ROWS rows each; `refused` are rows that no stage dropped
    and that were erased before, with the reason."""
    rows: list[dict[str, Any]] = []
    number = 0
    for row in _removed(curated, refused):
        rows.append(row)
        if len(rows) == REMOVED_ROWS:
            yield _removed_file(number, rows)
            rows, number = [], number + 1
    if rows or not number:
        yield _removed_file(number, rows)


def _removed_file(number: int, rows: list[dict[str, Any]]) -> tuple[str, bytes]:
    buffer = io.BytesIO()
    table = pa.Table.from_pylist(rows, REMOVED_SCHEMA)
    pq.write_table(table, buffer, compression="zstd")
    return f"removed-{number:03d}.parquet", buffer.getvalue()


def _removed(curated: Curated, refused: Mapping[int, str]) -> Iterator[dict[str, Any]]:
    dropped_by = curated.verdict.dropped_by
    for row, told in _rows(curated, np.arange(curated.num_rows)):
        place = int(dropped_by[row])
        judgements = curated.verdict.told.get(row, {})
        if place != PASSED:
            judgement = judgements.get(place)
            reason = judgement.reason if judgement else told["reason"]
            outcome = "dropped" if place >= 0 else "quarantined"
            yield _removed_row(curated, row, outcome, curated.label(place), reason, place)
            continue
        if row in refused:
            yield _removed_row(curated, row, "dropped", "tombstones", refused[row], place)
            continue
        for stage, reason in _flags(curated, row, told).items():
            at = next(i for i, one in enumerate(curated.pipeline.stages) if one.label == stage)
            yield _removed_row(curated, row, "flagged", stage, reason, at)


def _removed_row(
    curated: Curated, row: int, outcome: str, stage: str, reason: str, place: int
) -> dict[str, Any]:
    dataset, part, _ = curated.place_of(row)
    judgement = curated.verdict.told.get(row, {}).get(place)
    match = judgement.match if judgement else -1
    return {
        "dataset": dataset.name,
        "split": part.split,
        "key": curated.scored.column("key")[row].as_py(),
        "outcome": outcome,
        "stage": stage,
        "reason": reason,
        "match": curated.scored.column("key")[match].as_py() if match >= 0 else None,
        "scores": json.dumps(curated.scores_of(row)),
    }


def _kept(curated: Curated) -> Iterator[tuple[int, RawSample, dict[str, Any]]]:
    kept = np.flatnonzero(curated.verdict.dropped_by[: curated.num_rows] == PASSED)
    for row, told in _rows(curated, kept):
        yield row, curated.read(row), told


def _rows(curated: Curated, rows: Any) -> Iterator[tuple[int, dict[str, Any]]]:
    """The written columns of rows, a batch in memory at a time."""
    table = curated.scored.table.select(list(_WRITTEN))
    for start in range(0, len(rows), _BATCH_ROWS):
        batch = rows[start : start + _BATCH_ROWS]
        yield from zip(batch.tolist(), table.take(batch).to_pylist(), strict=True)


def _flags(curated: Curated, row: int, told: Mapping[str, Any]) -> dict[str, str]:
    flags: dict[str, str] = json.loads(told["flags"]) if told["flags"] else {}
    for place in curated.verdict.flagged.get(row, []):
        flags[curated.label(place)] = curated.verdict.told[row][place].reason
    return flags


def _meta(curated: Curated, row: int, sample: RawSample, told: Mapping[str, Any]) -> dict[str, Any]:
    meta = dict(sample.meta)
    if not meta["captions"]:
        del meta["captions"]  # the reader's stand-in for none
    if told["changes"]:
        meta |= json.loads(told["changes"])
    scores = json.loads(told["noted"]) if told["noted"] else {}
    for place in curated.verdict.noted.get(row, []):
        name = curated.pipeline.stages[place].score_names[0]
        judgement = curated.verdict.told[row][place]
        scores[curated.label(place)] = {name: round(judgement.score, 6)}
    said = {"flags": _flags(curated, row, told), "scores": scores}
    if any(said.values()):
        meta["curation"] = {name: value for name, value in said.items() if value}
    return meta


def _named(dataset: Dataset) -> dict[str, Any]:
    return {"name": dataset.name, "fingerprint": dataset.fingerprint}
