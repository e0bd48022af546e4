"""The paper's figures from a sweep's own runs: what they saw of themselves while they trained.

A figure is drawn where its arms and its data exist, and says which of its arms are missing. One that
compares an arm with the full model is drawn only in a sweep that was to train that arm.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from PIL.Image import Image

from sweeps.reporting.histories import (
    ANALYSIS,
    PANEL_ARRAYS,
    PANEL_PICTURES,
    ArmHistories,
    Histories,
)
from sweeps.reporting.plots import (
    AUX_COLOUR,
    BLUE,
    COLOURS,
    GREY,
    LEAST_SHARE,
    OTHERS,
    Canvas,
    Drawing,
    File,
    Part,
    accuracy_lines,
    boxes,
    confidence_map,
    confidences,
    draw_lines,
    label_axes,
    over_iterations,
    picture,
    spread,
    styled,
)
from sweeps.tables.metrics import METRICS, SEG_MIOU, SEG_MIOU_LABELLED
from sweeps.tables.table import Table, without

ARMS: Mapping[str, Mapping[str, Any]] = {
    "full": {},
    "Base": without("GC", "SA", "RAW", "CSC", "DT"),
    "no-SA": without("SA"),
    "no-RAW": without("RAW"),
    "no-CSC": without("CSC"),
    "GT (oracle)": {"s2c.source": "gt"},
    "SPL": {},
    "NO": {"s2c.source": "none"},
    "NS": {"s2c.source": "noise"},
}
"""Arms that figures show, by what they change."""
_MOST_STEPS = 12
"""Rows of the heat map; of more evaluations some are left out, evenly."""

Arms = dict[str, ArmHistories]
Line = tuple[str, ArmHistories, str, str, bool]
"""Label, arm, the metric's key, colour, whether it is dashed."""


def draw_figures(histories: Histories) -> Iterator[Drawing]:
    """All figures that there is data for, in the paper's order."""
    for figure in (_figure_1, _figure_3, _figure_4, _figure_6, _figure_7, _figure_8, _figure_9, _figure_10):
        with styled():
            drawing = figure(histories)
        if drawing is not None and drawing.parts:
            yield drawing


def draw_curves(histories: Histories) -> dict[str, Drawing]:
    """A drawing for each table of which any arm has a history, by the table's name."""
    drawings = {table.name: _curves(histories, table) for table in histories.tables}
    return {name: drawing for name, drawing in drawings.items() if drawing is not None}


def _curves(histories: Histories, table: Table) -> Drawing | None:
    """One metric of a table's arms over iterations; None where no arm has a history.

    The metric is label-free mIoU where the table shows it, else its first that is a fraction on val.
    """
    fractions = [key for key in table.metrics if METRICS[key].percent and key.startswith("val/")]
    key = SEG_MIOU if SEG_MIOU in fractions or not fractions else fractions[0]
    names = [table.reference, *(arm.name for arm in table.arms if arm.name != table.reference)]
    shared = histories.base.train.warmup - 1  # the warm-up is drawn once
    found = {
        name: histories.arm(table.arm(name).changes).metric(key, after=shared if place else -1)
        for place, name in enumerate(names)
    }
    if not any(found.values()):
        return None
    title = f"{METRICS[key].title} over iterations"
    with styled():
        canvas = Canvas(height=3.1)
        for place, (name, by_seed) in enumerate(found.items()):
            colour = OTHERS[(place - 1) % len(OTHERS)] if place else BLUE
            draw_lines(canvas.axes, name, by_seed, colour, dashed=place > len(OTHERS))
        over_iterations(canvas.axes, f"{METRICS[key].title}, %", histories.base.train, first=0)
        canvas.legend()
        part = canvas.part(f"curves-{table.name}", title)
    seeds = max(map(len, found.values()))
    band = "one seed" if seeds == 1 else f"mean over up to {seeds} seeds, band: one sample deviation"
    gone = [name for name, by_seed in found.items() if not by_seed]
    return Drawing(
        title=title,
        caption=f"AN on {histories.base.data.val_split}; {band}. The warm-up is {table.reference}'s.",
        note=f"{', '.join(gone)} without a finished run" if gone else "",
        parts=(part,),
    )


# ---- what figures have in common ----


def _arms(histories: Histories, *names: str) -> Arms:
    return {name: histories.arm(ARMS[name]) for name in names}


def _drawing(
    histories: Histories, number: str, title: str, seen: str, parts: Sequence[Part], arms: Arms
) -> Drawing:
    """A figure with its caption: what one sees, of which data, and which of the paper's it answers to."""
    data = f"{histories.preset}, {histories.base.data.val_split} split"
    return Drawing(
        title=f"Figure {number}: {title}",
        caption=f"{seen} Answers to the paper's Fig. {number}; ours, {data}, AN unless it says ON.",
        note="; ".join(_missing(histories, arms)),
        parts=tuple(parts),
    )


