"""What MLflow is told is called as commit 25ac2bd called it: charts, searches and reports rely on it."""

from __future__ import annotations

from pathlib import Path

import pytest

from cosa.config import EARLIER
from tests.frozen import recipe

pytestmark = pytest.mark.slow


def test_a_tracked_run_leaves_the_names_that_it_left(place: Path) -> None:
    found = recipe.names_in_store(place)

    assert recipe.without_newer(found) == recipe.read("names_run.json")
    costs = [
        "evaluation_images_per_second",
        "gpu_hours",
        "loader_wait",
        "parameters",
        "peak_memory_gib",
        "seconds",
    ]
    for names in found.values():
        assert [name for name in names["metrics"] if name.startswith("cost/")] == [f"cost/{c}" for c in costs]
        assert "system/cpu_utilization_percentage" in names["metrics"]
    assert all(EARLIER.keys() <= set(names["params"]) for names in found.values())
