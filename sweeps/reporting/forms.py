"""A sweep's tables in four forms: for the terminal, Markdown, CSV, LaTeX.

All forms, the page among them, show one set of numbers; ours lead to their runs where a server shows them.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import urllib.parse
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

import pandas as pd

from cosa.cli.console import markdown_cell
from cosa.storage.files import mask
from sweeps.reporting.comparison import comparisons
from sweeps.reporting.grids import ABSENT, Column, Grid, Line, grids, name_of, setting, spread, titles
from sweeps.reporting.results import LEAST_PAIRS, FilledTable, Results, Row, shown_and_online
from sweeps.tables.metrics import METRICS, SEG_MIOU


def legend(results: Results) -> str:
    """What the numbers of a report are, in a line."""
    seeds = len(results.seeds)
    over = f"mean ± sample deviation over {seeds} seeds" if seeds > 1 else "one seed"
    test = "p: two-sided paired t-test over the seeds of both rows, each row by itself"
    if seeds < LEAST_PAIRS:
        test = f"no p-values: n too small, a paired test wants {LEAST_PAIRS} seeds or more"
    rows = [(row, filled.seeds(row)) for filled in results.tables for row in filled.rows]
    if any(0 < count < seeds for _, count in rows):
        over += ", over n of them where a row says so"
    online = any(row.network == "online" for row, _ in rows)
    network = "AN, or ON where there is no AN" if online else "AN"
    return f"Percent; ours on {results.preset}, {network}, {over}; {test}"


_TRAINING_VIEW = {"workflowType": "machine_learning"}
"""Of MLflow's pages, which otherwise show any experiment as talks with a language model."""
_NOTE_LENGTH = 7800
"""Characters of the text that heads a run's page, where MLflow keeps 8,000 and a link stands above it."""


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
            **_TRAINING_VIEW,
            "searchFilter": trial_filter(sweep),
            "orderByKey": f"metrics.`{SEG_MIOU}`",
            "orderByAsc": "false",
            "compareRunsMode": "CHART",
        }
        return self._page(f"experiments/{self.experiment_id}/runs", view)

    def _page(self, path: str, query: Mapping[str, str] = MappingProxyType({})) -> str:
        if not self.uri.startswith(("http://", "https://")):
            return ""
        more = urllib.parse.urlencode({**query, **_TRAINING_VIEW}, quote_via=urllib.parse.quote)
        return f"{mask(self.uri).replace('***@', '').rstrip('/')}/#/{path}?{more}"


def trial_filter(sweep: str) -> str:
    """What finds the trials of a sweep, and nothing else, in MLflow's search."""
    quote = '"' if "'" in sweep else "'"  # it is the name of the user's folder
    return f"tags.cosa.sweep = {quote}{sweep}{quote} and tags.cosa.kind = 'trial'"


def terminal(results: Results) -> str:
    """The tables as aligned plain text."""
    return "\n\n".join([*map(_plain, grids(results)), legend(results)])


def _plain(table: Grid) -> str:
    pads = {"l": str.ljust, "c": str.center, "r": str.rjust}
    heads = zip(*(_two_lines(column.title) for column in table.columns), strict=True)
    cells = [*heads, *(line.cells for line in table.lines)]
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
    return "\n\n".join([*(_markdown(table, links) for table in grids(results)), _foot(results)]) + "\n"


def comparison_markdown(results: Results) -> str:
    """The full model among the paper's published rows, as Markdown."""
    return (
        "\n\n".join(_markdown(table, Links()) for table in comparisons(results.full, results.stages)) + "\n"
    )


def _markdown(table: Grid, links: Links) -> str:
    def head(column: Column) -> str:
        title = markdown_cell(column.title) + ", published" * (column.group == "published")
        return f"**{title}**" if column.kind == "ours" else title

    def cell(line: Line, column: Column, text: str) -> str:
        address = links.runs(line.runs.values()) if line.is_ours(column) else ""
        text = markdown_cell(text)
        text = f"[{text}]({address})" if text and address else text
        return f"**{text}**" if text and {"ours", "heading"} & {*line.looks} else text

    rules = {"l": ":--", "c": ":-:", "r": "--:"}
    rows = [
        [head(column) for column in table.columns],
        [rules[column.align] for column in table.columns],
        *([cell(line, *own) for own in zip(table.columns, line.cells, strict=True)] for line in table.lines),
    ]
    parts = [
        f"### {table.title}",
        table.protocol,
        "\n".join(f"| {' | '.join(row)} |" for row in rows),
        "\n".join(f"- {note}" for note in (*table.remarks, *table.notes)),
    ]
    return "\n\n".join(part for part in parts if part)


def lead(results: Results) -> str:
    """The first table's outcome in a sentence: its reference arm against its first other one."""
    if not results.tables:
        return ""
    filled = results.tables[0]
    key = SEG_MIOU if SEG_MIOU in filled.table.metrics else filled.table.metrics[0]
    rows = sorted(filled.rows, key=lambda row: row.arm.name != filled.table.reference)
    both = (rows * 2)[:2]
    found = [filled.of(row, key) for row in both]
    if any(math.isnan(one["mean"]) for one in found):
        return "Not all of it is trained yet."
    unit = " %" if METRICS[key].percent else ""
    pairs = zip(both, found, strict=True)
    texts = [f"{name_of(row)} {spread(key, one)}{unit}" for row, one in pairs]
    return f"{titles(filled)[key]}: {', '.join(texts)}"