def _missing(histories: Histories, arms: Arms) -> Iterator[str]:
    for name, arm in arms.items():
        seeds = len(arm.trials)
        if not arm.planned:
            yield f"{name} is not in this sweep"
        elif seeds < len(histories.seeds):
            yield f"{name} has {seeds} of {len(histories.seeds)} seeds"


def _lines(
    histories: Histories,
    name: str,
    title: str,
    lines: Sequence[Line],
    y: str,
    *,
    scale: float = 100,
    since: int = 0,
) -> Iterator[Part]:
    """One picture of lines over iterations, after iteration `since`; none where none has a history."""
    canvas = Canvas()
    for label, arm, key, colour, dashed in lines:
        by_seed = arm.metric(key, after=since or -1)
        draw_lines(canvas.axes, label, by_seed, colour, dashed=dashed, scale=scale)
    if canvas.axes.lines:
        over_iterations(canvas.axes, y, histories.base.train, first=since)
        canvas.legend()
        yield canvas.part(name, title)


def _bands(histories: Histories) -> str:
    """How lines over iterations show several seeds."""
    return " Lines are means over seeds, bands one sample deviation." if len(histories.seeds) > 1 else ""


def _xi(histories: Histories) -> str:
    return f"{histories.base.evaluation.xi:g}"


# ---- Figure 1: guidance ----


def _figure_1(histories: Histories) -> Drawing | None:
    arms = _arms(histories, "GT (oracle)", "SPL", "NO", "NS")
    if not (arms["GT (oracle)"].planned or arms["NS"].planned):
        return None

    def lines(key: str) -> list[Line]:
        return [(name, arm, f"val/assignment/{key}", COLOURS[name], False) for name, arm in arms.items()]

    parts = [
        *_lines(histories, "fig1a", "(a) classification", lines("cls_precision"), "precision, %"),
        *_lines(histories, "fig1b", "(b) CPL", lines("cpl_miou"), "CPL mIoU, %"),
        *_panels(arms, "fig1c", "(c) CAMs", ("M",)),
    ]
    seen = (
        "Classification and CAMs where the CAMs are guided by the ground truth (GT, an oracle that weak "
        "supervision does not have), by segmentation pseudo-labels (SPL, CoSA itself), by nothing (NO), or "
        f"by random masks (NS). (a) micro-average at a probability of 0.5; (b) CPL at a threshold of "
        f"{_xi(histories)}. (c) {_rule(histories)}{_bands(histories)}"
    )
    return _drawing(histories, "1", "guidance of the CAMs", seen, parts, arms)


# ---- Figure 3: accuracy by confidence and perplexity ----


def _figure_3(histories: Histories) -> Drawing | None:
    arms, warmup = _arms(histories, "full"), histories.base.train.warmup
    for trial in arms["full"].trials:
        # in the warm-up no threshold is searched, and a shared one knows its trials' settings of it not even
        steps = [step for step in trial.files(ANALYSIS) if step > warmup]
        if steps:
            break
    else:
        return None
    files = [trial.analysis(step) for step in spread(steps, _MOST_STEPS)]
    parts = [confidence_map(files), accuracy_lines(files), confidences(files[-1])]
    seen = (
        "How often CPL of M are right (a) by confidence, the largest activation of a pixel, with the "
        "training's threshold at each step (black line; bins without a pixel are blank), and (c) by "
        f"perplexity, at least {LEAST_SHARE:.0%} of the pixels to a dot. (e) How confidences are "
        "distributed after the last step, split by the threshold. Since co-training began; seed "
        f"{trial.seed}."
    )
    return _drawing(histories, "3", "accuracy of CPL by confidence and perplexity", seen, parts, arms)


# ---- Figures 4, 6 and 7: M and M-dagger, swapping, weighting ----


def _figure_4(histories: Histories) -> Drawing | None:
    arms, warmup = _arms(histories, "full"), histories.base.train.warmup

    def lines(key: str) -> list[Line]:
        return [
            ("M", arms["full"], f"val/assignment/{key}", COLOURS["full"], False),
            ("M†", arms["full"], f"val/assignment/aux_{key}", AUX_COLOUR, True),
        ]

    sure = lines("cpl_miou_sure")  # by thresholds that the warm-up does not search
    parts = [
        *_lines(histories, "fig4a", "(a) all pixels", lines("cpl_miou"), "CPL mIoU, %"),
        *_lines(histories, "fig4b", "(b) low perplexity", sure, "CPL mIoU, %", since=warmup),
    ]
    seen = (
        f"CPL of M, from the last block, and of M†, from an earlier one: (a) at a threshold of "
        f"{_xi(histories)}; (b) at their own thresholds, on pixels with a perplexity of at most "
        f"{histories.base.csc.epsilon:g} alone.{_bands(histories)}"
    )
    return _drawing(histories, "4", "M and M†", seen, parts, arms)


