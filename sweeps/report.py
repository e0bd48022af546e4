"""The report of a sweep, from MLflow alone: the paper's tables with ours beside the published values.

    python sweeps/report.py --sweep ablation-shapes

One set of numbers, four forms: plain text for the terminal, Markdown, CSV, and one HTML page that needs no
other file. Ours are percent with the mean and the sample standard deviation over seeds.
"""

from __future__ import annotations

import argparse
import base64
import csv
import io
import math
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])  # imports start at the house

from cosa.tracking import TrackingError, resolve_uri, ui_hint
from sweeps.console import complain, say
from sweeps.results import METRICS, ONLINE_METRICS, Cell, FilledTable, Results, Row, read_results

_ABSENT = "–"
_WITH_DIFFERENCE = frozenset(METRICS[i].key for i in (0, 1))
"""Metrics whose difference to the reference arm has a column of its own."""


def percent(value: float, *, signed: bool = False) -> str:
    """A fraction as percent with one decimal, a dash where there is none."""
    if math.isnan(value):
        return _ABSENT
    text = f"{100 * value:{'+' if signed else ''}.1f}"
    return "0.0" if float(text) == 0 else text.replace("-", "−")


def spread(cell: Cell) -> str:
    """Mean and deviation over seeds, `37.3 ± 1.2`; the mean alone of one seed."""
    if math.isnan(cell.deviation):
        return percent(cell.mean)
    return f"{percent(cell.mean)} ± {percent(cell.deviation)}"


def published(value: float | None, *, signed: bool = False) -> str:
    """A published value in percent, as printed."""
    return _ABSENT if value is None else f"{value:{'+' if signed else ''}.2f}".replace("-", "−")


@dataclass(frozen=True)
class Column:
    """A column of a printed table."""

    title: str
    group: str
    """`ours`, `published`, or empty."""
    kind: str
    """`arm`, `mark`, `value` or `difference`: how it is set."""
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
    """For each row the components it has, in words."""
    notes: tuple[str, ...]
    """Why values are missing, a line each."""


def grid(filled: FilledTable, seeds: int) -> Grid:
    """`filled` as text; an arm that lacks some of its `seeds` says how many it has."""
    table = filled.table
    to_reference = f"Δ {table.reference}"
    columns = [Column("", "", "arm"), *(Column(name, "", "mark") for name in table.components)]
    for metric in METRICS:
        lone = metric.key not in _WITH_DIFFERENCE
        columns.append(Column(metric.title, "ours", "value", first=metric is METRICS[0], lone=lone))
        if not lone:
            columns.append(Column(to_reference, "ours", "difference"))
    for name in table.columns:
        columns.append(Column(name, "published", "value", first=name == table.columns[0]))
        columns.append(Column(to_reference, "published", "difference"))
    return Grid(
        title=f"Table {table.name}: {table.title}",
        columns=tuple(columns),
        rows=tuple(tuple(_cells(filled, row, seeds)) for row in filled.rows),
        marked=tuple(_marked(filled, row) for row in filled.rows),
        notes=tuple(f"{row.arm.name}, {gap}" for row in filled.rows for gap in row.gaps),
    )


def _cells(filled: FilledTable, row: Row, seeds: int) -> Iterator[str]:
    is_reference = row.arm.name == filled.table.reference
    yield row.arm.name + (f" (n = {row.seeds})" if 0 < row.seeds < seeds else "")
    yield from ("✓" if mark else "" for mark in row.marks)
    for metric in METRICS:
        yield spread(row.cells[metric.key])
        if metric.key in _WITH_DIFFERENCE:
            yield "" if is_reference else percent(row.differences[metric.key].mean, signed=True)
    for name in filled.table.columns:
        yield published(row.published.get(name))
        yield "" if is_reference else published(row.published_differences.get(name), signed=True)


def _marked(filled: FilledTable, row: Row) -> str:
    names = [name for name, mark in zip(filled.table.components, row.marks, strict=True) if mark]
    return ", ".join(names) or "no component"


def terminal(results: Results) -> str:
    """The tables as aligned plain text."""
    parts = [_plain(grid(table, len(results.seeds))) for table in results.tables]
    return "\n\n".join([*parts, _legend(results)])


def _legend(results: Results) -> str:
    seeds = len(results.seeds)
    over = f"mean ± sample deviation over {seeds} seeds" if seeds > 1 else "one seed"
    return f"Percent; ours on {results.preset}, AN, {over}; published: VOC and COCO val, labelled protocol"