def headline(results: Results) -> str:
    """The outcome and the first of the tables, as many as the head of the sweep's page in MLflow can hold.

    That page is narrow: marks, which the arms' names tell, and differences of published values are left out.
    """
    foot = (
        f"To compare the arms, search its experiment for `{trial_filter(results.sweep)}`, sort by "
        f"`{SEG_MIOU}`, open the chart view and group by the tag `cosa.arm`.\n\n{_foot(results)}"
    )
    more = "Further tables are in the artifact report/tables.md."
    parts = [lead(results)]
    # MLflow's Markdown knows no rule of a single dash, and would show the table's source
    tables = [_markdown(_slim(table), Links()).replace(" :-: ", " :--: ") for table in grids(results)]
    for table in tables:
        if sum(len(part) + 2 for part in (*parts, table, foot, more)) > _NOTE_LENGTH:
            break
        parts.append(table)
    return "\n\n".join([*parts, *([more] if len(parts) <= len(tables) else []), foot])[:_NOTE_LENGTH]


def _slim(table: Grid) -> Grid:
    """A table without marks and without differences of published values."""
    kept = [
        column.kind != "mark" and (column.group, column.kind) != ("published", "difference")
        for column in table.columns
    ]
    lines = [dataclasses.replace(line, cells=[*itertools.compress(line.cells, kept)]) for line in table.lines]
    return dataclasses.replace(table, columns=[*itertools.compress(table.columns, kept)], lines=lines)


def _foot(results: Results) -> str:
    silent = {"", "finished"}  # that all trials are there says so, too
    facts = "\n".join(
        f"- {name}: {value}" for name, value in results.provenance.items() if value not in silent
    )
    return f"{legend(results)}\n\n{facts}"


def as_csv(results: Results) -> str:
    """Every row of every table with all its numbers, in percent with four decimals."""
    records = [_record(filled, row) for filled in results.tables for row in filled.rows]
    return _csv(pd.DataFrame(records))


def _csv(frame: pd.DataFrame) -> str:
    return str(frame.to_csv(index=False, lineterminator="\n"))


def _record(filled: FilledTable, row: Row) -> dict[str, str]:
    table = filled.table
    record = {"table": table.name, "arm": row.arm.name, "network": row.network}
    record |= {"oracle": str(int(row.oracle)), "best": str(int(row is filled.best))}
    record |= {name: str(int(row.arm.has(name))) for name in table.components}
    record |= {name: setting(row.settings[name]).replace("∞", "inf") for name in table.settings}
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
    cells = [
        (table.title, line.cells[0], column.title, "ours" if line.is_ours(column) else "published", text)
        for table in comparisons(results.full, results.stages)
        for line in table.lines
        for column, text in zip(table.columns[1:], line.cells[1:], strict=True)
        if text not in {"", ABSENT}
    ]
    return _csv(pd.DataFrame(cells, columns=["table", "row", "column", "source", "value"]))


# ---- LaTeX with booktabs, to be \input as it is: every character is plain ASCII ----

_ESCAPED = {character: f"\\{character}" for character in "&%$#_{}"}
_ESCAPED |= {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "–": "--"}
_ESCAPED |= {"†": r"$^\dagger$", "Δ": r"$\Delta$", "✓": r"$\checkmark$", "∞": r"$\infty$", "ξ": r"$\xi$"}
_ESCAPED |= {"τ": r"$\tau$", "ε": r"$\epsilon$", "≤": r"$\leq$", "≥": r"$\geq$", "×": r"$\times$"}
_ESCAPED |= {"±": r"$\pm$", "−": "$-$", "<": "$<$", ">": "$>$", "|": "$|$", "[": "{[}"}
_LATEX_HEAD = """% Made from MLflow by sweeps/report.py. In the preamble:
% \\usepackage{booktabs,amssymb}
"""


def escape(text: str) -> str:
    """`text` as LaTeX prints it; what it has no sign for becomes a question mark."""
    escaped = "".join(_ESCAPED.get(character, character) for character in text)
    return escaped.encode("ascii", "replace").decode()


def latex(results: Results) -> str:
    """All tables, one float each."""
    return "\n".join([_LATEX_HEAD, *(_float(table, legend(results)) for table in grids(results))])


def _float(table: Grid, legend: str) -> str:
    name = table.title.partition(":")[0].lower().replace(". ", "-").replace(" ", "-")
    notes = ". ".join(note[:1].upper() + note[1:] for note in (legend, *table.remarks, *table.notes))
    groups, rules, place = [], [], 1
    for group, width in table.spans:
        groups.append(rf"\multicolumn{{{width}}}{{c}}{{{group}}}" if group else " &" * (width - 1))
        rules += [rf"\cmidrule(lr){{{place}-{place + width - 1}}}"] if group else []
        place += width
    rows = [[column.title for column in table.columns], *(line.cells for line in table.lines)]
    head, *body = [" & ".join(map(escape, row)) + r" \\" for row in rows]
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
