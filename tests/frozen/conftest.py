"""The small run of today's code that several tests hold against what commit 25ac2bd kept."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.frozen import recipe


@pytest.fixture(scope="session")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the data set and, in `run`, the small run, tracked in `mlflow.db`."""
    folder = recipe.roomy(tmp_path_factory.mktemp("f"))
    recipe.write_data(folder)
    recipe.finish(recipe.train_command("run", "--tracking-uri", f"sqlite:///{folder}/mlflow.db"), folder)
    return folder