def _plain(table: Grid) -> str:
    heads = [_two_lines(column.title) for column in table.columns]
    cells = [[head[0] for head in heads], [head[1] for head in heads], *table.rows]
    widths = [max(len(row[i]) for row in cells) for i in range(len(table.columns))]
    groups = _group_line(table.columns, widths)
    lines = ["  ".join(_aligned(row, table.columns, widths)).rstrip() for row in cells]
    return "\n".join([table.title, groups, *lines[:2], "─" * len(groups), *lines[2:], *table.notes])


def _two_lines(title: str) -> tuple[str, str]:
    """A column's title over two lines, `labelled` above `mIoU`; short ones stand on the second."""
    first, space, second = title.partition(" ")
    return (first, second) if space and len(title) > 6 else ("", title)


def _aligned(row: Sequence[str], columns: Sequence[Column], widths: Sequence[int]) -> list[str]:
    align = {"arm": str.ljust, "mark": str.center}
    return [
        align.get(column.kind, str.rjust)(text, width)
        for text, column, width in zip(row, columns, widths, strict=True)
    ]


def _group_line(columns: Sequence[Column], widths: Sequence[int]) -> str:
    """`ours` and `published` centred over their columns."""
    line = ""
    for group in dict.fromkeys(column.group for column in columns):
        own = [width for column, width in zip(columns, widths, strict=True) if column.group == group]
        span = sum(own) + 2 * (len(own) - 1)
        line += ("  " if line else "") + (f" {group} ".center(span, "─") if group else " " * span)
    return line


def markdown(results: Results) -> str:
    """The tables as Markdown."""
    parts = []
    for filled in results.tables:
        table = grid(filled, len(results.seeds))
        titles = [f"{c.title}, {c.group}" if c.group == "published" else c.title for c in table.columns]
        rules = [":--" if c.kind == "arm" else ":-:" if c.kind == "mark" else "--:" for c in table.columns]
        lines = ["| " + " | ".join(row) + " |" for row in (titles, rules, *table.rows)]
        notes = [f"- {note}" for note in table.notes]
        parts.append("\n".join([f"### {table.title}", "", *lines, *([""] if notes else []), *notes]))
    facts = "\n".join(f"- {name}: {value}" for name, value in results.provenance.items() if value)
    return "\n\n".join([*parts, _legend(results), facts]) + "\n"


