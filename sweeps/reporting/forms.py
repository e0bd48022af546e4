"""A sweep's tables as text, cell by cell, and in four forms: for the terminal, Markdown, CSV, LaTeX.

All forms, the page among them, show one set of numbers. Ours are percent with the mean and the sample
deviation over seeds; each leads to its runs where a server shows them. A row whose training saw ground-truth
masks is called an oracle in each form, and never the best.
"""

from __future__ import annotations

import itertools
import json
import math
import urllib.parse
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import pandas as pd

from cosa.storage.files import mask
from sweeps.reporting.comparison import ABSENT, comparisons
from sweeps.reporting.results import LEAST_PAIRS, FilledTable, Results, Row, shown_and_online
from sweeps.tables.metrics import METRICS, SEG_MIOU
from sweeps.tables.table import Table

DIFFERENCES = 2
"""Metrics of a table, its first ones, whose difference to the reference arm has a column of its own."""
_ORACLE = (
    "oracle: its training saw ground-truth masks; it bounds the others and is no result of weak supervision"
)
_NOTE_LENGTH = 8000
"""Characters that MLflow keeps of a tag, such as the one that heads a run's page."""


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


def _setting(value: Any) -> str:
    if isinstance(value, float):
        return "∞" if math.isinf(value) else f"{value:.6g}"
    return str(value)


@dataclass(frozen=True)
class Column:
    """A column of a printed table."""

    title: str
    group: str
    """`ours`, `published`, or empty."""
    kind: str
    """`arm`, `mark`, `setting`, `value` or `difference`: how it is set."""
    texts: Sequence[str]
    """A cell for each row."""

    @property
    def align(self) -> str:
        """`l`, `c` or `r`, as LaTeX has it."""
        return {"arm": "l", "mark": "c", "setting": "c"}.get(self.kind, "r")


@dataclass(frozen=True)
class Grid:
    """A filled table as text: what all forms but the CSV show alike."""

    title: str
    columns: Sequence[Column]
    marked: Sequence[str]
    """For each row its components and settings in words, for pages too narrow for their columns."""
    remarks: Sequence[str]
    """What a reader must know about the table, a line each."""
    notes: Sequence[str]
    """Why values are missing, a line each."""

    @property
    def rows(self) -> list[tuple[str, ...]]:
        """The cells, row by row."""
        return [*zip(*(column.texts for column in self.columns), strict=True)]

    @property
    def spans(self) -> list[tuple[str, int]]:
        """The groups of columns from left to right, each with the number of its columns."""
        groups = itertools.groupby(column.group for column in self.columns)
        return [(group, len([*own])) for group, own in groups]


def grid(filled: FilledTable, seeds: int) -> Grid:
    """`filled` as text; an arm that lacks some of its `seeds` says how many it has."""
    return Grid(
        title=filled.table.heading,
        columns=[*_columns(filled, seeds)],
        marked=[_marked(filled.table, row) for row in filled.rows],
        remarks=[*_remarks(filled)],
        notes=[f"{row.arm.name}, {gap}" for row in filled.rows for gap in row.gaps],
    )


def titles(filled: FilledTable) -> dict[str, str]:
    """The titles of the table's metrics by key; `val` is said where training images are shown, too."""
    keys = filled.table.metrics
    both = any(key.startswith("train/") for key in keys)
    return {key: ("val " if both and key.startswith("val/") else "") + METRICS[key].title for key in keys}


def name_of(row: Row) -> str:
    """The row's name, with a word where it is an oracle."""
    return f"{row.arm.name} (oracle)" if row.oracle else row.arm.name


