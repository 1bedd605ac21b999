"""Cuts pytest-benchmark's JSON down to what a claim of speed needs.

A row of race.py says all of itself; others get their parameters and the median.
"""

from __future__ import annotations

from typing import Any

from record import circumstances


def pytest_benchmark_update_json(
    config: Any, benchmarks: list[Any], output_json: dict[str, Any]
) -> None:
    rows = []
    for entry in output_json["benchmarks"]:
        row = {"name": entry["name"], "rounds": entry["stats"]["rounds"]}
        if "op" not in entry["extra_info"]:
            row |= entry["params"] or {}
            row["median_s"] = round(entry["stats"]["median"], 5)
        rows.append(row | entry["extra_info"])
    output_json.clear()
    output_json.update(circumstances() | {"rows": rows})
