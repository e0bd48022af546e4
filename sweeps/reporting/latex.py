"""A sweep's tables as LaTeX with booktabs, to be \\input as they are: every character is plain ASCII."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

from sweeps.reporting.grid import Column, Grid

_ESCAPED = {
    **{character: f"\\{character}" for character in "&%$#_{}"},
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": "$<$",
    ">": "$>$",
    "±": r"$\pm$",
    "−": "$-$",
    "–": "--",
    "Δ": r"$\Delta$",
    "✓": r"$\checkmark$",
    "∞": r"$\infty$",
    "ξ": r"$\xi$",
    "τ": r"$\tau$",
    "ε": r"$\epsilon$",
    "†": r"$^\dagger$",
    "×": r"$\times$",
    "≤": r"$\leq$",
    "≥": r"$\geq$",
}
_HEAD = """% Made from MLflow by sweeps/report.py. In the preamble:
% \\usepackage{booktabs,amssymb}
"""


def escape(text: str) -> str:
    """`text` as LaTeX prints it; what it has no sign for becomes a question mark."""
    found = "".join(_ESCAPED.get(character, character) for character in text)
    return found.encode("ascii", "replace").decode()


def latex(tables: Sequence[Grid], legend: str) -> str:
    """All tables of a report, one float each."""
    return "\n".join([_HEAD, *(_table(table, legend) for table in tables)])


def _table(table: Grid, legend: str) -> str:
    name = table.title.partition(":")[0].lower().replace(". ", "-").replace(" ", "-")
    notes = ". ".join(note[:1].upper() + note[1:] for note in (legend, *table.remarks, *table.notes))
    rows = [_line(map(escape, row)) for row in table.rows]
    return "\n".join(
        [
            r"\begin{table*}",
            r"\centering\footnotesize\setlength{\tabcolsep}{4pt}",
            rf"\caption{{{escape(table.title)}. {escape(notes)}.}}",
            rf"\label{{tab:{name}}}",
            rf"\begin{{tabular}}{{{''.join(map(_alignment, table.columns))}}}",
            r"\toprule",
            *_groups(table.columns),
            _line(escape(column.title) for column in table.columns),
            r"\midrule",
            *rows,
            r"\bottomrule",
            r"\end{tabular}",
            r"\end{table*}",
            "",
        ]
    )


def _alignment(column: Column) -> str:
    return {"arm": "l", "mark": "c", "setting": "c"}.get(column.kind, "r")


def _groups(columns: Sequence[Column]) -> Iterator[str]:
    """A line that names the columns of ours and the published ones, ruled below."""
    cells, rules = [], []
    place = 1
    for group, own in itertools.groupby(columns, key=lambda column: column.group):
        width = len(list(own))
        cells.append(rf"\multicolumn{{{width}}}{{c}}{{{escape(group)}}}" if group else " &" * (width - 1))
        if group:
            rules.append(rf"\cmidrule(lr){{{place}-{place + width - 1}}}")
        place += width
    yield _line(cells)
    yield " ".join(rules)


def _line(cells: Iterator[str] | Sequence[str]) -> str:
    return " & ".join(cells) + r" \\"
