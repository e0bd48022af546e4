"""One trial of a search, as every part of the search sees it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from sweeps.tuning.rungs import Decision

PRESET = "full"
"""Origin of the preset itself."""

State = Literal["running", "complete", "pruned", "failed", "waiting"]


@dataclass(frozen=True)
class Record:
    """One trial of the search as the study has it."""

    number: int
    """Counted from 0, in the order in which they were begun."""
    state: State
    origin: str
    """The paper's row it is, `5a/s2c-x2`; empty where it was suggested."""
    parameters: Mapping[str, Any]
    changes: Mapping[str, Any]
    """The settings that it changes in the preset."""
    value: float
    """The metric after its last step; NaN where it has none."""
    decisions: tuple[Decision, ...]
    """What became of it at each rung that it reached."""
    reason: str
    """Why it failed."""
    repeats: int | None = None
    """Number of the failed trial that it tries again."""

    @property
    def label(self) -> str:
        """`12`, or `0 full` for one of the paper's rows."""
        return f"{self.number} {self.origin.rpartition('/')[2]}".strip()

    @property
    def last_value(self) -> float:
        """Its value, or the one at the last rung it reached."""
        return self.value if self.state == "complete" or not self.decisions else self.decisions[-1].value


def failed(records: Sequence[Record]) -> list[Record]:
    """Trials that failed and were not tried again since."""
    repeated = {record.repeats for record in records}
    return [r for r in records if r.state == "failed" and r.number not in repeated]
