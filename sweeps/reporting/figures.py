"""The paper's figures from a sweep's own runs: what they saw of themselves while they trained.

A figure is drawn where its arms and its data exist, and says which of its arms are missing. One that
compares an arm with the full model is drawn only in a sweep that was to train that arm.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from sweeps.reporting import panel_tiles
from sweeps.reporting.analysis_plots import (
    LEAST_SHARE,
    accuracy_lines,
    boxes,
    confidence_map,
    confidences,
    spread,
)
from sweeps.reporting.histories import Recordings, Series
from sweeps.reporting.plots import (
    AUX_COLOUR,
    BLUE,
    COLOURS,
    GREY,
    Canvas,
    Drawing,
    Part,
    draw_lines,
    label_axes,
    over_iterations,
    picture,
    styled,
)
from sweeps.tables.table import without

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

Arms = dict[str, Series]
Line = tuple[str, list[dict[int, float]], str, bool]
"""Label, a history for each seed, colour, whether it is dashed."""


def draw_figures(recordings: Recordings) -> Iterator[Drawing]:
    """All figures that there is data for, in the paper's order."""
    for figure in (_figure_1, _figure_3, _figure_4, _figure_6, _figure_7, _figure_8, _figure_9, _figure_10):
        with styled():
            drawing = figure(recordings)
        if drawing is not None and drawing.parts:
            yield drawing


def _arms(recordings: Recordings, *names: str) -> Arms:
    return {name: recordings.series(ARMS[name]) for name in names}


def _drawing(
    recordings: Recordings, number: str, title: str, seen: str, parts: Sequence[Part], arms: Arms
) -> Drawing:
    """A figure with its caption: what one sees, of which data, and which of the paper's it answers to."""
    data = f"{recordings.preset}, {recordings.base.data.val_split} split"
    return Drawing(
        title=f"Figure {number}: {title}",
        caption=f"{seen} Answers to the paper's Fig. {number}; ours, {data}, AN unless it says ON.",
        note="; ".join(_missing(recordings, arms)),
        parts=tuple(parts),
    )


def _missing(recordings: Recordings, arms: Arms) -> Iterator[str]:
    for name, series in arms.items():
        seeds = len(series.recordings)
        if not series.planned:
            yield f"{name} is not in this sweep"
        elif seeds < len(recordings.seeds):
            yield f"{name} has {seeds} of {len(recordings.seeds)} seeds"


def _lines(
    recordings: Recordings,
    name: str,
    title: str,
    lines: Sequence[Line],
    y: str,
    *,
    scale: float = 100,
    first: int = 0,
) -> Iterator[Part]:
    """One picture of lines over iterations; none where none has a history."""
    if any(histories for _, histories, _, _ in lines):
        canvas = Canvas()
        for label, histories, colour, dashed in lines:
            draw_lines(canvas.axes, label, histories, colour, dashed=dashed, scale=scale)
        over_iterations(canvas.axes, y, recordings.base.train, first=first)
        canvas.legend()
        yield canvas.part(name, title)


def _figure_1(recordings: Recordings) -> Drawing | None:
    arms = _arms(recordings, "GT (oracle)", "SPL", "NO", "NS")
    if not (arms["GT (oracle)"].planned or arms["NS"].planned):
        return None

    def lines(key: str) -> list[Line]:
        return [
            (name, series.histories(f"val/assignment/{key}"), COLOURS[name], False)
            for name, series in arms.items()
        ]

    parts = [
        *_lines(recordings, "fig1a", "(a) classification", lines("cls_precision"), "precision, %"),
        *_lines(recordings, "fig1b", "(b) CPL", lines("cpl_miou"), "CPL mIoU, %"),
        *_panels(arms, "fig1c", "(c) CAMs", ("M",)),
    ]
    seen = (
        "Classification and CAMs where the CAMs are guided by the ground truth (GT, an oracle that weak "
        "supervision does not have), by segmentation pseudo-labels (SPL, CoSA itself), by nothing (NO), or "
        f"by random masks (NS). (a) micro-average at a probability of 0.5; (b) CPL at a threshold of "
        f"{_xi(recordings)}. (c) {_rule(recordings)}{_bands(recordings)}"
    )
    return _drawing(recordings, "1", "guidance of the CAMs", seen, parts, arms)


def _bands(recordings: Recordings) -> str:
    """How lines over iterations show several seeds."""
    return " Lines are means over seeds, bands one sample deviation." if len(recordings.seeds) > 1 else ""


