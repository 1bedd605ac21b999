"""Writes a run's rows while it trains, and never stops it.

Policy: the registry must work when a run starts, or the start fails with one message. After that a
write that fails is logged as a warning and kept; it is tried again, in order, at the next write and
at the end. What is still missing then is named in a last warning: the run folder has it all, only
the registry lacks it. A locked database delays a write by at most the lock timeout.
"""

import logging
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from carillon.engine.data.config import JoinConfig
from carillon.engine.data.training_data import OpenedSet
from carillon.engine.registry.database import RegistryError
from carillon.engine.registry.datasets import superseded
from carillon.engine.registry.store import Registry, RunDataset

logger = logging.getLogger("carillon")


class PendingWrite(NamedTuple):
    """A write that has not succeeded yet."""

    what: str
    write: Callable[[], object]


class RunRecorder:
    """One run's rows. Safe to use from the thread that saves checkpoints."""

    def __init__(self, registry: Registry, run_id: int) -> None:
        self.registry = registry
        self.run_id = run_id
        self._pending: list[PendingWrite] = []
        self._lock = threading.Lock()

    @classmethod
    def start(
        cls,
        location: str | Path,
        *,
        sets: Sequence[OpenedSet],
        name: str,
        config_hash: str,
        params: Mapping[str, Any],
        artifacts_uri: str | Path,
        git_commit: str | None = None,
        fresh: bool = False,
    ) -> "RunRecorder":
        """Opens the registry and records the data sets and the run as running.

        Raises:
            RegistryError: the registry cannot be opened or written.
        """
        registry = Registry.open(location)
        for one in sets:
            registry.record_dataset(one.dataset)
        for row in superseded(registry, [one.dataset.fingerprint for one in sets]):
            logger.warning(
                "the data set %s (%s) is superseded: items were erased from it; "
                "`carillon data lineage %s` names the version to train on",
                row.name,
                row.source_uri,
                row.fingerprint[:12],
            )
        run_id = registry.start_run(
            name,
            config_hash=config_hash,
            params=params,
            artifacts_uri=artifacts_uri,
            datasets=[_read_by_run(one) for one in sets],
            git_commit=git_commit,
            fresh=fresh,
        )
        return cls(registry, run_id)

    def progress(self, step: int, metrics: Mapping[str, Any]) -> None:
        """How far the run is; a later call takes the place of one that is still pending."""
        values = dict(metrics)
        with self._lock:
            self._pending = [item for item in self._pending if item.what != "progress"]
        self._write("progress", lambda: self.registry.update_run(self.run_id, step, values))

    def checkpoint(
        self,
        step: int,
        *,
        uri: str | Path,
        content_hash: str,
        val_metrics: Mapping[str, Any] | None = None,
    ) -> None:
        """A checkpoint that is complete on disk."""
        metrics = dict(val_metrics or {})
        self._write(
            f"checkpoint {step}",
            lambda: self.registry.add_checkpoint(
                self.run_id, step, uri=uri, content_hash=content_hash, val_metrics=metrics
            ),
        )

    def finish(self, status: str) -> None:
        """The run's end: 'finished', 'failed' or 'interrupted'."""
        self._write("end", lambda: self.registry.finish_run(self.run_id, status))
        if self._pending:
            missing = ", ".join(item.what for item in self._pending)
            logger.warning("the registry lacks this run's %s; the run folder has it", missing)

    def _write(self, what: str, write: Callable[[], object]) -> None:
        with self._lock:
            self._pending.append(PendingWrite(what, write))
            while self._pending:
                try:
                    self._pending[0].write()
                except RegistryError as error:
                    logger.warning(
                        "%s; %d writes wait, training goes on", error, len(self._pending)
                    )
                    return
                self._pending.pop(0)


def _read_by_run(one: OpenedSet) -> RunDataset:
    start = one.config.from_position if isinstance(one.config, JoinConfig) else 0
    return RunDataset(one.dataset.fingerprint, one.name, one.split.name, start)
