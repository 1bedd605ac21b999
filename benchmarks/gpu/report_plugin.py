"""A pytest plugin of kernel_tests.py: a line a test, as it begins and as it ends.

A process that hangs or dies is so known by its last test. An error that leaves the GPU's context
unusable ends the session: the next one leaves out what is done.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from records import append, read
from watched import end_with_parent

end_with_parent()
_LINES = Path(os.environ["CARILLON_TEST_LINES"])
_TAIL = 1500
_LOST = ("CUDA error", "AcceleratorError")


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    done = {line["id"] for line in read(_LINES) if line["event"] == "begin"}
    items[:] = [item for item in items if item.nodeid not in done]


def pytest_collectreport(report: pytest.CollectReport) -> None:
    if report.failed:
        said = str(report.longrepr)[-_TAIL:]
        append(_LINES, "end", id=report.nodeid, outcome="failed", said=said)


def pytest_runtest_logstart(nodeid: str, location: Any) -> None:
    append(_LINES, "begin", id=nodeid)


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.when == "call" or not report.passed:
        said = "" if report.passed else str(report.longrepr)[-_TAIL:]
        append(_LINES, "end", id=report.nodeid, outcome=report.outcome, said=said)


@pytest.hookimpl(trylast=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> None:
    if call.excinfo is not None and any(
        words in f"{call.excinfo.typename}: {call.excinfo.value}" for words in _LOST
    ):
        item.session.shouldstop = "the GPU's context is lost"
