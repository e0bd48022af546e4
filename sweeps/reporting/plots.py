"""How every figure looks: colours and fonts, lines with their bands, pictures of counts, SVG and PNG.

Figures are drawn with Matplotlib's objects, not with pyplot: nothing global is changed. A part is as wide as
a phone and as a column of a paper, so that its text is readable on both. Colours are Okabe and Ito's, which
colour-blind readers can tell apart; an arm has the same one in every figure. The same data gives the same
bytes.
"""

from __future__ import annotations

import base64
import io
import itertools
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from html import escape
from typing import Any, TypeVar

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib import style
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.collections import PathCollection
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, MaxNLocator
from PIL import Image

from cosa.config import TrainConfig
from sweeps.reporting.histories import merge_bins, quantile, read_bins

BLUE, GREEN, VERMILION, PURPLE = "#0072b2", "#009e73", "#d55e00", "#b8659a"
ORANGE = "#d98c00"  # Okabe and Ito's, a little darker for thin lines on paper
GREY, BLACK = "#8a8f96", "#1d2126"
COLOURS = {"full": BLUE, "no-SA": ORANGE, "no-RAW": VERMILION, "no-CSC": GREEN}
COLOURS |= {"SPL": BLUE, "GT (oracle)": BLACK, "NO": GREY, "NS": PURPLE}
"""By arm; SPL is the full model, as the guidance study calls it."""
AUX_COLOUR = PURPLE
"""Of M-dagger, beside M in the arm's colour."""

OTHERS = (ORANGE, GREEN, VERMILION, PURPLE, GREY, BLACK)
"""Of a table's arms beside its reference, solid and then dashed."""
LEAST_SHARE = 0.01
"""Share of the pixels that a dot of accuracy by perplexity stands for, at least."""
_MOST_LINES = 5
_ANSWERS = "answers"  # of groups in an SVG whose points say something
_MARKS = {"whislo": 0.05, "q1": 0.25, "med": 0.5, "q3": 0.75, "whishi": 0.95}
"""Of a box: which share of the images lies below each of its marks."""

Item = TypeVar("Item")
File = Mapping[str, Any]
"""The content of an analysis file with, by name, the counts that an evaluation leaves of one network."""

_STYLE = {
    "font.family": "DejaVu Sans",  # Matplotlib brings it along; drawn as paths, no reader needs it
    "font.size": 9,
    "svg.fonttype": "path",
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e4e7eb",
    "legend.fontsize": 8.5,
    "legend.handlelength": 1.8,
    "legend.columnspacing": 1.2,
    "legend.borderaxespad": 0.2,
    "lines.linewidth": 1.6,
    "lines.markersize": 3.2,
    **dict.fromkeys(("axes.spines.top", "axes.spines.right", "legend.frameon"), False),
    **dict.fromkeys(("axes.linewidth", "grid.linewidth"), 0.8),
    **dict.fromkeys(("axes.edgecolor", "xtick.color", "ytick.color"), "#636c76"),
    **dict.fromkeys(("axes.labelcolor", "xtick.labelcolor", "ytick.labelcolor", "text.color"), BLACK),
}
WIDTH, HEIGHT = 4.1, 2.8  # inches


@dataclass(frozen=True)
class Part:
    """One picture of a figure."""

    file: str
    """Name of its own file."""
    title: str
    data: bytes
    """SVG or PNG, as the file's name says."""

    @property
    def wide(self) -> bool:
        """Whether it needs the width of a page rather than that of a column."""
        return self.file.endswith(".png")

    @property
    def inline(self) -> str:
        """As it stands in a page that needs no other file; the points of an SVG answer there."""
        title, stem = escape(self.title), self.file.partition(".")[0]
        if self.wide:
            data = base64.b64encode(self.data).decode()
            return f'<img class="png" src="data:image/png;base64,{data}" alt="{title}">'
        svg = self.data[self.data.index(b"<svg") :].decode()
        svg = re.sub(r' xmlns(:\w+)?="[^"]*"', "", svg)  # which HTML knows
        # a page has several, with equal names inside
        svg = re.sub(r'( id="|"#|url\(#)', rf"\g<1>{stem}-", svg)
        return svg.replace("<svg", f'<svg role="img" aria-label="{title}"', 1).replace("*{", "svg *{", 1)


