"""Scoring parts by Ray Data, past one machine: the same function of the same parts.

Each of Ray's actors keeps one worker process of workers.py, which watches over hostile items there
as it does here. Tables are written where the driver's state folder is, so all machines need the
same paths to the data and to the output's folder. What is decided and written afterwards is done by
the driver, so the kept set is the same to the byte. Comes with the extra [ray].
"""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Callable, Sequence
from typing import Any

from carillon.engine.config import UserError
from carillon.engine.data.curate.run import Scorer
from carillon.engine.data.curate.score import Part
from carillon.engine.data.curate.workers import Crew, Job


def _part_scorer(job: Job) -> type[Any]:
    """What an actor runs: made once, called with a part at a time.

    The job is part of the class, so that an actor which is started again has it too; constructor
    arguments live in an object store, from which they may be lost.
    """

    class PartScorer:
        def __init__(self) -> None:
            self._crew = Crew(job, workers=1)

        def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
            numbers = {name: int(row[name]) for name in ("number", "source", "start", "end")}
            # Ray may run a call again after a machine was lost: the table is the same.
            self._crew.score([Part(split=str(row["split"]), **numbers)], done=lambda _: None)
            return row

    return PartScorer


def ray_scorer(address: str, workers: int) -> Scorer:
    """A scorer by a Ray cluster; `local` starts one on this machine. Raises UserError."""
    if importlib.util.find_spec("ray") is None:
        raise UserError('--ray needs Ray Data: pip install "carillon-engine[ray]"')

    def score(job: Job, parts: Sequence[Part], done: Callable[[Part], None]) -> None:
        import ray
        import ray.data

        for name in ("ray", "ray.data"):  # they report plans and settings
            logging.getLogger(name).setLevel(logging.ERROR)
        ray.init(
            address=None if address == "local" else address,
            num_cpus=workers if address == "local" else None,
            include_dashboard=False,
            log_to_driver=False,
            logging_level=logging.ERROR,
        )
        try:
            ray.data.DataContext.get_current().enable_progress_bars = False
            rows = ray.data.from_items(
                [part._asdict() for part in parts], override_num_blocks=len(parts)
            )
            scored = rows.map(
                _part_scorer(job),
                compute=ray.data.ActorPoolStrategy(min_size=1, max_size=workers),
                num_cpus=1,
            )
            for row in scored.iter_rows():
                done(Part(**row))
        finally:
            ray.shutdown()

    return score