def _xi(recordings: Recordings) -> str:
    return f"{recordings.base.evaluation.xi:g}"


def _figure_3(recordings: Recordings) -> Drawing | None:
    arms, warmup = _arms(recordings, "full"), recordings.base.train.warmup
    # in the warm-up no threshold is searched, and a shared one knows its trials' settings of it not even
    found = next((r for r in arms["full"].recordings if r.steps()[-1:] > [warmup]), None)
    if found is None:
        return None
    steps = [step for step in found.steps() if step > warmup]
    files = [found.analysis(step) for step in spread(steps, _MOST_STEPS)]
    parts = [confidence_map(files), accuracy_lines(files), confidences(files[-1])]
    seen = (
        "How often CPL of M are right (a) by confidence, the largest activation of a pixel, with the "
        "training's threshold at each step (black line; bins without a pixel are blank), and (c) by "
        f"perplexity, at least {LEAST_SHARE:.0%} of the pixels to a dot. (e) How confidences are distributed "
        f"after the last step, split by the threshold. Since co-training began; seed {found.seed}."
    )
    return _drawing(recordings, "3", "accuracy of CPL by confidence and perplexity", seen, parts, arms)


def _figure_4(recordings: Recordings) -> Drawing | None:
    arms, warmup = _arms(recordings, "full"), recordings.base.train.warmup

    def lines(key: str, after: int = -1) -> list[Line]:
        m, aux = (f"val/assignment/{head}{key}" for head in ("", "aux_"))
        return [
            ("M", arms["full"].histories(m, after=after), COLOURS["full"], False),
            ("M†", arms["full"].histories(aux, after=after), AUX_COLOUR, True),
        ]

    sure = lines("cpl_miou_sure", after=warmup)  # by thresholds that the warm-up does not search
    parts = [
        *_lines(recordings, "fig4a", "(a) all pixels", lines("cpl_miou"), "CPL mIoU, %"),
        *_lines(recordings, "fig4b", "(b) low perplexity", sure, "CPL mIoU, %", first=warmup),
    ]
    seen = (
        f"CPL of M, from the last block, and of M†, from an earlier one: (a) at a threshold of "
        f"{_xi(recordings)}; (b) at their own thresholds, on pixels with a perplexity of at most "
        f"{recordings.base.csc.epsilon:g} alone.{_bands(recordings)}"
    )
    return _drawing(recordings, "4", "M and M†", seen, parts, arms)


def _figure_6(recordings: Recordings) -> Drawing | None:
    arms = _arms(recordings, "full", "no-SA")
    if not arms["no-SA"].planned:
        return None
    warmup = recordings.base.train.warmup

    def lines(key: str, after: int) -> list[Line]:
        return [
            (
                f"{short}, {name}",
                series.histories(f"val/{network}/{key}", after=after),
                COLOURS[name],
                short == "ON",
            )
            for name, series in arms.items()
            for short, network in (("AN", "assignment"), ("ON", "online"))
        ]

    parts = [
        *_lines(
            recordings, "fig6-spl", "SPL", lines("seg_miou_labelled", warmup), "SPL mIoU, %", first=warmup
        ),
        *_lines(recordings, "fig6-cpl", "CPL", lines("cpl_miou", warmup), "CPL mIoU, %", first=warmup),
    ]
    seen = (
        "Pseudo-labels of the online (ON) and the assignment network (AN), where ON learns from AN's (full) "
        f"and where it learns from its own (no-SA), since co-training began. SPL: labelled protocol; CPL at "
        f"a threshold of {_xi(recordings)}.{_bands(recordings)}"
    )
    return _drawing(recordings, "6", "swapping assignments", seen, parts, arms)


def _figure_7(recordings: Recordings) -> Drawing | None:
    arms = _arms(recordings, "full", "no-RAW")
    if not arms["no-RAW"].planned:
        return None
    key, warmup = "val/assignment/cpl_perplexity", recordings.base.train.warmup
    histories = [
        (name, series.histories(key, after=warmup), COLOURS[name], False) for name, series in arms.items()
    ]
    parts = [
        *boxes({name: [*_last_files(series)] for name, series in arms.items()}),
        *_lines(
            recordings, "fig7-right", "over iterations", histories, "mean perplexity", scale=1, first=warmup
        ),
    ]
    seen = (
        "CPL with reliability-based adaptive weighting (full) and without (no-RAW). Left: of single images "
        "after the last step, seeds together; the box holds the middle half, the whiskers 90 %, the line is "
        f"the median. Right: mean over all pixels, since co-training began.{_bands(recordings)}"
    )
    return _drawing(recordings, "7", "reliability-based adaptive weighting", seen, parts, arms)


