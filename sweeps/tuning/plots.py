"""Pictures of a search: its history, its rungs, slices through the space, parallel coordinates, importances.

Percent of the label-free mIoU throughout. A trial that was stopped has no final value; it is a cross at the
lower edge, and its values at the rungs have a picture of their own.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from matplotlib import cm
from matplotlib.axes import Axes
from matplotlib.colors import Normalize
from matplotlib.ticker import MaxNLocator

from sweeps.reporting.plots import BLUE, GREY, ORANGE, VERMILION, Canvas, Part, label_axes, styled
from sweeps.tuning.record import PRESET, Record
from sweeps.tuning.space import Choice, Dimension, Momentum, Range, Space

_METRIC = "label-free mIoU, %"


def draw(records: Sequence[Record], space: Space, importances: Mapping[str, float], last: int) -> list[Part]:
    """Every picture that the trials are enough for.

    Args:
        records: Of the search.
        space: What was varied.
        importances: By parameter; may be empty.
        last: Step of the final evaluation.
    """
    shown = [r for r in records if math.isfinite(r.last_value)]
    complete = [r for r in shown if r.state == "complete"]
    if not complete:
        return []
    with styled():
        parts = [_history(shown)]
        if importances:
            parts.append(_importance(importances))
        if any(record.decisions for record in shown):
            parts.append(_rungs(shown, last))
        if len(complete) > 1:
            parts.append(_parallel(complete, space))
        parts += _slices(shown, space)
    return parts


def _history(shown: Sequence[Record]) -> Part:
    canvas = Canvas()
    axes = canvas.axes
    complete = [r for r in shown if r.state == "complete"]
    best = list(itertools.accumulate((100 * r.value for r in complete), max))
    axes.step([r.number for r in complete], best, where="post", color=BLUE, label="best so far")
    _dots(axes, [(r.number, r) for r in shown])
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    label_axes(axes, "trial", _METRIC)
    canvas.legend()
    return canvas.part("search-history", "Every trial in the order of its start")


def _dots(axes: Axes, placed: Sequence[tuple[float, Record]]) -> None:
    """Trials by kind: the paper's rows, suggested ones, stopped ones at the lower edge, the preset on top."""
    values = [100 * r.value for _, r in placed if r.state == "complete"]
    low, high = min(values), max(values)
    margin = 0.1 * (high - low) or 0.5
    edge = low - 1.2 * margin
    axes.set_ylim(edge - 0.5 * margin, high + margin)
    kinds = {
        "stopped at a rung": ([(x, r) for x, r in placed if r.state != "complete"], GREY, "x", 16),
        "suggested": ([(x, r) for x, r in placed if r.state == "complete" and not r.origin], BLUE, "o", 20),
        "row of the paper": (
            [(x, r) for x, r in placed if r.state == "complete" and r.origin not in {"", PRESET}],
            ORANGE,
            "s",
            18,
        ),
        "preset": (
            [(x, r) for x, r in placed if r.origin == PRESET and r.state == "complete"],
            VERMILION,
            "D",
            30,
        ),
    }
    for label, (found, colour, marker, size) in kinds.items():
        if found:
            axes.scatter(
                [x for x, _ in found],
                [100 * r.value if r.state == "complete" else edge for _, r in found],
                s=size,
                color=colour,
                marker=marker,
                label=label,
                zorder=3,
                linewidths=0.9,
            )


def _importance(importances: Mapping[str, float]) -> Part:
    names = sorted(importances, key=lambda name: importances[name])
    canvas = Canvas(height=0.9 + 0.28 * len(names))
    bars = canvas.axes.barh(names, [importances[name] for name in names], color=BLUE, height=0.62)
    canvas.axes.bar_label(bars, [f"{importances[name]:.2f}" for name in names], padding=3, fontsize=8.5)
    canvas.axes.set_xlim(0, 1.15 * max(importances.values()) or 1)
    canvas.axes.grid(visible=False, axis="y")
    canvas.axes.set_xlabel("share of the variance explained")
    return canvas.part("search-importance", "What matters: fANOVA over finished trials")


