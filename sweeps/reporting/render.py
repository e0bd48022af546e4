"""The report of a sweep, from MLflow alone: the paper's tables with ours beside the published values.

    python sweeps/report.py --sweep ablation-shapes

One set of numbers, five forms: plain text for the terminal, Markdown, CSV, LaTeX, and one HTML page that
needs no other file. Ours are percent with the mean and the sample standard deviation over seeds; each leads
to its runs where a server shows them. A row whose training saw ground-truth masks is called an oracle in each
form, and never the best.
"""

from __future__ import annotations

import argparse
import base64
import csv
import io
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cosa.cli.console import print_error, print_line
from cosa.tracking import TrackingError, resolve_uri, ui_hint
from sweeps.reporting.cells import LEAST_PAIRS
from sweeps.reporting.comparison import comparisons
from sweeps.reporting.grid import (
    ABSENT,
    DIFFERENCES,
    Column,
    Grid,
    grid,
    name_of,
    percent,
    setting,
    shown,
    titles,
)
from sweeps.reporting.latex import latex
from sweeps.reporting.links import Links, trial_filter
from sweeps.reporting.results import FilledTable, Results, Row, read_results, shown_and_online
from sweeps.runs import find_sweep
from sweeps.tables.metrics import METRICS, SEG_MIOU


def terminal(results: Results) -> str:
    """The tables as aligned plain text."""
    parts = [_plain(grid(table, len(results.seeds))) for table in results.tables]
    return "\n\n".join([*parts, _legend(results)])


def _legend(results: Results) -> str:
    seeds = len(results.seeds)
    over = f"mean ± sample deviation over {seeds} seeds" if seeds > 1 else "one seed"
    if seeds < LEAST_PAIRS:
        test = f"no p-values: n too small, a paired test wants {LEAST_PAIRS} seeds or more"
    else:
        test = "p: two-sided paired t-test over the seeds of both rows, each row by itself"
    return f"Percent; ours on {results.preset}, AN, {over}; {test}"


def _plain(table: Grid) -> str:
    heads = [_two_lines(column.title) for column in table.columns]
    cells = [[head[0] for head in heads], [head[1] for head in heads], *table.rows]
    widths = [max(len(row[i]) for row in cells) for i in range(len(table.columns))]
    groups = _group_line(table.columns, widths)
    lines = ["  ".join(_aligned(row, table.columns, widths)).rstrip() for row in cells]
    return "\n".join(
        [table.title, groups, *lines[:2], "─" * len(groups), *lines[2:], *table.remarks, *table.notes]
    )


def _two_lines(title: str) -> tuple[str, str]:
    """A column's title over two lines, `labelled` above `mIoU`; short ones stand on the second."""
    first, space, second = title.partition(" ")
    return (first, second) if space and len(title) > 6 else ("", title)


def _aligned(row: Sequence[str], columns: Sequence[Column], widths: Sequence[int]) -> list[str]:
    align = {"arm": str.ljust, "mark": str.center, "setting": str.center}
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


_NOTE_LENGTH = 8000
"""Characters that MLflow keeps of a tag, such as the one that heads a run's page."""

_RULES = {"arm": ":--", "mark": ":-:", "setting": ":-:"}


def markdown(results: Results, uri: str = "") -> str:
    """The sweep's tables as Markdown; numbers lead to the runs of a server at `uri`."""
    links = Links(uri, results.experiment_id)
    return "\n\n".join([*_markdown_tables(results, links), _markdown_foot(results)]) + "\n"


def headline(results: Results) -> str:
    """The first of the tables, as many as the head of the sweep's page in MLflow can hold."""
    foot = (
        f"To compare the arms, search its experiment for `{trial_filter(results.sweep)}`, sort by "
        f"`{SEG_MIOU}`, open the chart view and group by the tag `cosa.arm`.\n\n{_markdown_foot(results)}"
    )
    more = "Further tables are in the artifact report/tables.md."
    parts: list[str] = []
    tables = _markdown_tables(results, Links())
    for table in tables:
        if sum(len(part) + 2 for part in (*parts, table, foot, more)) > _NOTE_LENGTH:
            break
        parts.append(table)
    return "\n\n".join([*parts, *([more] if len(parts) < len(tables) else []), foot])[:_NOTE_LENGTH]


def _markdown_foot(results: Results) -> str:
    facts = "\n".join(f"- {name}: {value}" for name, value in results.provenance.items() if value)
    return f"{_legend(results)}\n\n{facts}"


