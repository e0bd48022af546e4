"""The fault table at the end of `make test-faults`."""

from __future__ import annotations

from typing import Any

from tests.faults import account


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Called by pytest once all tests have run."""
    lines = account.table()
    if lines:
        terminalreporter.section("faults")
        for line in lines:
            terminalreporter.write_line(line)