def _rungs(shown: Sequence[Record], last: int) -> Part:
    canvas = Canvas()
    labels: set[str] = set()
    for record in shown:
        points = {decision.step: decision.value for decision in record.decisions}
        if record.state == "complete":
            points[last] = record.value
        preset = record.origin == PRESET
        label = "preset" if preset else "finished" if record.state == "complete" else "stopped"
        colour = VERMILION if preset else BLUE if record.state == "complete" else GREY
        canvas.axes.plot(
            list(points),
            [100 * value for value in points.values()],
            color=colour,
            marker="o",
            linewidth=1.8 if preset else 0.9,
            alpha=1 if preset else 0.7,
            label="_" if label in labels else label,
            zorder=4 if preset else 3 if record.state == "complete" else 2,
        )
        labels.add(label)
    steps = sorted({d.step for r in shown for d in r.decisions} | {last})
    canvas.axes.set_xticks(steps)
    label_axes(canvas.axes, "iteration", _METRIC)
    canvas.legend()
    return canvas.part("search-rungs", "At the rungs, and which went on")


def _parallel(complete: Sequence[Record], space: Space) -> Part:
    """One line per finished trial over all dimensions, the best ones dark and on top."""
    dimensions = space.dimensions
    canvas = Canvas(height=1.5 + 0.45 * len(dimensions))
    axes = canvas.axes
    low, high = min(r.value for r in complete), max(r.value for r in complete)
    shade = cm.ScalarMappable(Normalize(100 * low, 100 * high), "viridis_r")
    for record in sorted(complete, key=lambda r: r.value):
        places = [_place(dimension, record) for dimension in dimensions]
        xs = [place for place in places if place is not None]
        ys = [row for row, place in enumerate(places) if place is not None]
        height = (record.value - low) / ((high - low) or 1.0)
        axes.plot(xs, ys, color=shade.cmap(height), linewidth=1.1, alpha=0.85, marker="o")
    ranges = [f"{dimension.name}\n{' – '.join(_ends(dimension))}" for dimension in dimensions]
    axes.set_yticks(range(len(dimensions)), ranges)
    axes.set_xlim(-0.04, 1.04)
    axes.set_xticks([0, 1], ["low end", "high end"])
    axes.set_ylim(len(dimensions) - 0.6, -0.4)
    canvas.colour_bar(shade, _METRIC, below=True)
    return canvas.part("search-parallel", "Every finished trial through all dimensions")


def _place(dimension: Dimension, record: Record) -> float | None:
    """Where a trial stands between a dimension's ends, in [0, 1]; None where it does not have it."""
    if dimension.setting not in record.changes:
        return None
    value = record.changes[dimension.setting]
    if isinstance(dimension, Choice):
        return dimension.values.index(value) / max(1, len(dimension.values) - 1)
    low, high = _limits(dimension)
    number = float(dimension.parameter(value))
    if isinstance(dimension, Momentum) or dimension.log:
        return math.log(number / low) / math.log(high / low)
    return (number - low) / (high - low)


def _limits(dimension: Range | Momentum) -> tuple[float, float]:
    ends = [float(dimension.parameter(end)) for end in dimension.ends()]
    return min(ends), max(ends)


def _ends(dimension: Dimension) -> tuple[str, str]:
    if isinstance(dimension, Choice):
        return str(dimension.values[0]), str(dimension.values[-1])
    low, high = _limits(dimension)
    return f"{low:.3g}", f"{high:.3g}"


def _slices(shown: Sequence[Record], space: Space) -> Iterator[Part]:
    for dimension in space.dimensions:
        own = [record for record in shown if dimension.setting in record.changes]
        if sum(record.state == "complete" for record in own) < 2:
            continue
        canvas = Canvas(height=2.2)
        axes = canvas.axes
        _dots(axes, [(_across(dimension, record), record) for record in own])
        name = f"{dimension.name}, steps" if isinstance(dimension, Momentum) else dimension.name
        label_axes(axes, name, _METRIC)
        if isinstance(dimension, Choice):
            axes.set_xticks(range(len(dimension.values)), [str(value) for value in dimension.values])
            axes.set_xlim(-0.5, len(dimension.values) - 0.5)
        elif isinstance(dimension, Momentum) or dimension.log:
            axes.set_xscale("log")
            low, high = _limits(dimension)
            ticks = [low, math.sqrt(low * high), high]
            axes.set_xlim(low * (low / high) ** 0.04, high * (high / low) ** 0.04)
            axes.set_xticks(ticks, [f"{tick:.3g}" for tick in ticks])
            axes.minorticks_off()
        else:
            low, high = _limits(dimension)
            axes.set_xlim(low - 0.04 * (high - low), high + 0.04 * (high - low))
        yield canvas.part(f"search-slice-{dimension.name.replace('.', '-')}", dimension.name)


def _across(dimension: Dimension, record: Record) -> float:
    value: Any = record.changes[dimension.setting]
    if isinstance(dimension, Choice):
        return float(dimension.values.index(value))
    return float(dimension.parameter(value))
