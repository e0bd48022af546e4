"""The run and sweep that others are held against, and the fault table at the end of `make test-faults`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.faults import account
from tests.faults.runs import finish, sweep_command, train_command, what_counts


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small `shapes` data set."""
    from cosa.data.shapes import write_shapes

    root = tmp_path_factory.mktemp("faults") / "shapes"
    write_shapes(root, train_images=24, val_images=6)
    return root


@pytest.fixture(scope="session")
def undisturbed(data: Path, tmp_path_factory: pytest.TempPathFactory) -> object:
    """What counts of a run that nothing happened to."""
    out = tmp_path_factory.mktemp("undisturbed") / "run"
    finish(train_command(out, data), out.parent / "log")
    return what_counts(out)


@pytest.fixture(scope="session")
def undisturbed_sweep(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished sweep."""
    folder = tmp_path_factory.mktemp("undisturbed")
    finish(sweep_command(folder, data), folder / "log")
    return folder


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Called by pytest once all tests have run."""
    lines = account.table()
    if lines:
        terminalreporter.section("faults")
        for line in lines:
            terminalreporter.write_line(line)