@dataclass(frozen=True)
class Drawing:
    """A figure of the paper, from our runs."""

    title: str
    caption: str
    note: str
    """What is missing of it, or nothing."""
    parts: tuple[Part, ...]


def styled() -> AbstractContextManager[None]:
    """Within it a Canvas is drawn on, from the first line to `part`: our style, whatever the user's is."""
    return style.context(["default", _STYLE])


class Canvas:
    """A picture in the making: `axes` to draw on, then `part` once."""

    def __init__(self, columns: int = 1, height: float = HEIGHT) -> None:
        """Axes side by side, `height` inches high."""
        self._figure = Figure(figsize=(WIDTH, height), layout="constrained")
        FigureCanvasSVG(self._figure)
        self.all_axes: list[Axes] = [*self._figure.subplots(1, columns, squeeze=False)[0]]
        self.axes = self.all_axes[0]

    def legend(self) -> None:
        """What the lines and colours of the first axes stand for, above them: it never hides data."""
        handles, labels = self.axes.get_legend_handles_labels()
        columns = 2 if len(labels) == 4 else 3
        self._figure.legend(handles, labels, loc="outside upper left", ncols=columns)

    def colour_bar(self, mappable: mpl.cm.ScalarMappable, label: str, *, below: bool = False) -> None:
        """What the colours of `mappable` stand for, beside the axes or below them."""
        where = "bottom" if below else "right"
        bar = self._figure.colorbar(mappable, ax=self.axes, location=where, pad=0.02, aspect=28)
        bar.set_label(label)
        bar.outline.set_visible(False)

    def part(self, name: str, title: str) -> Part:
        """The picture as SVG: the same bytes from the same data.

        A point of a line or of dots says under the mouse what the gid of its artist says, a line for each of
        its points or one for all; without a gid, the label and both numbers.
        """
        texts: list[str] = []
        for axes in self.all_axes:
            texts += _answer(axes)
        svg = io.BytesIO()
        with mpl.rc_context({"svg.hashsalt": name}):
            nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
            self._figure.savefig(svg, format="svg", metadata=nothing)
        pieces = re.split(rf'(<g id="{_ANSWERS}\d+">.*?</g>)', svg.getvalue().decode(), flags=re.DOTALL)
        told = map(escape, texts)
        pieces[1::2] = [
            re.sub("(<use [^>]*)/>", lambda use: f"{use[1]}><title>{next(told)}</title></use>", piece)
            for piece in pieces[1::2]
        ]
        return Part(f"{name}.svg", title, "".join(pieces).encode())


def _answer(axes: Axes) -> Iterator[str]:
    """Lays an unseen point over each one of lines and dots; what they are to say, in the order of drawing."""
    sides = sorted(axes.get_xlim()), sorted(axes.get_ylim())
    for artist in (*axes.lines, *axes.collections):
        label, texts = str(artist.get_label()), (artist.get_gid() or "").splitlines()
        if isinstance(artist, Line2D) and artist.get_transform() == axes.transData:
            points = np.asarray(artist.get_xydata(), float)
        elif isinstance(artist, PathCollection):
            points = np.asarray(artist.get_offsets(), float)
        else:
            continue  # an axis, a band, bars
        if not texts and label.startswith(("_child", "_nolegend")):
            continue  # Matplotlib's names of what has none
        if not texts:
            texts = [f"{label.strip('_')}: {y:.4g} at {axes.get_xlabel()} {x:g}" for x, y in points]
        elif len(texts) == 1:
            texts *= len(points)
        inside = np.all(
            [(low <= own) & (own <= high) for own, (low, high) in zip(points.T, sides, strict=True)], 0
        )
        axes.add_artist(
            Line2D(
                *points[inside].T,
                linestyle="",
                marker="o",
                markersize=8,
                alpha=0,
                zorder=9,
                gid=f"{_ANSWERS}{len(axes.artists)}",
            )
        )
        yield from itertools.compress(texts, inside)


