"""The account of the faults: what was done how often, how often a run survived it, what it repeated."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field


@dataclass
class Row:
    """One kind of fault."""

    tried: int = 0
    survived: int = 0
    repeated: list[int] = field(default_factory=list)
    """Iterations that were trained again, per try; empty where nobody could count them."""


ROWS: dict[str, Row] = {}


def tried(fault: str) -> None:
    """A fault has been done to a run or sweep."""
    ROWS.setdefault(fault, Row()).tried += 1


def survived(fault: str, repeated: int | None = None) -> None:
    """What it was done to has ended as if it had not, after so many iterations done twice."""
    row = ROWS[fault]
    row.survived += 1
    if repeated is not None:
        row.repeated.append(repeated)


def table() -> Sequence[str]:
    """The account as lines of text."""
    if not ROWS:
        return []
    width = max(map(len, ROWS))
    lines = [f"{'fault':<{width}}  tried  survived  iterations repeated"]
    for fault, row in ROWS.items():
        counts = sorted(row.repeated)
        shown = (
            "-" if not counts else str(counts[0]) if counts[0] == counts[-1] else f"{counts[0]}-{counts[-1]}"
        )
        lines.append(f"{fault:<{width}}  {row.tried:>5}  {row.survived:>8}  {shown:>19}")
    return lines