def _markdown_tables(results: Results, links: Links) -> list[str]:
    parts = []
    for filled in results.tables:
        table = grid(filled, len(results.seeds))
        titles = [f"{c.title}, {c.group}" if c.group == "published" else c.title for c in table.columns]
        rules = [_RULES.get(c.kind, "--:") for c in table.columns]
        rows = [
            [
                f"[{text}]({address})" if text and (address := links.address(list(runs.values()))) else text
                for text, runs in zip(row, sources, strict=True)
            ]
            for row, sources in zip(table.rows, table.sources, strict=True)
        ]
        lines = ["| " + " | ".join(row) + " |" for row in (titles, rules, *rows)]
        notes = [f"- {note}" for note in (*table.remarks, *table.notes)]
        parts.append("\n".join([f"### {table.title}", "", *lines, *([""] if notes else []), *notes]))
    return parts


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
    reference = row.arm.name == table.reference
    record = {"table": table.name, "arm": row.arm.name}
    record |= {"oracle": str(int(row.oracle)), "best": str(int(row is filled.best))}
    record |= {name: str(int(mark)) for name, mark in zip(table.components, row.marks, strict=True)}
    record |= {name: _plain_setting(v) for name, v in zip(table.settings, row.values, strict=True)}
    for key in shown_and_online(table):
        name = key.removeprefix("val/").removeprefix("assignment/").replace("/", "_")
        scale = 100 if METRICS[key].percent else 1
        cell, gap = row.cells[key], row.differences[key]
        record |= {
            f"{name}_n": str(len(cell.values)),
            f"{name}_mean": _number(cell.mean, scale),
            f"{name}_deviation": _number(cell.deviation, scale),
            f"{name}_minus_{table.reference}": _number(gap.mean, scale),
            f"{name}_minus_{table.reference}_deviation": _number(gap.deviation, scale),
            f"{name}_minus_{table.reference}_n": str(len(gap.values)),
            f"{name}_minus_{table.reference}_p": "" if reference else _number(gap.p_value, 1),
        }
    record |= {f"published_{name}": f"{value:.2f}" for name, value in row.published.items()}
    runs = " ".join(f"{seed}:{run_id}" for seed, run_id in sorted(row.runs.items()))
    return record | {"missing": "; ".join(row.gaps), "runs": runs}


def _plain_setting(value: Any) -> str:
    return setting(value).replace("∞", "inf")


def _number(value: float, scale: float) -> str:
    return "" if math.isnan(value) else f"{scale * value:.4f}"


def comparison_markdown(results: Results) -> str:
    """The full model among the paper's published rows, as Markdown."""
    parts = []
    for table in comparisons(results.full):
        rules = [":--", *["--:"] * (len(table.columns) - 1)]
        head = [
            f"**{title}**" if place in table.our_columns else title
            for place, title in enumerate(table.columns)
        ]
        rows = [
            [f"**{cell}**" if cell and (line.ours or line.heading) else cell for cell in line.cells]
            for line in table.lines
        ]
        lines = ["| " + " | ".join(row) + " |" for row in (head, rules, *rows)]
        notes = [f"- {note}" for note in table.notes]
        parts.append("\n".join([f"### {table.title}", "", table.protocol, "", *lines, "", *notes]).rstrip())
    return "\n\n".join(parts) + "\n"