def _figure_6(histories: Histories) -> Drawing | None:
    arms = _arms(histories, "full", "no-SA")
    if not arms["no-SA"].planned:
        return None
    warmup = histories.base.train.warmup

    def lines(key: str) -> list[Line]:
        return [
            (f"{short}, {name}", arm, f"val/{network}/{key}", COLOURS[name], short == "ON")
            for name, arm in arms.items()
            for short, network in (("AN", "assignment"), ("ON", "online"))
        ]

    parts = [
        *_lines(histories, "fig6-spl", "SPL", lines("seg_miou_labelled"), "SPL mIoU, %", since=warmup),
        *_lines(histories, "fig6-cpl", "CPL", lines("cpl_miou"), "CPL mIoU, %", since=warmup),
    ]
    seen = (
        "Pseudo-labels of the online (ON) and the assignment network (AN), where ON learns from AN's (full) "
        f"and where it learns from its own (no-SA), since co-training began. SPL: labelled protocol; CPL at "
        f"a threshold of {_xi(histories)}.{_bands(histories)}"
    )
    return _drawing(histories, "6", "swapping assignments", seen, parts, arms)


def _figure_7(histories: Histories) -> Drawing | None:
    arms = _arms(histories, "full", "no-RAW")
    if not arms["no-RAW"].planned:
        return None
    key, warmup = "val/assignment/cpl_perplexity", histories.base.train.warmup
    lines = [(name, arm, key, COLOURS[name], False) for name, arm in arms.items()]
    parts = [
        *boxes({name: [*_last_files(arm)] for name, arm in arms.items()}),
        *_lines(histories, "fig7-right", "over iterations", lines, "mean perplexity", scale=1, since=warmup),
    ]
    seen = (
        "CPL with reliability-based adaptive weighting (full) and without (no-RAW). Left: of single images "
        "after the last step, seeds together; the box holds the middle half, the whiskers 90 %, the line is "
        f"the median. Right: mean over all pixels, since co-training began.{_bands(histories)}"
    )
    return _drawing(histories, "7", "reliability-based adaptive weighting", seen, parts, arms)


def _last_files(arm: ArmHistories) -> Iterator[File]:
    """The analysis file after the last step, of every seed that has one."""
    for trial in arm.trials:
        if steps := [*trial.files(ANALYSIS)]:
            yield trial.analysis(steps[-1])


# ---- Figure 9: thresholds ----


def _figure_9(histories: Histories) -> Drawing | None:
    arms = _arms(histories, "full")
    parts = [*_threshold_lines(histories, arms["full"]), *_threshold_sweep(histories, arms["full"])]
    seen = (
        "The dynamic threshold of M and of M† during training, a line per seed"
        + (
            "; right: segmentation, labelled protocol, with fixed thresholds and with the dynamic one, "
            "with one sample deviation"
            if len(parts) > 1
            else ""
        )
        + "."
    )
    return _drawing(histories, "9", "thresholds", seen, parts, arms)


def _threshold_lines(histories: Histories, full: ArmHistories) -> Iterator[Part]:
    canvas, train = Canvas(), histories.base.train
    heads = (("M", "train/threshold", BLUE, "-"), ("M†", "train/aux_threshold", AUX_COLOUR, "--"))
    for label, key, colour, dashes in heads:
        for place, found in enumerate(full.metric(key)):
            own = label if place == 0 else None
            canvas.axes.plot(found.index, found, color=colour, linestyle=dashes, linewidth=1.1, label=own)
    if canvas.axes.lines:
        over_iterations(canvas.axes, "threshold ξ", train, first=train.warmup)
        canvas.legend()
        yield canvas.part("fig9-left", "dynamic threshold")