def as_csv(results: Results) -> str:
    """Every row of every table with all its numbers, in percent with four decimals."""
    text = io.StringIO()
    rows = [_record(filled, row) for filled in results.tables for row in filled.rows]
    names = list(dict.fromkeys(name for row in rows for name in row))
    writer = csv.DictWriter(text, names, restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def _record(filled: FilledTable, row: Row) -> dict[str, str]:
    table = filled.table
    record = {"table": table.name, "arm": row.arm.name}
    record |= {name: str(int(mark)) for name, mark in zip(table.components, row.marks, strict=True)}
    for metric in METRICS + ONLINE_METRICS:
        name = metric.key.removeprefix("val/").removeprefix("assignment/").replace("/", "_")
        cell, difference = row.cells[metric.key], row.differences[metric.key]
        record |= {
            f"{name}_n": str(len(cell.values)),
            f"{name}_mean": _number(cell.mean),
            f"{name}_deviation": _number(cell.deviation),
            f"{name}_minus_{table.reference}": _number(difference.mean),
            f"{name}_minus_{table.reference}_deviation": _number(difference.deviation),
        }
    record |= {f"published_{name}": f"{value:.2f}" for name, value in row.published.items()}
    return record | {"missing": "; ".join(row.gaps)}


def _number(value: float) -> str:
    return "" if math.isnan(value) else f"{100 * value:.4f}"


_LEFT, _RIGHT, _LINE, _TOP = 118, 12, 24, 8  # pixels around and between the lines of a chart
_CHART_WIDTH = 440


def chart(filled: FilledTable, key: str) -> dict[str, Any] | None:
    """One metric of all arms as dots, a line per arm: places for the page's template to draw at.

    None where no arm has a value.
    """
    values = [value for row in filled.rows for value in row.cells[key].values.values()]
    if not values:
        return None
    low, high = min(values), max(values)
    step = next(s for s in (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5) if (high - low) / s <= 6)
    first, last = math.floor(low / step), max(math.ceil(high / step), math.floor(low / step) + 1)

    def x(value: float) -> float:
        place = (value / step - first) / (last - first)
        return round(_LEFT + place * (_CHART_WIDTH - _LEFT - _RIGHT), 1)

    lines = []
    for index, row in enumerate(filled.rows):
        cell = row.cells[key]
        mean = x(cell.mean) if cell.values else None
        y = _TOP + index * _LINE + _LINE // 2
        dots = [x(value) for value in cell.values.values()]
        lines.append({"name": row.arm.name, "y": y, "dots": dots, "mean": mean})
    bottom = _TOP + len(lines) * _LINE
    ticks = [(x(i * step), percent(i * step).removesuffix(".0")) for i in range(first, last + 1)]
    size = {"width": _CHART_WIDTH, "height": bottom + 24, "bottom": bottom, "left": _LEFT}
    return {**size, "lines": lines, "ticks": ticks, "half": _LINE // 2 - 5}


def html(results: Results, mlflow_command: str) -> str:
    """The page, complete in itself."""
    import jinja2

    loader = jinja2.FileSystemLoader(Path(__file__).parent)
    environment = jinja2.Environment(
        loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    shown = [metric for metric in METRICS if metric.key.endswith(("/seg_miou", "/cpl_cmiou"))]
    tables = [
        {
            "grid": grid(filled, len(results.seeds)),
            "reference": filled.table.reference,
            "charts": [(m.title, drawn) for m in shown if (drawn := chart(filled, m.key))],
        }
        for filled in results.tables
    ]
    panels = [(panel.title, base64.b64encode(panel.png).decode()) for panel in results.panels]
    return environment.get_template("report.html.j2").render(
        results=results,
        tables=tables,
        legend=_legend(results),
        lead=lead(results),
        metrics=METRICS,
        panels=panels,
        mlflow_command=mlflow_command,
    )


def lead(results: Results) -> str:
    """The first table's outcome in a sentence: its reference arm against its first other one."""
    if not results.tables:
        return ""
    filled = results.tables[0]
    rows = {row.arm.name: row for row in filled.rows}
    reference = rows.pop(filled.table.reference)
    first = next(iter(rows.values()))
    key = METRICS[1].key
    if math.isnan(reference.cells[key].mean) or math.isnan(first.cells[key].mean):
        return "Not all of it is trained yet."
    both = ", ".join(f"{row.arm.name} {spread(row.cells[key])} %" for row in (reference, first))
    return f"{METRICS[1].title}: {both}"


def write(results: Results, folder: Path, mlflow_command: str) -> list[Path]:
    """Write all four forms into `folder`; the page's path comes first."""
    files = {
        "report.html": html(results, mlflow_command),
        "tables.md": markdown(results),
        "tables.csv": as_csv(results),
        "tables.txt": terminal(results) + "\n",
    }
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name).write_text(text, encoding="utf-8")
    return [folder / name for name in files]


def ui_command(uri: str) -> str:
    """The one command, or the address, that shows the runs."""
    hint = ui_hint(uri)
    return hint if hint.startswith("http") else f"{hint} --host 127.0.0.1"


def main(arguments: Sequence[str] | None = None) -> int:
    """`python sweeps/report.py`: make the report of a sweep again."""
    parser = argparse.ArgumentParser(prog="sweeps/report.py", description="Report a sweep from MLflow.")
    parser.add_argument("--sweep", default="", help="name of the sweep or its run's id (default: the newest)")
    parser.add_argument("--tracking-uri", default="", help="default: MLFLOW_TRACKING_URI or runs/mlflow.db")
    parser.add_argument("--experiment", default="cosa", help="default: cosa")
    parser.add_argument("--out", default="", help="folder to write to (default: runs/SWEEP)")
    found = parser.parse_args(arguments)
    try:
        uri = resolve_uri(
            found.tracking_uri or os.environ.get("MLFLOW_TRACKING_URI") or "sqlite:///runs/mlflow.db"
        )
        from sweeps.store import find_sweep

        results = read_results(uri, find_sweep(uri, found.experiment, found.sweep))
        files = write(results, Path(found.out or f"runs/{results.sweep}").absolute(), ui_command(uri))
    except (ValueError, OSError, TrackingError) as error:
        complain(f"report: {' '.join(str(error).split())}")
        return 2
    say(terminal(results))
    say(f"report: {files[0]}")
    say(f"MLflow: {ui_command(uri)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
