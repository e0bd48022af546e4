"""Pictures of a search: history, pruning steps, slices of the space, parallel coordinates, importances.

Percent of the label-free mIoU throughout. Drawn by hand: Optuna's own pictures know neither the preset nor
trials that were stopped, and theirs of one pruning step or of eight dimensions cannot be read on a phone.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib import cm
from matplotlib.axes import Axes
from matplotlib.colors import Normalize
from matplotlib.ticker import MaxNLocator
from optuna.trial import FrozenTrial, TrialState

from sweeps.reporting.plots import BLUE, GREY, ORANGE, VERMILION, Canvas, Part, styled
from sweeps.tuning.space import Choice, Dimension, Momentum
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
        for dimension in study.space.dimensions:
            own = [trial for trial in shown if dimension.setting in study.changes(trial)]
            if len(finished(own)) > 1:
                parts.append(_slice(study, dimension, own))
        return parts


def _history(shown: Sequence[FrozenTrial]) -> Part:
    canvas = Canvas()
    complete = [trial for trial in shown if trial.state == TrialState.COMPLETE]
    best = itertools.accumulate((100 * last_value(trial) for trial in complete), max)
    canvas.axes.step([t.number for t in complete], [*best], where="post", color=BLUE, label="best so far")
    _dots(canvas.axes, [trial.number for trial in shown], shown)
    canvas.axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    canvas.axes.set(xlabel="trial", ylabel=_METRIC)
    canvas.legend()
    return canvas.part("search-history", "Every trial in the order of its start")


def _dots(axes: Axes, xs: Sequence[float], trials: Sequence[FrozenTrial]) -> None:
    """Trials by kind; one that was stopped has no final value and is a cross at the lower edge."""
    values = [100 * last_value(trial) for trial in finished(trials)]
    margin = 0.1 * (max(values) - min(values)) or 0.5
    edge = min(values) - 1.2 * margin
    axes.set_ylim(edge - 0.5 * margin, max(values) + margin)
    looks: dict[str, dict[str, Any]] = {
        "stopped on its way": {"color": GREY, "marker": "x", "s": 16},
        "suggested": {"color": BLUE, "marker": "o", "s": 20},
        "row of the paper": {"color": ORANGE, "marker": "s", "s": 18},
        "preset": {"color": VERMILION, "marker": "D", "s": 30},
    }
    origins = {"": "suggested", PRESET: "preset"}
    points: dict[str, list[tuple[float, float, str]]] = {kind: [] for kind in looks}
    for x, trial in zip(xs, trials, strict=True):
        kind, y = "stopped on its way", edge
        if trial.state == TrialState.COMPLETE:
            kind, y = origins.get(origin(trial), "row of the paper"), 100 * last_value(trial)
        points[kind].append((x, y, _said(trial)))
    for kind, own in points.items():
        if own:
            across, up, said = zip(*own, strict=True)
            look = {"label": kind, "zorder": 3, "linewidths": 0.9, "gid": "\n".join(said), **looks[kind]}
            axes.scatter(across, up, **look)


def _said(trial: FrozenTrial) -> str:
    """What a trial's points answer to the mouse."""
    if trial.state != TrialState.COMPLETE:
        return f"trial {trial.number}, stopped on its way"
    return f"trial {trial.number}: {100 * last_value(trial):.1f}"


def _importance(importances: Mapping[str, float]) -> Part:
    canvas = Canvas(height=0.9 + 0.28 * len(importances))
    names, shares = zip(*sorted(importances.items(), key=lambda item: item[1]), strict=True)
    bars = canvas.axes.barh(names, shares, color=BLUE, height=0.62)
    canvas.axes.bar_label(bars, fmt="%.2f", padding=3, fontsize=8.5)
    canvas.axes.set_xlim(0, 1.15 * max(shares) or 1)
    canvas.axes.grid(visible=False, axis="y")
    canvas.axes.set_xlabel("share of the variance explained")
    return canvas.part("search-importance", "What matters: fANOVA over finished trials")


def _steps(shown: Sequence[FrozenTrial], last: int) -> Part:
    canvas = Canvas()
    looks: dict[str, dict[str, Any]] = {
        "stopped": {"color": GREY, "linewidth": 0.9, "alpha": 0.7, "zorder": 2},
        "finished": {"color": BLUE, "linewidth": 0.9, "alpha": 0.7, "zorder": 3},
        "preset": {"color": VERMILION, "linewidth": 1.8, "alpha": 1, "zorder": 4},
    }
    ticks = {last}
    for trial in shown:
        complete = trial.state == TrialState.COMPLETE
        points = trial.intermediate_values | ({last: last_value(trial)} if complete else {})
        kind = "preset" if origin(trial) == PRESET else "finished" if complete else "stopped"
        known = canvas.axes.get_legend_handles_labels()[1]
        values = [100 * value for value in points.values()]
        name = f"_{kind}" if kind in known else kind
        said = _said(trial)
        canvas.axes.plot([*points], values, marker="o", label=name, gid=said, **looks[kind])
        ticks |= set(points)
    canvas.axes.set_xticks(sorted(ticks))
    canvas.axes.set(xlabel="iteration", ylabel=_METRIC)
    canvas.legend()
    return canvas.part("search-rungs", "On their way, and which went on")


def _parallel(study: SearchStudy, complete: Sequence[FrozenTrial]) -> Part:
    """One line per finished trial over all dimensions, the best ones dark and on top."""
    dimensions = study.space.dimensions
    canvas = Canvas(height=1.5 + 0.45 * len(dimensions))
    values = [100 * last_value(trial) for trial in complete]
    low, high = min(values), max(values)
    shade = cm.ScalarMappable(Normalize(low, high), "viridis_r")
    for value, trial in zip(reversed(values), reversed(complete), strict=True):
        changes = study.changes(trial)
        rows = {row: d for row, d in enumerate(dimensions) if d.setting in changes}
        places = [dimension.place(changes[dimension.setting]) for dimension in rows.values()]
        colour = shade.cmap((value - low) / ((high - low) or 1.0))
        axes, said = canvas.axes, _said(trial)
        axes.plot(places, [*rows], color=colour, linewidth=1.1, alpha=0.85, marker="o", gid=said)
    ends = [[*dimension.marks().values()] for dimension in dimensions]
    names = [f"{d.name}\n{low} – {high}" for d, (low, *_, high) in zip(dimensions, ends, strict=True)]
    canvas.axes.set_yticks(range(len(dimensions)), names)
    canvas.axes.set_xlim(-0.04, 1.04)
    canvas.axes.set_xticks([0, 1], ["low end", "high end"])
    canvas.axes.set_ylim(len(dimensions) - 0.6, -0.4)
    canvas.colour_bar(shade, _METRIC, below=True)
    return canvas.part("search-parallel", "Every finished trial through all dimensions")


def _slice(study: SearchStudy, dimension: Dimension, own: Sequence[FrozenTrial]) -> Part:
    canvas = Canvas(height=2.2)
    _dots(canvas.axes, [dimension.place(study.changes(trial)[dimension.setting]) for trial in own], own)
    unit = ", steps" if isinstance(dimension, Momentum) else ""
    canvas.axes.set(xlabel=dimension.name + unit, ylabel=_METRIC)
    margin = 0.3 if isinstance(dimension, Choice) else 0.04
    canvas.axes.set_xlim(-margin, 1 + margin)
    canvas.axes.set_xticks([*dimension.marks()], [*dimension.marks().values()])
    return canvas.part(f"{SLICE}{dimension.name.replace('.', '-')}", dimension.name)
