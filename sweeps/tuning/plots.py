"""Pictures of a search: history, pruning steps, slices of the space, parallel coordinates, importances.

Percent of the label-free mIoU throughout. Drawn by hand: Optuna's own pictures know neither the preset nor
trials that were stopped, and theirs of one pruning step or of eight dimensions cannot be read on a phone.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence

from matplotlib import cm
from matplotlib.axes import Axes
from matplotlib.colors import Normalize
from matplotlib.ticker import MaxNLocator
from optuna.trial import FrozenTrial, TrialState

from sweeps.reporting.plots import BLUE, GREY, ORANGE, VERMILION, Canvas, Part, label_axes, styled
from sweeps.tuning.space import Choice, Momentum
from sweeps.tuning.study import PRESET, SearchStudy, finished, last_value, origin

SLICE = "search-slice-"
"""How the files of slices begin."""
_METRIC = "label-free mIoU, %"


def draw(study: SearchStudy, importances: Mapping[str, float], last: int) -> list[Part]:
    """Every picture that the trials are enough for.

    Args:
        study: The search.
        importances: By parameter; may be empty.
        last: Step of the final evaluation.
    """
    shown = [trial for trial in study.trials if math.isfinite(last_value(trial))]
    complete = finished(shown)
    if not complete:
        return []
    with styled():
        parts = [_history(shown)]
        if importances:
            parts.append(_importance(importances))
        if any(trial.intermediate_values for trial in shown):
            parts.append(_steps(shown, last))
        if len(complete) > 1:
            parts.append(_parallel(study, complete))
        return [*parts, *_slices(study, shown)]


def _history(shown: Sequence[FrozenTrial]) -> Part:
    canvas = Canvas()
    complete = [trial for trial in shown if trial.state == TrialState.COMPLETE]
    best = list(itertools.accumulate((100 * last_value(trial) for trial in complete), max))
    canvas.axes.step([t.number for t in complete], best, where="post", color=BLUE, label="best so far")
    _dots(canvas.axes, [(trial.number, trial) for trial in shown])
    canvas.axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    label_axes(canvas.axes, "trial", _METRIC)
    canvas.legend()
    return canvas.part("search-history", "Every trial in the order of its start")


def _dots(axes: Axes, placed: Sequence[tuple[float, FrozenTrial]]) -> None:
    """Trials by kind; one that was stopped has no final value and is a cross at the lower edge."""
    values = [100 * last_value(trial) for _, trial in placed if trial.state == TrialState.COMPLETE]
    margin = 0.1 * (max(values) - min(values)) or 0.5
    edge = min(values) - 1.2 * margin
    axes.set_ylim(edge - 0.5 * margin, max(values) + margin)
    looks = {
        "stopped on its way": (GREY, "x", 16),
        "suggested": (BLUE, "o", 20),
        "row of the paper": (ORANGE, "s", 18),
        "preset": (VERMILION, "D", 30),
    }
    for kind, (colour, marker, size) in looks.items():
        own = [(x, trial) for x, trial in placed if _kind(trial) == kind]
        xs = [x for x, _ in own]
        ys = [100 * last_value(t) if t.state == TrialState.COMPLETE else edge for _, t in own]
        if own:
            axes.scatter(xs, ys, s=size, color=colour, marker=marker, label=kind, zorder=3, linewidths=0.9)


def _kind(trial: FrozenTrial) -> str:
    if trial.state != TrialState.COMPLETE:
        return "stopped on its way"
    return {"": "suggested", PRESET: "preset"}.get(origin(trial), "row of the paper")


def _importance(importances: Mapping[str, float]) -> Part:
    names = sorted(importances, key=lambda name: importances[name])
    canvas = Canvas(height=0.9 + 0.28 * len(names))
    bars = canvas.axes.barh(names, [importances[name] for name in names], color=BLUE, height=0.62)
    canvas.axes.bar_label(bars, fmt="%.2f", padding=3, fontsize=8.5)
    canvas.axes.set_xlim(0, 1.15 * max(importances.values()) or 1)
    canvas.axes.grid(visible=False, axis="y")
    canvas.axes.set_xlabel("share of the variance explained")
    return canvas.part("search-importance", "What matters: fANOVA over finished trials")


def _steps(shown: Sequence[FrozenTrial], last: int) -> Part:
    canvas = Canvas()
    ticks = {last}
    looks = {
        "stopped": (GREY, 0.9, 0.7, 2),
        "finished": (BLUE, 0.9, 0.7, 3),
        "preset": (VERMILION, 1.8, 1, 4),
    }
    for trial in shown:
        points = dict(trial.intermediate_values)
        kind = "preset" if origin(trial) == PRESET else "stopped"
        if trial.state == TrialState.COMPLETE:
            points[last] = last_value(trial)
            kind = "preset" if origin(trial) == PRESET else "finished"
        colour, width, alpha, order = looks[kind]
        known = canvas.axes.get_legend_handles_labels()[1]
        canvas.axes.plot(
            list(points),
            [100 * value for value in points.values()],
            color=colour,
            marker="o",
            linewidth=width,
            alpha=alpha,
            label=f"_{kind}" if kind in known else kind,
            zorder=order,
        )
        ticks |= set(points)
    canvas.axes.set_xticks(sorted(ticks))
    label_axes(canvas.axes, "iteration", _METRIC)
    canvas.legend()
    return canvas.part("search-rungs", "On their way, and which went on")


def _parallel(study: SearchStudy, complete: Sequence[FrozenTrial]) -> Part:
    """One line per finished trial over all dimensions, the best ones dark and on top."""
    dimensions = study.space.dimensions
    canvas = Canvas(height=1.5 + 0.45 * len(dimensions))
    values = [100 * last_value(trial) for trial in complete]
    low, high = min(values), max(values)
    shade = cm.ScalarMappable(Normalize(low, high), "viridis_r")
    for trial in reversed(complete):
        changes = study.changes(trial)
        points = [
            (dimension.place(changes[dimension.setting]), row)
            for row, dimension in enumerate(dimensions)
            if dimension.setting in changes
        ]
        colour = shade.cmap((100 * last_value(trial) - low) / ((high - low) or 1.0))
        canvas.axes.plot(*zip(*points, strict=True), color=colour, linewidth=1.1, alpha=0.85, marker="o")
    ends = [[*dimension.marks().values()] for dimension in dimensions]
    names = [f"{d.name}\n{low} – {high}" for d, (low, *_, high) in zip(dimensions, ends, strict=True)]
    canvas.axes.set_yticks(range(len(dimensions)), names)
    canvas.axes.set_xlim(-0.04, 1.04)
    canvas.axes.set_xticks([0, 1], ["low end", "high end"])
    canvas.axes.set_ylim(len(dimensions) - 0.6, -0.4)
    canvas.colour_bar(shade, _METRIC, below=True)
    return canvas.part("search-parallel", "Every finished trial through all dimensions")


def _slices(study: SearchStudy, shown: Sequence[FrozenTrial]) -> Iterator[Part]:
    changes = {trial.number: study.changes(trial) for trial in shown}
    for dimension in study.space.dimensions:
        own = [trial for trial in shown if dimension.setting in changes[trial.number]]
        if len(finished(own)) < 2:
            continue
        marks = dimension.marks()
        canvas = Canvas(height=2.2)
        _dots(
            canvas.axes, [(dimension.place(changes[trial.number][dimension.setting]), trial) for trial in own]
        )
        name = f"{dimension.name}, steps" if isinstance(dimension, Momentum) else dimension.name
        label_axes(canvas.axes, name, _METRIC)
        margin = 0.3 if isinstance(dimension, Choice) else 0.04
        canvas.axes.set_xlim(-margin, 1 + margin)
        canvas.axes.set_xticks(list(marks), list(marks.values()))
        yield canvas.part(f"{SLICE}{dimension.name.replace('.', '-')}", dimension.name)
