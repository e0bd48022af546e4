"""The paper's figures from a sweep's own runs: what they saw of themselves while they trained.

A figure is drawn where its arms and its data exist, and says which of its arms are missing. One that
compares an arm with the full model is drawn only in a sweep that was to train that arm.
"""

from __future__ import annotations

import io
import itertools
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from PIL.Image import Image

from sweeps.reporting import plots
from sweeps.reporting.histories import ANALYSIS, PANEL_ARRAYS, PANEL_PICTURES, ArmHistories, Histories
from sweeps.reporting.plots import AUX_COLOUR, BLUE, COLOURS, GREY, OTHERS, Part
from sweeps.tables.metrics import METRICS, SEG_MIOU, SEG_MIOU_LABELLED
from sweeps.tables.table import Table, without

ARMS: Mapping[str, Mapping[str, Any]] = {
    "full": {},
    "Base": without("GC", "SA", "RAW", "CSC", "DT"),
    **{f"no-{component}": without(component) for component in ("SA", "RAW", "CSC")},
    "GT (oracle)": {"s2c.source": "gt"},
    "SPL": {},
    "NO": {"s2c.source": "none"},
    "NS": {"s2c.source": "noise"},
}
"""Arms that figures show, by what they change."""
_MOST_STEPS = 12
"""Rows of the heat map; of more evaluations some are left out, evenly."""

Arms = Mapping[str, ArmHistories]
View = tuple[str, str, str]
"""A line of an arm: its label, how the names of its metrics begin, and how it is dashed."""
AN: tuple[View, ...] = (("{arm}", "val/assignment/", "-"),)
AN_AND_ON: tuple[View, ...] = (("AN, {arm}", "val/assignment/", "-"), ("ON, {arm}", "val/online/", "--"))
HEADS: tuple[View, ...] = (("M", "val/assignment/", "-"), ("M†", "val/assignment/aux_", "--"))


def _arms(*names: str) -> dict[str, Mapping[str, Any]]:
    return {name: ARMS[name] for name in names}


@dataclass(frozen=True)
class Figure:
    """One of the paper's figures: what it shows of which arms."""

    number: str
    title: str
    seen: str
    """What one sees, `{xi}` and other facts of the sweep to be filled in."""
    parts: tuple[Callable[[Histories, Arms], Iterator[Part]], ...]
    arms: Mapping[str, Mapping[str, Any]] = field(default_factory=lambda: _arms("full"))
    """By name, what each changes."""
    needs: tuple[str, ...] = ()
    """Arms of which the sweep must have planned one."""

    def draw(self, histories: Histories, facts: Mapping[str, str]) -> plots.Drawing | None:
        """The figure with its caption; None where the sweep has nothing of it."""
        arms = {name: histories.arm(changes) for name, changes in self.arms.items()}
        if self.needs and not any(arms[name].planned for name in self.needs):
            return None
        with plots.styled():
            parts = tuple(part for draw in self.parts for part in draw(histories, arms))
        if not parts:
            return None
        seen = self.seen.format(**facts, right=_FIXED_THRESHOLDS if len(parts) > 1 else "")
        data = (
            f"{histories.preset}, {histories.base.data.val_split} split, {_networks(arms)} unless it says ON"
        )
        wanted = len(histories.seeds)
        counts = {name: len(arm.trials) for name, arm in arms.items()}
        missing = [
            f"{name} has {n} of {wanted} seeds" if arms[name].planned else f"{name} is not in this sweep"
            for name, n in counts.items()
            if n < wanted
        ]
        return plots.Drawing(
            title=f"Figure {self.number}: {self.title}",
            caption=f"{seen} Answers to the paper's Fig. {self.number}; ours, {data}.",
            note="; ".join(missing),
            parts=parts,
        )


def _networks(arms: Arms) -> str:
    """Which network the arms are judged on."""
    online = [name for name, arm in arms.items() if arm.trials and arm.network == "online"]
    return f"AN (ON of {', '.join(online)}, without SA)" if online else "AN"


def draw_figures(histories: Histories) -> Iterator[plots.Drawing]:
    """All figures that there is data for, in the paper's order."""
    facts = _facts(histories)
    for figure in (*FIGURES, _figure_10(histories)):
        if drawing := figure.draw(histories, facts):
            yield drawing


