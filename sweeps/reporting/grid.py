"""A filled table as text, cell by cell: what the terminal, Markdown and HTML show alike."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sweeps.reporting.cells import LEAST_PAIRS, Cell
from sweeps.reporting.results import FilledTable, Row
from sweeps.tables.metrics import METRICS

ABSENT = "–"
DIFFERENCES = 2
"""Metrics of a table, its first ones, whose difference to the reference arm has a column of its own."""
_ORACLE = (
    "oracle: its training saw ground-truth masks; it bounds the others and is no result of weak supervision"
)


def percent(value: float, *, signed: bool = False) -> str:
    """A fraction as percent with one decimal, a dash where there is none."""
    if math.isnan(value):
        return ABSENT
    text = f"{100 * value:{'+' if signed else ''}.1f}"
    return "0.0" if float(text) == 0 else text.replace("-", "−")


def spread(cell: Cell) -> str:
    """Mean and deviation over seeds, `37.3 ± 1.2`; the mean alone of one seed."""
    if math.isnan(cell.deviation):
        return percent(cell.mean)
    return f"{percent(cell.mean)} ± {percent(cell.deviation)}"


def shown(key: str, cell: Cell) -> str:
    """A cell in its metric's unit."""
    if METRICS[key].percent:
        return spread(cell)
    if not cell.values:
        return ABSENT
    return f"{cell.mean:.2f}" + ("" if math.isnan(cell.deviation) else f" ± {cell.deviation:.2f}")


def difference(key: str, cell: Cell) -> str:
    """A difference in its metric's unit, with its sign."""
    if METRICS[key].percent or not cell.values:
        return percent(cell.mean, signed=True)
    return f"{cell.mean:+.2f}".replace("-", "−")


def tested(key: str, cell: Cell, seeds: int) -> str:
    """A difference with the p-value of a paired test over seeds: `−1.2 (p 0.04)`.

    Args:
        key: The metric.
        cell: Differences by seed.
        seeds: Those of the sweep; of fewer pairs their number is told, and that it is too small for a test.
    """
    text = difference(key, cell)
    count = len(cell.values)
    if seeds < LEAST_PAIRS or not count:
        return text
    if count < LEAST_PAIRS:
        return f"{text} (n = {count}, too small)"
    return f"{text} ({_p(cell.p_value)}{f', n = {count}' if count < seeds else ''})"


def _p(value: float) -> str:
    return "p < 0.001" if value < 0.001 else f"p {value:.2g}" if value < 0.1 else f"p {value:.1f}"


def published(value: float | None, *, signed: bool = False) -> str:
    """A published value in percent, as printed."""
    return ABSENT if value is None else f"{value:{'+' if signed else ''}.2f}".replace("-", "−")


@dataclass(frozen=True)
class Column:
    """A column of a printed table."""

    title: str
    group: str
    """`ours`, `published`, or empty."""
    kind: str
    """`arm`, `mark`, `setting`, `value` or `difference`: how it is set."""
    first: bool = False
    """Whether its group begins with it."""
    lone: bool = False
    """Whether it is a value without a difference beside it."""


@dataclass(frozen=True)
class Grid:
    """A filled table as text: what the terminal, Markdown and HTML show alike."""

    title: str
    columns: tuple[Column, ...]
    rows: tuple[tuple[str, ...], ...]
    marked: tuple[str, ...]
    """For each row its components and settings in words, for pages too narrow for their columns."""
    remarks: tuple[str, ...]
    """What a reader must know about the table, a line each."""
    notes: tuple[str, ...]
    """Why values are missing, a line each."""
    sources: tuple[tuple[Mapping[int, str], ...], ...]
    """For each cell the runs it was made from, ids by seed; none of what is not ours or a name."""


def grid(filled: FilledTable, seeds: int) -> Grid:
    """`filled` as text; an arm that lacks some of its `seeds` says how many it has."""
    table = filled.table
    to_reference = f"Δ {table.reference}"
    columns = [Column("", "", "arm"), *(Column(name, "", "mark") for name in table.components)]
    columns += [Column(name, "", "setting") for name in table.settings]
    for place, title in enumerate(titles(filled).values()):
        lone = place >= DIFFERENCES
        columns.append(Column(title, "ours", "value", first=place == 0, lone=lone))
        if not lone:
            columns.append(Column(to_reference, "ours", "difference"))
    for place, name in enumerate(table.columns):
        columns.append(Column(name, "published", "value", first=place == 0))
        columns.append(Column(to_reference, "published", "difference"))
    return Grid(
        title=table.heading,
        columns=tuple(columns),
        rows=tuple(tuple(_cells(filled, row, seeds)) for row in filled.rows),
        marked=tuple(_marked(filled, row) for row in filled.rows),
        remarks=tuple(_remarks(filled)),
        notes=tuple(f"{row.arm.name}, {gap}" for row in filled.rows for gap in row.gaps),
        sources=tuple(tuple(_sources(row, columns)) for row in filled.rows),
    )


def _sources(row: Row, columns: Sequence[Column]) -> Iterator[Mapping[int, str]]:
    for column in columns:
        ours = column.group == "ours" and column.kind in {"value", "difference"}
        yield row.runs if ours else {}


def titles(filled: FilledTable) -> dict[str, str]:
    """The titles of the table's metrics by key; `val` is said where training images are shown, too."""
    keys = filled.table.metrics
    both = any(key.startswith("train/") for key in keys)
    return {key: ("val " if both and key.startswith("val/") else "") + METRICS[key].title for key in keys}


def name_of(row: Row) -> str:
    """The row's name, with a word where it is an oracle."""
    return f"{row.arm.name} (oracle)" if row.oracle else row.arm.name


def _cells(filled: FilledTable, row: Row, seeds: int) -> Iterator[str]:
    is_reference = row.arm.name == filled.table.reference
    yield name_of(row) + (f" (n = {row.seeds})" if 0 < row.seeds < seeds else "")
    yield from ("✓" if mark else "" for mark in row.marks)
    yield from map(setting, row.values)
    for place, key in enumerate(filled.table.metrics):
        yield shown(key, row.cells[key])
        if place < DIFFERENCES:
            yield "" if is_reference else tested(key, row.differences[key], seeds)
    for name in filled.table.columns:
        yield published(row.published.get(name))
        yield "" if is_reference else published(row.published_differences.get(name), signed=True)


def setting(value: Any) -> str:
    if isinstance(value, float):
        return "∞" if math.isinf(value) else f"{value:.6g}"
    return str(value)


def _marked(filled: FilledTable, row: Row) -> str:
    table = filled.table
    names = [name for name, mark in zip(table.components, row.marks, strict=True) if mark]
    if table.components and not names:
        names = ["no component"]
    settings = zip(table.settings, map(setting, row.values), strict=True)
    return ", ".join([*names, *(f"{name} {value}" for name, value in settings)])


def _remarks(filled: FilledTable) -> Iterator[str]:
    table = filled.table
    if table.columns:
        held = {name: titles(filled)[key] for name, key in table.columns.items()}
        yield f"published: {table.protocol}" if table.protocol else "published: as printed"
        if len(set(held.values())) > 1:
            yield "to be compared: " + "; ".join(f"{name} with our {title}" for name, title in held.items())
    if table.note:
        yield table.note.removesuffix(".")
    if any(row.oracle for row in filled.rows):
        yield _ORACLE
    if filled.best:
        key, best = table.metrics[0], filled.best
        yield f"highest {titles(filled)[key]} of ours: {best.arm.name}, {shown(key, best.cells[key])}"
