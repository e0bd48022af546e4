"""A sweep's report: the page, complete in itself, and all files that are written beside it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jinja2

from cosa.tracking import ui_hint
from sweeps.reporting import forms, grids
from sweeps.reporting.comparison import comparisons
from sweeps.reporting.forms import headline, lead, terminal
from sweeps.reporting.results import FilledTable, Results
from sweeps.tables.metrics import METRICS, SEG_MIOU

__all__ = ["headline", "html", "lead", "render_page", "terminal", "write", "write_files"]

_CHART_WIDTH, _LEFT, _RIGHT, _LINE = 440, 118, 12, 24  # pixels; around and between the lines of a chart


def chart(filled: FilledTable, key: str) -> dict[str, Any] | None:
    """One metric of all arms as dots, a line per arm: places for the page's template to draw at.

    None where no arm has a value.
    """
    values = filled.values[filled.values["metric"] == key]
    if values.empty:
        return None
    low, high = values["value"].min(), values["value"].max()
    step = next(s for s in (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5) if (high - low) / s <= 6)
    first, last = math.floor(low / step), max(math.ceil(high / step), math.floor(low / step) + 1)

    def x(value: float) -> float:
        place = (value / step - first) / (last - first)
        return float(round(_LEFT + place * (_CHART_WIDTH - _LEFT - _RIGHT), 1))

    lines = []
    for index, row in enumerate(filled.rows):
        own = values[values["arm"] == row.arm.name]
        dots = [(x(found.value), {found.seed: found.run_id}) for found in own.itertuples()]
        mean = x(own["value"].mean()) if dots else None
        lines.append({"name": grids.name_of(row), "y": _LINE * index + 20, "dots": dots, "mean": mean})
    ticks = [(x(i * step), grids.number(key, i * step).removesuffix(".0")) for i in range(first, last + 1)]
    return {
        "width": _CHART_WIDTH,
        "left": _LEFT,
        "bottom": _LINE * len(lines) + 8,
        "lines": lines,
        "ticks": ticks,
    }


def _charted(filled: FilledTable) -> list[tuple[str, dict[str, Any]]]:
    """Charts by title of label-free segmentation and C-mIoU, else of the table's first two metrics."""
    keys = [key for key in filled.table.metrics if METRICS[key].percent]
    chosen = [key for key in keys if key in {SEG_MIOU, "val/assignment/cpl_cmiou"}]
    titles, shown = grids.titles(filled), chosen or keys[: grids.DIFFERENCES]
    return [(titles[key], drawn) for key in shown if (drawn := chart(filled, key))]


def html(results: Results, mlflow_command: str, uri: str = "", *, again: float = 0.0) -> str:
    """The page, complete in itself; numbers lead to the runs of a server at `uri`.

    Where it is made `again` after so many seconds, a browser that shows it reads it again.
    """
    links = forms.Links(uri, results.experiment_id)

    def source(runs: Mapping[int, str]) -> dict[str, str]:
        """Where a number leads that was made from `runs`, ids by seed, and the same in words."""
        text = ", ".join(f"seed {seed}: run {run_id}" for seed, run_id in sorted(runs.items()))
        return {"address": links.runs(runs.values()), "text": text}

    metrics = [METRICS[key].over(own.classes) for own in results.tables for key in own.table.metrics]
    return render_page(
        Path(__file__).with_name("report.html.j2"),
        results=results,
        again=again,
        tables=zip(results.tables, grids.grids(results), map(_charted, results.tables), strict=True),
        legend=forms.legend(results),
        lead=lead(results),
        metrics=[*dict.fromkeys(metrics)],
        comparisons=comparisons(results.full, results.stages),
        source=source,
        arms_address=links.arms(results.sweep),
        trial_filter=forms.trial_filter(results.sweep),
        mlflow_command=mlflow_command,
    )


def render_page(template: Path, **values: Any) -> str:
    """A Jinja template of ours, in the reports' style, as an HTML page; a name that it lacks is an error."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader([template.parent, Path(__file__).parent]),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    return environment.get_template(template.name).render(values)


def write(results: Results, folder: Path, uri: str, *, again: float = 0.0) -> list[Path]:
    """Write all five forms, the comparison with the paper's rows, and the figures; the page comes first.

    Args:
        results: What to report.
        folder: Where to; made if needed.
        uri: Tracking URI of the runs.
        again: Seconds after which all this is written again; 0 where it is not.
    """
    files = {
        "report.html": html(results, ui_hint(uri), uri, again=again),
        "tables.md": forms.markdown(results, uri),
        "tables.csv": forms.as_csv(results),
        "tables.tex": forms.latex(results),
        "tables.txt": terminal(results) + "\n",
    }
    if comparisons(results.full, results.stages):
        files |= {
            "comparison.md": forms.comparison_markdown(results),
            "comparison.csv": forms.comparison_csv(results),
        }
    drawings = [*results.curves.values(), *results.figures]
    pictures = {f"figures/{part.file}": part.data for drawing in drawings for part in drawing.parts}
    return write_files(folder, {name: text.encode() for name, text in files.items()} | pictures)


def write_files(folder: Path, contents: Mapping[str, bytes]) -> list[Path]:
    """Write files by their names in `folder`; folders are made as needed."""
    for name, content in contents.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return [folder / name for name in contents]
