"""Pass 2: who stays, from the tables of all parts alone.

Stages are gone through in the order of the pipeline. A stage that compares items sees all that no
stage before it dropped; those that a later stage drops are still there. So what is kept follows
from the data and the pipeline, whoever scored the parts. Memory is some 300 bytes an item, and for
a while that of one stage's vectors; signatures stay on disk until they are taken.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from carillon.engine.data.curate.pipeline import Pipeline
from carillon.engine.data.curate.score import PASSED
from carillon.engine.data.curate.stage import Population, SetStage


class Judgement(NamedTuple):
    """What a set stage says of one row, in words of `explain`; `match` is another row or -1."""

    reason: str
    score: float
    match: int


@dataclass
class Verdict:
    """For every row of the inputs: what dropped it, and what set stages say.

    `told` has the judgements of set stages by row and stage, of dropped and of flagged rows.
    """

    dropped_by: Any
    told: dict[int, dict[int, Judgement]] = field(default_factory=dict)
    flagged: dict[int, list[int]] = field(default_factory=dict)
    noted: dict[int, list[int]] = field(default_factory=dict)


@dataclass(frozen=True)
class Scored:
    """The tables of all parts as one; rows of evaluation sets come last."""

    table: pa.Table
    num_rows: int  # of the data sets, without evaluation sets

    @classmethod
    def of(cls, tables: Sequence[pa.Table], against: Sequence[pa.Table]) -> Scored:
        joined = pa.concat_tables([*tables, *against])
        return cls(joined, sum(map(len, tables)))

    def column(self, name: str) -> Any:
        return self.table.column(name)

    @property
    def is_evaluation(self) -> Any:
        return np.arange(len(self.table)) >= self.num_rows


def decide(pipeline: Pipeline, scored: Scored) -> Verdict:
    """The verdict over all rows."""
    dropped_by = scored.column("dropped_by").to_numpy().astype(np.int64)
    verdict = Verdict(dropped_by)
    quality = scored.column("quality").to_numpy()
    # Whom pass 1 drops at a later stage is still there for an earlier one.
    for place in pipeline.set_stages:
        stage = pipeline.stages[place]
        assert isinstance(stage, SetStage)
        there = (dropped_by == PASSED) | (dropped_by > place)
        if stage.contaminated == "ignore":
            there &= ~scored.is_evaluation
        rows = np.flatnonzero(there)
        population = Population(
            keys=scored.column("key").take(rows),
            signatures=scored.column(f"signature{place}"),
            quality=quality[rows],
            is_evaluation=scored.is_evaluation[rows],
            seed=pipeline.seed,
            places=rows,
        )
        for row, judgement, is_contaminated in _judgements(stage, population, rows):
            action = stage.contaminated if is_contaminated else stage.action
            verdict.told.setdefault(row, {})[place] = judgement
            if action == "drop":
                dropped_by[row] = place
            else:
                (verdict.flagged if action == "flag" else verdict.noted).setdefault(row, []).append(
                    place
                )
    return verdict


def _judgements(
    stage: SetStage, population: Population, rows: Any
) -> Iterator[tuple[int, Judgement, bool]]:
    decisions = stage.decide(population)
    for local, score, match in zip(
        decisions.rows.tolist(), decisions.scores.tolist(), decisions.matches.tolist(), strict=True
    ):
        key = str(population.keys[match]) if match >= 0 else None
        is_evaluation = match >= 0 and bool(population.is_evaluation[match])
        reason = stage.explain(score, key, is_evaluation=is_evaluation)
        other = int(rows[match]) if match >= 0 else -1
        yield int(rows[local]), Judgement(reason, score, other), is_evaluation


def counts_by_stage(pipeline: Pipeline, verdict: Verdict, num_rows: int) -> Mapping[str, int]:
    """How many items each stage dropped, in the order of the pipeline."""
    dropped = verdict.dropped_by[:num_rows]
    return {
        stage.label: int((dropped == place).sum()) for place, stage in enumerate(pipeline.stages)
    }
