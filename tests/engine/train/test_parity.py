"""One step, every layout: the cases of the parity table, run as `make parity` runs them."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from carillon.engine.parallel.config import ZERO_BUBBLE
from carillon.engine.parallel.parity import TOLERANCE_FP32, gradient_errors
from carillon.engine.train.parity.__main__ import ERRORS, launch, markdown
from carillon.engine.train.parity.columns import COLUMNS, DECODERS
from carillon.engine.train.parity.rows import ROWS, Row
from carillon.engine.train.parity.step import Variant

PAGE = Path(__file__).parents[3] / "docs" / "parity.md"
SIZES = sorted({row.size for row in ROWS})


def cases(rows: tuple[Row, ...]) -> set[tuple[str, str, str]]:
    return {(row.name, column, variant.name) for row in rows for column, variant in row.cases}


@pytest.mark.parametrize("size", SIZES)
def test_layouts_give_the_step_of_one_process(size: int) -> None:
    results = launch(size, tested_only=True)  # `make parity` runs all cases
    rows = tuple(row for row in ROWS if row.size == size)
    wanted = {(row.name, column, variant.name) for row in rows for column, variant in row.tested}
    assert {(r["row"], r["column"], r["variant"]) for r in results} == wanted
    assert {column for _, column, _ in wanted} == set(COLUMNS)
    worse = [r for r in results if not max(r[error] for error in ERRORS) <= TOLERANCE_FP32]
    assert not worse, worse
    assert max(r["gradient"] for r in results) > 0  # rounding differs: it was really split
    for result in results:  # all but norms, positions, patches and projections is split
        ways = (int(way) for way in re.findall(r"(?:PP|TP|FSDP|EP|HSDP 2x)(\d)", result["row"]))
        split = 1
        for way in ways:
            split *= way
        whole_tower = 0.5 if "whole" in result["row"] else 0.25
        assert result["held"] < 1 / split + whole_tower * (split > 1) + 1e-9, result
        row = next(row for row in rows if row.name == result["row"])
        assert_did(result, row, next(v for v in row.variants if v.name == result["variant"]))
    kept = {(r["row"], r["column"]): r["kept_bytes"] for r in results if r["variant"] == "plain"}
    for (row, column), kept_bytes in kept.items():  # by tokens less is kept for the backward pass
        plain = row.replace("+SP", ""), column
        if row.endswith("+SP") and "x" not in row and plain in kept:
            assert kept_bytes < kept[plain], row


def assert_did(result: dict[str, Any], row: Row, variant: Variant) -> None:
    """That the main process took the row's schedule and exchange: all give one result."""
    if variant.compile:  # not looked at
        return
    did = result["did"]
    told = (row.name, variant.name, did)
    assert bool(did["recomputed"]) == variant.recompute, told
    pp, schedule = row.settings.get("pp", 1), row.settings.get("pp_schedule", "1f1b")
    if pp > 1:
        looped = [0, 2 * pp - 1] if schedule == "zbv" else [0, pp]
        assert did["stages"] == ([0] if schedule in ("gpipe", "1f1b") else looped), told
        assert bool(did["weight_passes"]) == (schedule in ZERO_BUBBLE), told
        if schedule == "gpipe":
            assert did["ahead"] == 2 * pp, told  # all microbatches
        elif schedule == "1f1b":
            assert did["ahead"] == pp, told
    method = row.settings.get("cp_method", "ring") if "cp" in row.settings else None
    if pp == 1:  # some schedules send in other ways
        ring = method == "ring" or variant.exchange == "ring"
        assert bool(did["sends"]) == ring, told
    if result["column"] in DECODERS:  # the contrastive loss has exchanges of its own
        assert bool(did["all_to_all"]) == ("ep" in row.settings or method == "ulysses"), told


def test_the_page_is_of_these_cases() -> None:
    results: list[dict[str, Any]] = json.loads(PAGE.with_suffix(".json").read_text())
    assert {(r["row"], r["column"], r["variant"]) for r in results} == cases(ROWS)
    assert all(max(r[error] for error in ERRORS) <= TOLERANCE_FP32 for r in results)
    assert PAGE.read_text() == markdown(results), "make parity writes it"


def test_the_measure_sees_a_wrong_gradient_and_forgives_a_zero_one() -> None:
    reference = {"a": torch.ones(100), "key_bias": torch.full((10,), 1e-9)}
    same = gradient_errors({"a": torch.ones(100), "key_bias": torch.zeros(10)}, reference)
    assert same["a"] == 0.0
    assert same["key_bias"] < TOLERANCE_FP32
    wrong = gradient_errors({"a": torch.ones(100) * 1.001, "key_bias": torch.zeros(10)}, reference)
    assert wrong["a"] == pytest.approx(1e-3, rel=1e-4)
    with pytest.raises(ValueError, match="different tensors"):
        gradient_errors({"a": torch.ones(1)}, reference)
