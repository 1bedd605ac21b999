"""Cuts pytest-benchmark's JSON down to what a claim of speed needs."""

from __future__ import annotations

from typing import Any

from record import circumstances


def pytest_benchmark_update_json(
    config: Any, benchmarks: list[Any], output_json: dict[str, Any]
) -> None:
    rows = [
        {
            "name": entry["name"],
            **(entry["params"] or {}),
            "rounds": entry["stats"]["rounds"],
            "median_s": round(entry["stats"]["median"], 5),
            **entry["extra_info"],
        }
        for entry in output_json["benchmarks"]
    ]
    output_json.clear()
    output_json.update(circumstances() | {"rows": rows})