def draw_curves(histories: Histories) -> dict[str, plots.Drawing]:
    """One metric of a table's arms over iterations, by the table's name where any arm has a history.

    The metric is label-free mIoU where the table shows it, else its first that is a fraction on val.
    """
    drawings, shared = {}, histories.base.train.warmup - 1  # the warm-up is drawn once
    for table in histories.tables:
        fractions = [key for key in table.metrics if METRICS[key].percent and key.startswith("val/")]
        key = SEG_MIOU if SEG_MIOU in fractions or not fractions else fractions[0]
        arms = {name: histories.arm(table.arm(name).changes) for name in _reference_first(table)}
        lines = {}
        for place, (name, arm) in enumerate(arms.items()):
            colour, dashes = OTHERS[(place - 1) % len(OTHERS)], "--" if place > len(OTHERS) else "-"
            look = {"label": name, "color": colour if place else BLUE, "linestyle": dashes}
            lines[name] = (arm.metric(key, after=shared if place else -1), look)
        titles = f"{METRICS[key].title} over iterations", f"{METRICS[key].title}, %"
        with plots.styled():
            parts = plots.over_iterations(
                f"curves-{table.name}", *titles, lines.values(), histories.base.train, height=3.1
            )
            if not (drawn := tuple(parts)):
                continue
        seeds = max(len(by_seed) for by_seed, _ in lines.values())
        band = "one seed" if seeds == 1 else f"mean over up to {seeds} seeds, band: one sample deviation"
        judged = f"{_networks(arms)} on {histories.base.data.val_split}"
        gone = ", ".join(name for name, (by_seed, _) in lines.items() if not by_seed)
        drawings[table.name] = plots.Drawing(
            title=titles[0],
            caption=f"{judged}; {band}. The warm-up is {table.reference}'s.",
            note=f"{gone} without a finished run" if gone else "",
            parts=drawn,
        )
    return drawings


def _reference_first(table: Table) -> list[str]:
    return [table.reference, *(arm.name for arm in table.arms if arm.name != table.reference)]


def _facts(histories: Histories) -> dict[str, str]:
    """What captions tell of a sweep; of a panel's images, that nobody picked them."""
    settings = histories.base.evaluation
    coexisting = " or ".join(", ".join(settings.coexistence).rsplit(", ", 1)) or "nothing"
    rules = {
        "random": f"drawn at random with seed {settings.panel_seed}",
        "coexistence": f"drawn with seed {settings.panel_seed} among those with {coexisting}",
        "first": "the first of the split",
    }
    several = len(histories.seeds) > 1
    return {
        "xi": f"{settings.xi:g}",
        "epsilon": f"{histories.base.csc.epsilon:g}",
        "bands": " Lines are means over seeds, bands one sample deviation." if several else "",
        "rule": f"Images: {rules[settings.panel_choice]}, the same for every arm, none picked by hand; the "
        "last evaluation of the first seed.",
        "seed": next((str(seed) for seed, _ in _cotrained(histories, histories.arm({}))), ""),
    }


@dataclass(frozen=True)
class Lines:
    """One picture of a metric over iterations; none without a history."""

    file: str
    title: str
    key: str
    y: str
    views: tuple[View, ...] = AN
    """What it shows of each arm."""
    cotraining: bool = False
    """Whether it leaves out the warm-up."""

    def __call__(self, histories: Histories, arms: Arms) -> Iterator[Part]:
        train = histories.base.train
        since = train.warmup if self.cotraining else 0
        lines: list[plots.Line] = []
        for name, arm in arms.items():
            for label, prefix, dashes in self.views:
                if label.startswith("AN") and arm.network == "online":
                    continue  # it has none
                colour = AUX_COLOUR if prefix.endswith("aux_") else COLOURS[name]
                look = {"label": label.format(arm=name), "color": colour, "linestyle": dashes}
                lines.append((arm.metric(prefix + self.key, after=since or -1), look))
        scale = 100 if METRICS[AN[0][1] + self.key].percent else 1
        return plots.over_iterations(self.file, self.title, self.y, lines, train, first=since, scale=scale)