def _threshold_sweep(histories: Histories, full: ArmHistories) -> Iterator[Part]:
    arms = histories.fixed_thresholds()
    fixed = {xi: 100 * found for xi, arm in arms.items() if len(found := arm.last(SEG_MIOU_LABELLED))}
    if len(fixed) < 2:
        return
    canvas = Canvas()
    axes = canvas.axes
    over_seeds = pd.DataFrame(fixed).agg(["mean", "std"]).fillna(0.0)
    axes.errorbar(
        over_seeds.columns,
        over_seeds.loc["mean"],
        over_seeds.loc["std"],
        color=GREY,
        marker="o",
        capsize=2.5,
        elinewidth=1,
        label="fixed",
    )
    dynamic = 100 * full.last(SEG_MIOU_LABELLED)
    if len(dynamic):
        mean, deviation = dynamic.mean(), dynamic.std()
        axes.axhline(mean, color=BLUE, label="dynamic")
        if len(dynamic) > 1:
            axes.axhspan(mean - deviation, mean + deviation, color=BLUE, alpha=0.16, linewidth=0)
    label_axes(axes, "fixed threshold ξ", "labelled mIoU, %")
    canvas.legend()
    yield canvas.part("fig9-right", "fixed thresholds and the dynamic one")


# ---- Figures 8 and 10, and 1 (c): pictures ----


def _figure_8(histories: Histories) -> Drawing | None:
    arms = _arms(histories, "no-CSC", "full")
    if not arms["no-CSC"].planned:
        return None
    parts = list(_panels(arms, "fig8", "no-CSC and full", ("M", "CPL")))
    seen = (
        "CAMs and the CPL made from them, without contrastive separation (no-CSC) and with it (full). "
        + _rule(histories)
    )
    return _drawing(histories, "8", "coexistence and contrastive separation", seen, parts, arms)


def _figure_10(histories: Histories) -> Drawing | None:
    arms, columns = _arms(histories, "Base", "full"), ["M", "prediction"]
    if not arms["Base"].planned:
        arms, columns = _arms(histories, "full"), ["M", "CPL", "SPL", "prediction"]
    if not any(arm.trials for arm in arms.values()):  # a table of the user's own
        table = histories.tables[0]
        names = [table.reference, *(arm.name for arm in table.arms if arm.name != table.reference)][:2]
        arms = {name: histories.arm(table.arm(name).changes) for name in names}
    parts = list(_panels(arms, "fig10", " and ".join(arms), columns))
    seen = "CAMs (M), what is made of them, and the label-free prediction. " + _rule(histories)
    return _drawing(histories, "10", "qualitative comparison", seen, parts, arms)


def _panels(arms: Arms, name: str, title: str, columns: Sequence[str]) -> Iterator[Part]:
    """The same images as several arms see them, each arm at its last step and first finished seed.

    A run of an earlier version left its panel as a picture alone: that is shown as it is.
    """
    tiles = {}
    for place, (arm, found) in enumerate(arms.items()):
        for trial in found.trials[:1]:
            if arrays := [*trial.files(PANEL_ARRAYS).values()]:
                with np.load(io.BytesIO(trial.read(*arrays[-1]))) as content:
                    tiles[arm] = dict(content)
            elif pictures := [*trial.files(PANEL_PICTURES).values()]:
                yield Part(f"{name}-{place + 1}.png", arm, trial.read(*pictures[-1]))
    if tiles:
        yield picture(side_by_side(tiles, columns), name, title)


def side_by_side(panels: Mapping[str, Mapping[str, NDArray[Any]]], columns: Sequence[str]) -> Image:
    """Image and ground truth, then each of `columns` of every arm beside each other.

    Args:
        panels: The arrays of `cosa.evaluation.panels` by arm. An arm with other images than the first is left
            out.
        columns: Some of theirs.
    """
    from cosa.evaluation.pictures import sheet  # torch and all that comes with it

    first, *_ = panels.values()
    places = {column: place for place, column in enumerate(first["columns"].tolist())}
    alike = {
        arm: panel["tiles"]
        for arm, panel in panels.items()
        if np.array_equal(panel["tiles"][:, places["image"]], first["tiles"][:, places["image"]])
    }
    shown = {column: first["tiles"][:, places[column]] for column in ("image", "ground truth")}
    shown |= {f"{column}\n{arm}": own[:, places[column]] for column in columns for arm, own in alike.items()}
    return sheet(np.stack([*shown.values()], axis=1), titles=[*shown], legends=first["legends"])


def _rule(histories: Histories) -> str:
    """Which images a panel shows, and that nobody picked them."""
    settings = histories.base.evaluation
    rules = {
        "random": f"drawn at random with seed {settings.panel_seed}",
        "coexistence": (
            f"drawn with seed {settings.panel_seed} among those with {_listed(settings.coexistence)}"
        ),
        "first": "the first of the split",
    }
    return (
        f"Images: {rules[settings.panel_choice]}, the same for every arm, none picked by hand; the last "
        "evaluation of the first seed."
    )


def _listed(names: Sequence[str]) -> str:
    return " or ".join(([", ".join(names[:-1])] if names[1:] else []) + [names[-1]]) if names else "nothing"