def picture(image: Image.Image, name: str, title: str) -> Part:
    """A picture of pixels as PNG."""
    data = io.BytesIO()
    image.save(data, format="PNG", optimize=True)
    return Part(f"{name}.png", title, data.getvalue())


Line = tuple[Sequence[pd.Series], Mapping[str, Any]]
"""A metric's history of each seed, by step, and its label and look as `Axes.plot` takes them."""


def draw_line(axes: Axes, histories: Sequence[pd.Series], *, scale: float = 100, **look: Any) -> None:
    """The mean over seeds with a band of one sample deviation, at the steps that all seeds have.

    One seed has no band, none draws nothing.
    """
    if not histories:
        return
    by_seed = scale * pd.concat(histories, axis="columns", join="inner")
    mean, deviation = by_seed.mean(axis="columns"), by_seed.std(axis="columns")
    axes.plot(mean, marker="o" if len(mean) <= 30 else "", **look)
    if len(histories) > 1:
        band = (mean - deviation, mean + deviation)
        axes.fill_between(mean.index, *band, color=look["color"], alpha=0.16, linewidth=0)


def over_iterations(
    file: str,
    title: str,
    y: str,
    lines: Iterable[Line],
    train: TrainConfig,
    *,
    first: int = 0,
    scale: float = 100,
    height: float = HEIGHT,
) -> Iterator[Part]:
    """A picture of lines from iteration `first` to the last, the warm-up's end marked; none of nothing."""
    canvas = Canvas(height=height)
    axes = canvas.axes
    for by_seed, look in lines:
        draw_line(axes, by_seed, scale=scale, **look)
    if not axes.lines:
        return
    axes.set(xlabel="iteration", ylabel=y)
    axes.xaxis.set_major_formatter(FuncFormatter(thousands))
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    margin = 0.03 * (train.iterations - first)
    axes.set_xlim(first - margin, train.iterations + margin)
    if first < train.warmup < train.iterations:
        axes.axvline(train.warmup, color=GREY, linewidth=0.9, linestyle=":", label="end of warm-up")
    canvas.legend()
    yield canvas.part(file, title)


def thousands(value: float, _place: object = None) -> str:
    """An iteration, 12000 as 12k."""
    return f"{value / 1000:g}k" if value >= 10_000 else f"{value:g}"


def spread(items: Sequence[Item], most: int) -> list[Item]:
    """At most so many of them, evenly, the first and the last among them."""
    places = np.linspace(0, len(items) - 1, min(len(items), most)).round().astype(int)
    return [items[place] for place in places]


def _bins(content: File, kind: str) -> pd.DataFrame:
    """A histogram of M in an analysis file: of `confidence` or `perplexity`."""
    return read_bins(content["cam"][kind])


def accuracy(bins: pd.DataFrame) -> pd.Series:
    """Of each bin in percent; NaN where it is empty."""
    return 100 * (bins["correct"] / bins["count"])


def middles(bins: pd.DataFrame) -> pd.Series:
    """Of each bin; of an open last one its lower edge, all that is known."""
    return (bins["low"] + bins["high"].where(np.isfinite(bins["high"]), bins["low"])) / 2


def confidence_map(files: Sequence[File]) -> Part:
    """Accuracy by confidence, a row per file, with each one's threshold."""
    canvas = Canvas()
    axes = canvas.axes
    axes.grid(visible=False)
    bins = [_bins(content, "confidence") for content in files]
    edges = [*bins[0]["low"], bins[0]["high"].iloc[-1]]
    rows = np.arange(len(files) + 1) - 0.5
    values = np.ma.masked_invalid([accuracy(own) for own in bins])
    mesh = axes.pcolormesh(
        edges, rows, values, cmap="cividis", vmin=0, vmax=100, edgecolors="face", linewidth=0.3
    )
    xis = [content["xi"] for content in files]
    for colour, width in (("white", 3.6), (BLACK, 1.5)):
        axes.vlines(xis, rows[:-1], rows[1:], color=colour, linewidth=width)
    axes.set_yticks(range(len(files)), [thousands(content["step"]) for content in files])
    axes.set(xlabel="confidence (line: threshold ξ)", ylabel="iteration")
    canvas.colour_bar(mesh, "accuracy of CPL, %")
    return canvas.part("fig3a", "(a) accuracy by confidence")