@dataclass(frozen=True)
class Panels:
    """The same images as several arms see them, each arm at its last step and first finished seed.

    A run of an earlier version left its panel as a picture alone: that is shown as it is.
    """

    file: str
    title: str
    columns: Sequence[str]

    def __call__(self, _histories: Histories, arms: Arms) -> Iterator[Part]:
        tiles = {}
        for place, (arm, found) in enumerate(arms.items()):
            for trial in found.trials[:1]:
                if arrays := trial.last_file(PANEL_ARRAYS):
                    with np.load(io.BytesIO(arrays)) as content:
                        shown = str(content["network"]) if "network" in content else "assignment"
                        tiles[_whose(arm, found, shown)] = dict(content)
                elif data := trial.last_file(PANEL_PICTURES):
                    yield Part(f"{self.file}-{place + 1}.png", _whose(arm, found, "assignment"), data)
        if tiles:
            yield plots.picture(side_by_side(tiles, self.columns), self.file, self.title)


def _whose(arm: str, found: ArmHistories, shown: str) -> str:
    """An arm's name, with a word where its panel is that of an earlier version, which always showed AN."""
    return arm if shown == found.network else f"{arm} (AN)"


def _cotrained(histories: Histories, arm: ArmHistories) -> Iterator[tuple[int, list[Callable[[], bytes]]]]:
    """Seeds with what reads their analysis files of co-training.

    In the warm-up no threshold is searched, and a shared one knows its trials' settings of it not even.
    """
    for trial in arm.trials:
        files = trial.files(ANALYSIS).items()
        if late := [read for step, read in files if step > histories.base.train.warmup]:
            yield trial.seed, late


def _accuracies(histories: Histories, arms: Arms) -> Iterator[Part]:
    for _, reads in itertools.islice(_cotrained(histories, arms["full"]), 1):
        files = [_counts(arms["full"], read()) for read in plots.spread(reads, _MOST_STEPS)]
        yield from (plots.confidence_map(files), plots.accuracy_lines(files), plots.confidences(files[-1]))


def _boxes(_histories: Histories, arms: Arms) -> Iterator[Part]:
    def last(arm: ArmHistories) -> list[plots.File]:
        files = (trial.last_file(ANALYSIS) for trial in arm.trials)
        return [_counts(arm, data) for data in files if data]

    return plots.boxes({name: last(arm) for name, arm in arms.items()})


def _counts(arm: ArmHistories, data: bytes) -> plots.File:
    """The content of an analysis file with the counts of the network that the arm is judged on."""
    content: dict[str, Any] = json.loads(data)
    counts: dict[str, Any] = content["networks"][arm.network]
    return content | counts


def _threshold_lines(histories: Histories, arms: Arms) -> Iterator[Part]:
    train, lines = histories.base.train, []
    for head, prefix, colour, dashes in (("M", "", BLUE, "-"), ("M†", "aux_", AUX_COLOUR, "--")):
        for place, found in enumerate(arms["full"].metric(f"train/{prefix}threshold")):
            look = {"color": colour, "linestyle": dashes, "linewidth": 1.1}
            lines.append(([found], look | {"label": f"_{head}" if place else head}))
    titles = "fig9-left", "dynamic threshold", "threshold ξ"
    return plots.over_iterations(*titles, lines, train, first=train.warmup, scale=1)


def _threshold_sweep(histories: Histories, arms: Arms) -> Iterator[Part]:
    thresholds = histories.fixed_thresholds()
    fixed = {xi: 100 * found for xi, arm in thresholds.items() if len(found := arm.last(SEG_MIOU_LABELLED))}
    if len(fixed) < 2:
        return
    canvas = plots.Canvas()
    axes = canvas.axes
    mean, deviation = pd.DataFrame(fixed).mean(), pd.DataFrame(fixed).std().fillna(0)
    axes.errorbar(
        mean.index, mean, deviation, color=GREY, marker="o", capsize=2.5, elinewidth=1, label="fixed"
    )
    dynamic = 100 * arms["full"].last(SEG_MIOU_LABELLED)
    if len(dynamic):
        middle, away = dynamic.mean(), dynamic.std()
        axes.axhline(middle, color=BLUE, label="dynamic")
        if len(dynamic) > 1:
            axes.axhspan(middle - away, middle + away, color=BLUE, alpha=0.16, linewidth=0)
    axes.set(xlabel="fixed threshold ξ", ylabel="labelled mIoU, %")
    canvas.legend()
    yield canvas.part("fig9-right", "fixed thresholds and the dynamic one")


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