def comparison_csv(results: Results) -> str:
    """A line for each number of the same: table, row, column, whose it is, and the text of its cell."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(("table", "row", "column", "source", "value"))
    for table in comparisons(results.full):
        for line in table.lines:
            for place, (title, cell) in enumerate(zip(table.columns, line.cells, strict=True)):
                if place and cell not in {"", ABSENT}:
                    source = "ours" if line.ours or place in table.our_columns else "published"
                    writer.writerow((table.title, line.cells[0], title, source, cell))
    return text.getvalue()


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
        runs = [{seed: row.runs[seed]} if seed in row.runs else {} for seed in cell.values]
        lines.append({"name": name_of(row), "y": y, "dots": dots, "runs": runs, "mean": mean})
    bottom = _TOP + len(lines) * _LINE
    ticks = [(x(i * step), percent(i * step).removesuffix(".0")) for i in range(first, last + 1)]
    size = {"width": _CHART_WIDTH, "height": bottom + 24, "bottom": bottom, "left": _LEFT}
    return {**size, "lines": lines, "ticks": ticks, "half": _LINE // 2 - 5}


def html(results: Results, mlflow_command: str, uri: str = "") -> str:
    """The page, complete in itself; numbers lead to the runs of a server at `uri`."""
    import jinja2

    links = Links(uri, results.experiment_id)

    loader = jinja2.FileSystemLoader(Path(__file__).parent)
    environment = jinja2.Environment(
        loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    tables = [
        {
            "grid": grid(filled, len(results.seeds)),
            "curves": results.curves.get(filled.table.name),
            "reference": filled.table.reference,
            "reference_line": [row.arm.name for row in filled.rows].index(filled.table.reference),
            "oracles": [row.oracle for row in filled.rows],
            "charts": [
                (titles(filled)[key], drawn) for key in _charted(filled) if (drawn := chart(filled, key))
            ],
        }
        for filled in results.tables
    ]
    keys = dict.fromkeys(key for filled in results.tables for key in filled.table.metrics)
    panels = [(panel.title, base64.b64encode(panel.png).decode()) for panel in results.panels]
    return environment.get_template("report.html.j2").render(
        results=results,
        tables=tables,
        legend=_legend(results),
        lead=lead(results),
        metrics=[METRICS[key] for key in keys],
        comparisons=comparisons(results.full),
        beside_paper=results.full is not None and results.full.layout in {"voc", "coco"},
        panels=panels,
        full_source=links.source(results.full.runs) if results.full else None,
        source=links.source,
        arms_address=links.arms(results.sweep),
        trial_filter=trial_filter(results.sweep),
        mlflow_command=mlflow_command,
    )


def _charted(filled: FilledTable) -> list[str]:
    """The metrics that are drawn: label-free segmentation and C-mIoU, else the table's first two."""
    keys = [key for key in filled.table.metrics if METRICS[key].percent]
    return [key for key in keys if key in {SEG_MIOU, "val/assignment/cpl_cmiou"}] or keys[:DIFFERENCES]


def lead(results: Results) -> str:
    """The first table's outcome in a sentence: its reference arm against its first other one."""
    if not results.tables:
        return ""
    filled = results.tables[0]
    rows = {row.arm.name: row for row in filled.rows}
    reference = rows.pop(filled.table.reference)
    first = next(iter(rows.values()), reference)
    key = SEG_MIOU if SEG_MIOU in filled.table.metrics else filled.table.metrics[0]
    if math.isnan(reference.cells[key].mean) or math.isnan(first.cells[key].mean):
        return "Not all of it is trained yet."
    unit = " %" if METRICS[key].percent else ""
    both = ", ".join(f"{name_of(row)} {shown(key, row.cells[key])}{unit}" for row in (reference, first))
    return f"{titles(filled)[key]}: {both}"


def write(results: Results, folder: Path, uri: str) -> list[Path]:
    """Write all five forms, the comparison with the paper's rows, and the figures; the page comes first.

    Args:
        results: What to report.
        folder: Where to; made if needed.
        uri: Tracking URI of the runs.
    """
    grids = [grid(filled, len(results.seeds)) for filled in results.tables]
    files = {
        "report.html": html(results, ui_command(uri), uri),
        "tables.md": markdown(results, uri),
        "tables.csv": as_csv(results),
        "tables.tex": latex(grids, _legend(results)),
        "tables.txt": terminal(results) + "\n",
    }
    if comparisons(results.full):
        files |= {
            "comparison.md": comparison_markdown(results),
            "comparison.csv": comparison_csv(results),
        }
    contents = {name: text.encode() for name, text in files.items()}
    drawings = [*results.curves.values(), *results.figures]
    contents |= {f"figures/{part.file}": part.data for drawing in drawings for part in drawing.parts}
    (folder / "figures" if drawings else folder).mkdir(parents=True, exist_ok=True)
    for name, content in contents.items():
        (folder / name).write_bytes(content)
    return [folder / name for name in contents]


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
        results = read_results(uri, find_sweep(uri, found.experiment, found.sweep))
        files = write(results, Path(found.out or f"runs/{results.sweep}").absolute(), uri)
    except (ValueError, OSError, TrackingError) as error:
        print_error(f"report: {' '.join(str(error).split())}")
        return 2
    print_line(terminal(results))
    print_line(f"report: {files[0]}")
    print_line(f"MLflow: {ui_command(uri)}")
    return 0