def accuracy_lines(files: Sequence[File]) -> Part:
    """Accuracy by perplexity, a line for some of the files, the first and the last among them."""
    canvas = Canvas()
    shown = spread(files, _MOST_LINES)
    colours = mpl.colormaps["cividis"](np.linspace(0, 0.85, len(shown)))
    for place, content in enumerate(shown):
        # pixels right at the threshold are few: bins of their own would show chance
        bins = merge_bins(_bins(content, "perplexity"), LEAST_SHARE)
        label = f"{'step ' if place == 0 else ''}{thousands(content['step'])}"
        canvas.axes.plot(middles(bins), accuracy(bins), color=colours[place], label=label, marker="o")
    canvas.axes.set(xlabel="perplexity", ylabel="accuracy of CPL, %")
    canvas.legend()
    return canvas.part("fig3c", "(c) accuracy by perplexity")


def confidences(content: File) -> Part:
    """How confidences are distributed, in one colour below the threshold and in another above it."""
    canvas = Canvas()
    axes = canvas.axes
    bins, xi = _bins(content, "confidence"), content["xi"]
    shares = 100 * bins["count"] / max(bins["count"].sum(), 1)
    for label, colour, low, high in (("background", GREY, 0.0, xi), ("foreground", BLUE, xi, 1.0)):
        left, right = bins["low"].clip(low, high), bins["high"].clip(low, high)
        own = right > left  # a bin that the threshold cuts is drawn in both colours
        axes.bar(
            left[own], shares[own], (right - left)[own], align="edge", color=colour, label=label, linewidth=0
        )
    axes.axvline(xi, color=BLACK, linewidth=1.2, linestyle="--", label=f"threshold ξ = {xi:.2f}")
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter("{x:g}")
    axes.set(xlabel="confidence", ylabel="share of pixels, % (log)")
    canvas.legend()
    return canvas.part("fig3e", f"(e) confidences after {thousands(content['step'])} iterations")


def boxes(files: Mapping[str, Sequence[File]]) -> Iterator[Part]:
    """Box plots of single images by arm: mIoU, mean perplexity, and distance to (1, 0), the perfect CPL.

    Args:
        files: By arm, one of each seed; arms without any are left out, and nothing is drawn of none.
    """
    images = {name: [content["images"] for content in found] for name, found in files.items() if found}
    if not images:
        return
    canvas = Canvas(columns=3)
    kinds = {
        "iou": ("CPL mIoU, %", 100),
        "perplexity": ("mean perplexity", 1),
        "distance": ("MAE to (1, 0)", 1),
    }
    for axes, (kind, (title, scale)) in zip(canvas.all_axes, kinds.items(), strict=True):
        axes.set_title(title, fontsize=9)
        axes.grid(visible=False, axis="x")
        for place, (name, own) in enumerate(images.items()):
            bins = [read_bins(content[kind]) for content in own]
            total = bins[0].assign(count=sum(one["count"] for one in bins))
            axes.bxp(
                [{mark: scale * quantile(total, share) for mark, share in _MARKS.items()}],
                positions=[place],
                widths=0.6,
                showfliers=False,
                patch_artist=True,
                boxprops={"facecolor": COLOURS[name], "alpha": 0.35, "edgecolor": COLOURS[name]},
                medianprops={"color": BLACK, "linewidth": 1.6},
                whiskerprops={"color": COLOURS[name]},
                capprops={"color": COLOURS[name]},
            )
        axes.set_xticks(range(len(images)), list(images))
    yield canvas.part("fig7-left", "over images")