_FIXED_THRESHOLDS = (
    "; right: segmentation, labelled protocol, with fixed thresholds and with the dynamic one, with one "
    "sample deviation"
)
FIGURES = (
    Figure(
        "1",
        "guidance of the CAMs",
        "Classification and CAMs where the CAMs are guided by the ground truth (GT, an oracle that weak "
        "supervision does not have), by segmentation pseudo-labels (SPL, CoSA itself), by nothing (NO), or "
        "by random masks (NS). (a) micro-average at a probability of 0.5; (b) CPL at a threshold of {xi}. "
        "(c) {rule}{bands}",
        parts=(
            Lines("fig1a", "(a) classification", "cls_precision", "precision, %"),
            Lines("fig1b", "(b) CPL", "cpl_miou", "CPL mIoU, %"),
            Panels("fig1c", "(c) CAMs", ("M",)),
        ),
        arms=_arms("GT (oracle)", "SPL", "NO", "NS"),
        needs=("GT (oracle)", "NS"),
    ),
    Figure(
        "3",
        "accuracy of CPL by confidence and perplexity",
        "How often CPL of M are right (a) by confidence, the largest activation of a pixel, with the "
        "training's threshold at each step (black line; bins without a pixel are blank), and (c) by "
        f"perplexity, at least {plots.LEAST_SHARE:.0%} of the pixels to a dot. (e) How confidences are "
        "distributed after the last step, split by the threshold. Since co-training began; seed {seed}.",
        parts=(_accuracies,),
    ),
    Figure(
        "4",
        "M and M†",
        "CPL of M, from the last block, and of M†, from an earlier one: (a) at a threshold of {xi}; (b) at "
        "their own thresholds, on pixels with a perplexity of at most {epsilon} alone.{bands}",
        parts=(
            Lines("fig4a", "(a) all pixels", "cpl_miou", "CPL mIoU, %", HEADS),
            Lines("fig4b", "(b) low perplexity", "cpl_miou_sure", "CPL mIoU, %", HEADS, cotraining=True),
        ),
    ),
    Figure(
        "6",
        "swapping assignments",
        "Pseudo-labels of the online (ON) and the assignment network (AN), where ON learns from AN's (full) "
        "and where it learns from its own (no-SA), since co-training began. SPL: labelled protocol; CPL at a "
        "threshold of {xi}.{bands}",
        parts=(
            Lines("fig6-spl", "SPL", "seg_miou_labelled", "SPL mIoU, %", AN_AND_ON, cotraining=True),
            Lines("fig6-cpl", "CPL", "cpl_miou", "CPL mIoU, %", AN_AND_ON, cotraining=True),
        ),
        arms=_arms("full", "no-SA"),
        needs=("no-SA",),
    ),
    Figure(
        "7",
        "reliability-based adaptive weighting",
        "CPL with reliability-based adaptive weighting (full) and without (no-RAW). Left: of single images "
        "after the last step, seeds together; the box holds the middle half, the whiskers 90 %, the line is "
        "the median. Right: mean over all pixels, since co-training began.{bands}",
        parts=(
            _boxes,
            Lines("fig7-right", "over iterations", "cpl_perplexity", "mean perplexity", cotraining=True),
        ),
        arms=_arms("full", "no-RAW"),
        needs=("no-RAW",),
    ),
    Figure(
        "8",
        "coexistence and contrastive separation",
        "CAMs and the CPL made from them, without contrastive separation (no-CSC) and with it (full). {rule}",
        parts=(Panels("fig8", "no-CSC and full", ("M", "CPL")),),
        arms=_arms("no-CSC", "full"),
        needs=("no-CSC",),
    ),
    Figure(
        "9",
        "thresholds",
        "The dynamic threshold of M and of M† during training, a line per seed{right}.",
        parts=(_threshold_lines, _threshold_sweep),
    ),
)
"""All but the last, in the paper's order."""


def _figure_10(histories: Histories) -> Figure:
    """Of the full model, beside the baseline where there is one; else of a table of the user's own."""
    if histories.arm(ARMS["Base"]).planned:
        arms, columns = _arms("Base", "full"), ["M", "prediction"]
    else:
        arms, columns = _arms("full"), ["M", "CPL", "SPL", "prediction"]
    if not any(histories.arm(changes).trials for changes in arms.values()):
        table = histories.tables[0]
        arms = {name: table.arm(name).changes for name in _reference_first(table)[:2]}
    return Figure(
        "10",
        "qualitative comparison",
        "CAMs (M), what is made of them, and the label-free prediction. {rule}",
        parts=(Panels("fig10", " and ".join(arms), columns),),
        arms=arms,
    )