def _last_files(series: Series) -> Iterator[dict[str, Any]]:
    """The analysis file after the last step, of every seed that has one."""
    for recording in series.recordings:
        if steps := recording.steps():
            yield recording.analysis(steps[-1])


def _figure_8(recordings: Recordings) -> Drawing | None:
    arms = _arms(recordings, "no-CSC", "full")
    if not arms["no-CSC"].planned:
        return None
    parts = list(_panels(arms, "fig8", "no-CSC and full", ("M", "CPL")))
    seen = (
        "CAMs and the CPL made from them, without contrastive separation (no-CSC) and with it (full). "
        + _rule(recordings)
    )
    return _drawing(recordings, "8", "coexistence and contrastive separation", seen, parts, arms)


def _figure_9(recordings: Recordings) -> Drawing | None:
    arms = _arms(recordings, "full")
    parts = [*_threshold_lines(recordings, arms["full"]), *_threshold_sweep(recordings, arms["full"])]
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
    return _drawing(recordings, "9", "thresholds", seen, parts, arms)


def _threshold_lines(recordings: Recordings, full: Series) -> Iterator[Part]:
    canvas = Canvas()
    heads = (("M", "train/threshold", BLUE, "-"), ("M†", "train/aux_threshold", AUX_COLOUR, "--"))
    found = False
    for label, key, colour, dashes in heads:
        for index, history in enumerate(full.histories(key)):
            found = True
            canvas.axes.plot(
                list(history),
                list(history.values()),
                color=colour,
                linestyle=dashes,
                linewidth=1.1,
                label=label if index == 0 else None,
            )
    if found:
        train = recordings.base.train
        over_iterations(canvas.axes, "threshold ξ", train, first=train.warmup)
        canvas.legend()
        yield canvas.part("fig9-left", "dynamic threshold")


def _threshold_sweep(recordings: Recordings, full: Series) -> Iterator[Part]:
    key = "val/assignment/seg_miou_labelled"
    arms = recordings.fixed_thresholds()
    fixed = {xi: values for xi, series in arms.items() if (values := series.last(key))}
    if len(fixed) < 2:
        return
    canvas = Canvas()
    axes = canvas.axes
    means = [100 * float(np.mean(values)) for values in fixed.values()]
    deviations = [100 * float(np.std(v, ddof=1)) if len(v) > 1 else 0.0 for v in fixed.values()]
    axes.errorbar(
        list(fixed), means, deviations, color=GREY, marker="o", capsize=2.5, elinewidth=1, label="fixed"
    )
    dynamic = full.last(key)
    if dynamic:
        mean = 100 * float(np.mean(dynamic))
        axes.axhline(mean, color=BLUE, label="dynamic")
        if len(dynamic) > 1:
            deviation = 100 * float(np.std(dynamic, ddof=1))
            axes.axhspan(mean - deviation, mean + deviation, color=BLUE, alpha=0.16, linewidth=0)
    label_axes(axes, "fixed threshold ξ", "labelled mIoU, %")
    canvas.legend()
    yield canvas.part("fig9-right", "fixed thresholds and the dynamic one")


def _figure_10(recordings: Recordings) -> Drawing | None:
    arms, columns = _arms(recordings, "Base", "full"), ["M", "prediction"]
    if not arms["Base"].planned:
        arms, columns = _arms(recordings, "full"), ["M", "CPL", "SPL", "prediction"]
    parts = list(_panels(arms, "fig10", " and ".join(arms), columns))
    seen = "CAMs (M), what is made of them, and the label-free prediction. " + _rule(recordings)
    return _drawing(recordings, "10", "qualitative comparison", seen, parts, arms)


def _panels(arms: Arms, name: str, title: str, columns: Sequence[str]) -> Iterator[Part]:
    """The same images as several arms see them, each arm at its last step and first finished seed."""
    panels = {
        arm: panel
        for arm, series in arms.items()
        if series.recordings and (panel := series.recordings[0].panel()) is not None
    }
    image = panel_tiles.compose(panels, columns)
    if image is not None:
        yield picture(image, name, title)


def _rule(recordings: Recordings) -> str:
    """Which images a panel shows, and that nobody picked them."""
    settings = recordings.base.evaluation
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
