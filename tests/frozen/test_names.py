"""What MLflow is told is called as commit 25ac2bd called it: charts, searches and reports rely on it."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.frozen import recipe

pytestmark = pytest.mark.slow


def test_a_tracked_run_leaves_the_names_that_it_left(place: Path) -> None:
    assert recipe.names_in_store(place) == recipe.read("names_run.json")