def _columns(filled: FilledTable, seeds: int) -> Iterator[Column]:
    table, rows = filled.table, filled.rows
    reference = table.arm(table.reference)

    def differences(group: str, texts: Iterable[str]) -> Column:
        pairs = zip(rows, texts, strict=True)
        own = ["" if row.arm.name == reference.name else text for row, text in pairs]
        return Column(f"Δ {reference.name}", group, "difference", own)

    counts = [(row, filled.seeds(row)) for row in rows]
    names = [name_of(row) + (f" (n = {count})" if 0 < count < seeds else "") for row, count in counts]
    yield Column("", "", "arm", names)
    for name in table.components:
        yield Column(name, "", "mark", ["✓" if row.arm.has(name) else "" for row in rows])
    for name in table.settings:
        yield Column(name, "", "setting", [_setting(row.settings[name]) for row in rows])
    for place, (key, title) in enumerate(titles(filled).items()):
        found = [filled.of(row, key) for row in rows]
        yield Column(title, "ours", "value", [spread(key, one) for one in found])
        if place < DIFFERENCES:
            yield differences("ours", (_tested(key, one, seeds) for one in found))
    for name in table.columns:
        values = [row.arm.paper.get(name, math.nan) for row in rows]
        yield Column(name, "published", "value", [_printed(value) for value in values])
        gaps = (value - reference.paper.get(name, math.nan) for value in values)
        yield differences("published", (_printed(gap, sign="+") for gap in gaps))


def _marked(table: Table, row: Row) -> str:
    names = [name for name in table.components if row.arm.has(name)]
    settings = [f"{name} {_setting(row.settings[name])}" for name in table.settings]
    return ", ".join([*(names or ["no component"] * bool(table.components)), *settings])


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
    if best := filled.best:
        key = table.metrics[0]
        yield f"highest {titles(filled)[key]} of ours: {best.arm.name}, {spread(key, filled.of(best, key))}"


def legend(results: Results) -> str:
    """What the numbers of a report are, in a line."""
    seeds = len(results.seeds)
    over = f"mean ± sample deviation over {seeds} seeds" if seeds > 1 else "one seed"
    test = "p: two-sided paired t-test over the seeds of both rows, each row by itself"
    if seeds < LEAST_PAIRS:
        test = f"no p-values: n too small, a paired test wants {LEAST_PAIRS} seeds or more"
    return f"Percent; ours on {results.preset}, AN, {over}; {test}"


@dataclass(frozen=True)
class Links:
    """Addresses of a store's runs; all are empty where no server shows the store."""

    uri: str = ""
    experiment_id: str = ""

    def runs(self, ids: Iterable[str]) -> str:
        """The page of one run, or of several compared."""
        found = list(ids)
        if len(found) == 1:
            return self._page(f"experiments/{self.experiment_id}/runs/{found[0]}")
        lists = {"runs": found, "experiments": [self.experiment_id]}
        texts = {name: json.dumps(own, separators=(",", ":")) for name, own in lists.items()}
        return self._page("compare-runs", texts) if found else ""

    def arms(self, sweep: str) -> str:
        """The chart view of a sweep's trials, best first.

        Sorted by a metric, MLflow lists trials side by side instead of folding them under their sweep.
        """
        view = {
            "workflowType": "machine_learning",
            "searchFilter": trial_filter(sweep),
            "orderByKey": f"metrics.`{SEG_MIOU}`",
            "orderByAsc": "false",
            "compareRunsMode": "CHART",
        }
        return self._page(f"experiments/{self.experiment_id}/runs", view)

    def _page(self, path: str, query: Mapping[str, str] = MappingProxyType({})) -> str:
        if not self.uri.startswith(("http://", "https://")):
            return ""
        more = f"?{urllib.parse.urlencode(query, quote_via=urllib.parse.quote)}" if query else ""
        return f"{mask(self.uri).replace('***@', '').rstrip('/')}/#/{path}{more}"


def trial_filter(sweep: str) -> str:
    """What finds the trials of a sweep, and nothing else, in MLflow's search."""
    quote = '"' if "'" in sweep else "'"  # it is the name of the user's folder
    return f"tags.cosa.sweep = {quote}{sweep}{quote} and tags.cosa.kind = 'trial'"


def terminal(results: Results) -> str:
    """The tables as aligned plain text."""
    parts = [_plain(grid(table, len(results.seeds))) for table in results.tables]
    return "\n\n".join([*parts, legend(results)])


