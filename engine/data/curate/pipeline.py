"""The pipeline file: a name, a few limits and a list of stages, checked before anything is read.

Its hash covers every setting that can change a result, and what stages add to that (the versions of
the models that they run). It names the state of a run, so a run goes on only under the very
pipeline that began it, and stands in the manifest of what comes out.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from carillon.engine.config import UserError, build, read_values, setting, to_values
from carillon.engine.data.curate.catalog import STAGES, AnyStage
from carillon.engine.data.curate.stage import SetStage

SCORES_VERSION = 1  # raised when a stage's scores change without a setting


@dataclass(frozen=True, kw_only=True)
class Pipeline:
    """A whole pipeline file."""

    stages: tuple[AnyStage, ...] = setting(help="The stages, in the order in which they judge.")
    name: str = setting("curate", "Name of the pipeline, for the manifest and the report.")
    seed: int = setting(0, "Seed of choices among equals: balancing, examples.", min=0)
    max_bad_share: float = setting(
        0.1, "Give up when more than this share of items cannot be read or decoded.", min=0, max=1
    )
    damaged: Literal["refuse", "quarantine"] = setting(
        "refuse", "What to do about samples whose bytes do not match their checksum."
    )
    item_timeout_s: float = setting(60.0, "An item that takes longer is quarantined.", min=1)

    def check(self) -> Iterator[str]:
        if not self.stages:
            yield "stages: the list is empty; give at least one stage"
        twice = [label for label, n in Counter(s.label for s in self.stages).items() if n > 1]
        for label in twice:
            yield f"stages: two are called {label!r}; give one of them another `name`"
        for number, stage in enumerate(self.stages):
            for problem in stage.check():
                yield f"stages[{number}] ({stage.label}): {problem}"
            if (absent := stage.missing()) is not None:
                yield f"stages[{number}] ({stage.label}): {absent}"

    @property
    def set_stages(self) -> tuple[int, ...]:
        """The places of stages that compare items."""
        return tuple(i for i, stage in enumerate(self.stages) if isinstance(stage, SetStage))


def load_pipeline(path: str | Path) -> Pipeline:
    """Read a pipeline file. Raises UserError naming every problem in it."""
    values = read_values(path)
    _check_types(values, str(path))
    return build(Pipeline, values, source=str(path))


def pipeline_values(pipeline: Pipeline) -> dict[str, Any]:
    """All settings, defaults included, with what stages add to their identity.

    A key file's place is of one machine; the stage's identity stands for what is in it.
    """
    values = to_values(pipeline)
    for stage, given in zip(pipeline.stages, values["stages"], strict=True):
        given.pop("key_file", None)
        if identity := dict(stage.identity()):
            given["identity"] = identity
    return values


def pipeline_hash(pipeline: Pipeline) -> str:
    """SHA-256 of every setting in canonical JSON."""
    content = {"version": SCORES_VERSION, **pipeline_values(pipeline)}
    del content["item_timeout_s"]
    text = json.dumps(content, sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()


def _check_types(values: Mapping[str, Any], source: str) -> None:
    """A stage without a type would be taken for the first kind; say so instead."""
    stages = values.get("stages")
    for number, stage in enumerate(stages if isinstance(stages, list) else []):
        if not isinstance(stage, Mapping) or "type" not in stage:
            names = ", ".join(sorted(STAGES))
            raise UserError(
                f"{source}: 1 problem\n  stages[{number}]: a stage needs a `type`, one of {names}"
            )
