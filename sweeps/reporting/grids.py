"""A printed table, cell by cell: what all forms of a report show alike.

Ours are percent with the mean and the sample deviation over seeds. A row whose training saw ground-truth
masks is called an oracle, and never the best.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pandas as pd

from sweeps.reporting.results import LEAST_PAIRS, FilledTable, Results, Row
from sweeps.tables.metrics import METRICS
from sweeps.tables.table import Table

ABSENT = "–"
"""Stands where there is no number."""
DIFFERENCES = 2
"""Metrics of a table, its first ones, whose difference to the reference arm has a column of its own."""
_ORACLE = (
    "oracle: its training saw ground-truth masks; it bounds the others and is no result of weak supervision"
)


@dataclass(frozen=True)
class Column:
    """A column of a printed table."""

    title: str
    group: str = ""
    """`ours`, `published`, or empty: what stands above it and its neighbours."""
    kind: str = "value"
    """`name`, `mark`, `setting`, `value`, `difference`, or `ours` beside published ones: how it is set."""

    @property
    def align(self) -> str:
        """`l`, `c` or `r`, as LaTeX has it."""
        return {"name": "l", "mark": "c", "setting": "c"}.get(self.kind, "r")


@dataclass(frozen=True)
class Line:
    """A row of a printed table."""

    cells: Sequence[str]
    looks: tuple[str, ...] = ()
    """Of `reference`, `oracle`, `ours`, `mean`, and `heading`, whose first cell names the rows below it."""
    runs: Mapping[int, str] = field(default_factory=dict)
    """Ids of the runs that its own numbers are from, by seed."""
    marked: str = ""
    """Its components and settings in words, for pages too narrow for their columns."""

    def is_ours(self, column: Column) -> bool:
        """Whether its cell in that column holds a number of ours."""
        return "ours" in (*self.looks, column.group, column.kind)


@dataclass(frozen=True)
class Grid:
    """A table as text."""

    title: str
    columns: Sequence[Column]
    """The first one names the rows."""
    lines: Sequence[Line]
    protocol: str = ""
    """What the numbers were measured on, and how, where it stands above the table."""
    remarks: Sequence[str] = ()
    """What a reader must know about the table, a line each."""
    notes: Sequence[str] = ()
    """Why values are missing, a line each."""

    @property
    def spans(self) -> list[tuple[str, int]]:
        """The groups of columns from left to right, each with the number of its columns."""
        groups = itertools.groupby(column.group for column in self.columns)
        return [(group, len([*own])) for group, own in groups]


def number(key: str, value: float, *, signed: bool = False) -> str:
    """A value in its metric's unit, percent with one decimal or two plain ones; a dash for NaN."""
    if math.isnan(value):
        return ABSENT
    sign = "+" if signed else ""
    if not METRICS[key].percent:
        return f"{value:{sign}.2f}".replace("-", "−")
    text = f"{100 * value:{sign}.1f}"
    return "0.0" if float(text) == 0 else text.replace("-", "−")


def spread(key: str, found: pd.Series) -> str:
    """Mean and deviation of a line of `FilledTable.numbers`, `37.3 ± 1.2`; the mean alone of one seed."""
    deviation = "" if math.isnan(found["std"]) else f" ± {number(key, found['std'])}"
    return number(key, found["mean"]) + deviation


def _tested(key: str, found: pd.Series, seeds: int) -> str:
    """Its difference to the reference arm with the p-value of a paired test: `−1.2 (p 0.04)`.

    Of fewer pairs than the sweep has `seeds` their number is told, and whether it is too small for a test.
    """
    text, pairs, p = number(key, found["difference"], signed=True), int(found["pairs"]), found["p"]
    if seeds < LEAST_PAIRS or not pairs:
        return text
    if pairs < LEAST_PAIRS:
        return f"{text} (n = {pairs}, too small)"
    told = "p < 0.001" if p < 0.001 else f"p {p:.2g}" if p < 0.1 else f"p {p:.1f}"
    return f"{text} ({told}{f', n = {pairs}' if pairs < seeds else ''})"


def _printed(value: float, *, sign: str = "") -> str:
    """A published value in percent, as printed; a dash for NaN."""
    return ABSENT if math.isnan(value) else f"{value:{sign}.2f}".replace("-", "−")


def setting(value: Any) -> str:
    """A setting's value, as tables show it."""
    if isinstance(value, float):
        return "∞" if math.isinf(value) else f"{value:.6g}"
    return str(value)