def _plain(table: Grid) -> str:
    pads = {"l": str.ljust, "c": str.center, "r": str.rjust}
    heads = zip(*(_two_lines(column.title) for column in table.columns), strict=True)
    cells = [*heads, *table.rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    groups, left = [], iter(widths)
    for group, count in table.spans:
        span = sum(itertools.islice(left, count)) + 2 * (count - 1)
        groups.append(f" {group} ".center(span, "─") if group else " " * span)
    head = "  ".join(groups)
    looks = [(pads[column.align], width) for column, width in zip(table.columns, widths, strict=True)]
    lines = [
        "  ".join(pad(text, width) for text, (pad, width) in zip(row, looks, strict=True)).rstrip()
        for row in cells
    ]
    return "\n".join(
        [table.title, head, *lines[:2], "─" * len(head), *lines[2:], *table.remarks, *table.notes]
    )


def _two_lines(title: str) -> tuple[str, str]:
    """A column's title over two lines, `labelled` above `mIoU`; short ones stand on the second."""
    first, space, second = title.partition(" ")
    return (first, second) if space and len(title) > 6 else ("", title)


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
    return f"{legend(results)}\n\n{facts}"


def _markdown_tables(results: Results, links: Links) -> list[str]:
    parts = []
    for filled in results.tables:
        table = grid(filled, len(results.seeds))
        heads = [f"{c.title}, {c.group}" if c.group == "published" else c.title for c in table.columns]
        rules = [{"l": ":--", "c": ":-:", "r": "--:"}[column.align] for column in table.columns]
        ours = [column.group == "ours" for column in table.columns]
        rows = []
        for row, texts in zip(filled.rows, table.rows, strict=True):
            address = links.runs(row.runs.values())
            cells = zip(texts, ours, strict=True)
            rows.append([f"[{text}]({address})" if text and own and address else text for text, own in cells])
        parts.append(_markdown_part([table.title], [heads, rules, *rows], [*table.remarks, *table.notes]))
    return parts


def comparison_markdown(results: Results) -> str:
    """The full model among the paper's published rows, as Markdown."""
    parts = []
    for table in comparisons(results.full):
        rules = [":--", *["--:"] * (len(table.columns) - 1)]
        heads = [f"**{t}**" if i in table.our_columns else t for i, t in enumerate(table.columns)]
        rows = [
            [f"**{cell}**" if cell and (line.ours or line.heading) else cell for cell in line.cells]
            for line in table.lines
        ]
        parts.append(_markdown_part([table.title, table.protocol], [heads, rules, *rows], table.notes))
    return "\n\n".join(parts) + "\n"


def _markdown_part(head: Sequence[str], rows: Iterable[Sequence[str]], notes: Iterable[str]) -> str:
    """A heading and what else stands above a table, the table, and notes under it."""
    lines = "\n".join(f"| {' | '.join(row)} |" for row in rows)
    under = "\n".join(f"- {note}" for note in notes)
    return "\n\n".join(["### " + "\n\n".join(head), lines, *([under] if under else [])])


def as_csv(results: Results) -> str:
    """Every row of every table with all its numbers, in percent with four decimals."""
    records = [_record(filled, row) for filled in results.tables for row in filled.rows]
    return _csv(pd.DataFrame(records))


def _csv(frame: pd.DataFrame) -> str:
    return str(frame.to_csv(index=False, lineterminator="\n"))


def _record(filled: FilledTable, row: Row) -> dict[str, str]:
    table = filled.table
    record = {"table": table.name, "arm": row.arm.name}
    record |= {"oracle": str(int(row.oracle)), "best": str(int(row is filled.best))}
    record |= {name: str(int(row.arm.has(name))) for name in table.components}
    record |= {name: _setting(row.settings[name]).replace("∞", "inf") for name in table.settings}
    for key in shown_and_online(table):
        found, scale = filled.of(row, key), 100 if METRICS[key].percent else 1
        own = key.removeprefix("val/").removeprefix("assignment/").replace("/", "_")
        gap = f"{own}_minus_{table.reference}"
        record |= {
            f"{own}_n": f"{found['count']:.0f}",
            f"{own}_mean": _decimals(scale * found["mean"]),
            f"{own}_deviation": _decimals(scale * found["std"]),
            gap: _decimals(scale * found["difference"]),
            f"{gap}_deviation": _decimals(scale * found["difference_std"]),
            f"{gap}_n": f"{found['pairs']:.0f}",
            f"{gap}_p": "" if row.arm.name == table.reference else _decimals(found["p"]),
        }
    record |= {f"published_{name}": f"{value:.2f}" for name, value in row.arm.paper.items()}
    runs = " ".join(f"{seed}:{run_id}" for seed, run_id in sorted(row.runs.items()))
    return record | {"missing": "; ".join(row.gaps), "runs": runs}


def _decimals(value: float) -> str:
    return "" if math.isnan(value) else f"{value:.4f}"


def comparison_csv(results: Results) -> str:
    """A line for each number of the same: table, row, column, whose it is, and the text of its cell."""
    cells = []
    for table in comparisons(results.full):
        for line in table.lines:
            for place, (title, cell) in enumerate(zip(table.columns, line.cells, strict=True)):
                source = "ours" if line.ours or place in table.our_columns else "published"
                if place and cell not in {"", ABSENT}:
                    cells.append((table.title, line.cells[0], title, source, cell))
    return _csv(pd.DataFrame(cells, columns=["table", "row", "column", "source", "value"]))


# ---- LaTeX with booktabs, to be \input as it is: every character is plain ASCII ----

_ESCAPED = {character: f"\\{character}" for character in "&%$#_{}"}
_ESCAPED |= {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "–": "--"}
_ESCAPED |= {"†": r"$^\dagger$", "Δ": r"$\Delta$", "✓": r"$\checkmark$", "∞": r"$\infty$", "ξ": r"$\xi$"}
_ESCAPED |= {"τ": r"$\tau$", "ε": r"$\epsilon$", "≤": r"$\leq$", "≥": r"$\geq$", "×": r"$\times$"}
_ESCAPED |= {"±": r"$\pm$", "−": "$-$", "<": "$<$", ">": "$>$"}
_LATEX_HEAD = """% Made from MLflow by sweeps/report.py. In the preamble:
% \\usepackage{booktabs,amssymb}
"""


def escape(text: str) -> str:
    """`text` as LaTeX prints it; what it has no sign for becomes a question mark."""
    escaped = "".join(_ESCAPED.get(character, character) for character in text)
    return escaped.encode("ascii", "replace").decode()


def latex(results: Results) -> str:
    """All tables, one float each."""
    tables = (grid(filled, len(results.seeds)) for filled in results.tables)
    return "\n".join([_LATEX_HEAD, *(_float(table, legend(results)) for table in tables)])


def _float(table: Grid, legend: str) -> str:
    name = table.title.partition(":")[0].lower().replace(". ", "-").replace(" ", "-")
    notes = ". ".join(note[:1].upper() + note[1:] for note in (legend, *table.remarks, *table.notes))
    groups, rules, place = [], [], 1
    for group, width in table.spans:
        groups.append(rf"\multicolumn{{{width}}}{{c}}{{{group}}}" if group else " &" * (width - 1))
        rules += [rf"\cmidrule(lr){{{place}-{place + width - 1}}}"] if group else []
        place += width
    rows = [[escape(column.title) for column in table.columns], *(map(escape, row) for row in table.rows)]
    head, *body = [" & ".join(row) + r" \\" for row in rows]
    lines = "\n".join(body)
    return rf"""\begin{{table*}}
\centering\footnotesize\setlength{{\tabcolsep}}{{4pt}}
\caption{{{escape(table.title)}. {escape(notes)}.}}
\label{{tab:{name}}}
\begin{{tabular}}{{{"".join(column.align for column in table.columns)}}}
\toprule
{" & ".join(groups)} \\
{" ".join(rules)}
{head}
\midrule
{lines}
\bottomrule
\end{{tabular}}
\end{{table*}}
"""