def grids(results: Results) -> list[Grid]:
    """All tables of a sweep."""
    return [grid(filled, len(results.seeds)) for filled in results.tables]


def grid(filled: FilledTable, seeds: int) -> Grid:
    """`filled` as text; an arm that lacks some of its `seeds` says how many it has."""
    columns, texts = zip(*_columns(filled, seeds), strict=True)
    return Grid(
        title=filled.table.heading,
        columns=columns,
        lines=[_line(filled.table, *own) for own in zip(filled.rows, zip(*texts, strict=True), strict=True)],
        remarks=[*_remarks(filled)],
        notes=[f"{row.arm.name}, {gap}" for row in filled.rows for gap in row.gaps],
    )


def _line(table: Table, row: Row, cells: Sequence[str]) -> Line:
    looks = {"reference": row.arm.name == table.reference, "oracle": row.oracle}
    marks = [name for name in table.components if row.arm.has(name)]
    marks = marks or ["no component"] * bool(table.components)
    settings = [f"{name} {setting(row.settings[name])}" for name in table.settings]
    return Line(
        cells,
        looks=tuple(name for name, is_so in looks.items() if is_so),
        runs=row.runs,
        marked=", ".join([*marks, *settings]),
    )


def titles(filled: FilledTable) -> dict[str, str]:
    """The titles of the table's metrics by key; `val` is said where training images are shown, too."""
    keys = filled.table.metrics
    both = any(key.startswith("train/") for key in keys)
    return {
        key: ("val " if both and key.startswith("val/") else "") + METRICS[key].over(filled.classes).title
        for key in keys
    }


def name_of(row: Row) -> str:
    """The row's name, with a word where it is an oracle."""
    return f"{row.arm.name} (oracle)" if row.oracle else row.arm.name


def _columns(filled: FilledTable, seeds: int) -> Iterator[tuple[Column, list[str]]]:
    """The columns, each with its cells from the first row down."""
    table, rows = filled.table, filled.rows
    reference = table.arm(table.reference)

    def differences(group: str, texts: Iterable[str]) -> tuple[Column, list[str]]:
        pairs = zip(rows, texts, strict=True)
        own = ["" if row.arm.name == reference.name else text for row, text in pairs]
        return Column(f"Δ {reference.name}", group, "difference"), own

    counts = [(row, filled.seeds(row)) for row in rows]
    names = [name_of(row) + (f" (n = {count})" if 0 < count < seeds else "") for row, count in counts]
    yield Column("", kind="name"), names
    for name in table.components:
        yield Column(name, kind="mark"), ["✓" if row.arm.has(name) else "" for row in rows]
    for name in table.settings:
        yield Column(name, kind="setting"), [setting(row.settings[name]) for row in rows]
    for place, (key, title) in enumerate(titles(filled).items()):
        found = [filled.of(row, key) for row in rows]
        yield Column(title, "ours"), [spread(key, one) for one in found]
        if place < DIFFERENCES:
            yield differences("ours", (_tested(key, one, seeds) for one in found))
    for name in table.columns:
        values = [row.arm.paper.get(name, math.nan) for row in rows]
        yield Column(name, "published"), [_printed(value) for value in values]
        gaps = (value - reference.paper.get(name, math.nan) for value in values)
        yield differences("published", (_printed(gap, sign="+") for gap in gaps))


def _remarks(filled: FilledTable) -> Iterator[str]:
    table = filled.table
    if table.columns:
        held = {name: titles(filled)[key] for name, key in table.columns.items()}
        yield f"published: {table.protocol}" if table.protocol else "published: as printed"
        if len(set(held.values())) > 1:
            yield "to be compared: " + "; ".join(f"{name} with our {title}" for name, title in held.items())
    if filled.classes:
        yield f"chosen: the mean over {', '.join(filled.classes)}"
    elif any("C-mIoU" in title for title in titles(filled).values()):
        for affected in dict.fromkeys(row.settings["evaluation.coexistence"] for row in filled.rows):
            yield f"our C-mIoU: the mean over {', '.join(affected) or 'no class'}"
    if table.note:
        yield table.note.removesuffix(".")
    if any(row.oracle for row in filled.rows):
        yield _ORACLE
    if online := [row.arm.name for row in filled.rows if row.network == "online"]:
        others = "; all others on AN" if len(online) < len(filled.rows) else ""
        yield f"judged on ON, since they have no AN without SA: {', '.join(online)}{others}"
    if best := filled.best:
        key = table.metrics[0]
        yield f"highest {titles(filled)[key]} of ours: {best.arm.name}, {spread(key, filled.of(best, key))}"
