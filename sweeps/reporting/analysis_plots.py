"""Pictures from analysis files, the counts that an evaluation leaves: Figure 3 and the boxes of Figure 7."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap
from numpy.typing import NDArray

from sweeps.reporting.histories import Bins
from sweeps.reporting.plots import BLACK, BLUE, COLOURS, GREY, Canvas, Part, label_axes, thousands

_WHISKERS = (0.05, 0.25, 0.5, 0.75, 0.95)
_MOST_LINES = 5
LEAST_SHARE = 0.01
"""Share of the pixels that a dot of accuracy by perplexity stands for, at least."""

File = Mapping[str, Any]
"""An analysis file's content."""


def spread(steps: Sequence[int], most: int) -> list[int]:
    """At most so many of `steps`, evenly, the first and the last among them."""
    places = np.linspace(0, len(steps) - 1, min(len(steps), most)).round().astype(int)
    return [steps[place] for place in places]


def _bins(content: File, kind: str) -> Bins:
    """A histogram of M of AN in an analysis file: of `confidence` or `perplexity`."""
    return Bins.read(content["networks"]["assignment"]["cam"][kind])


def accuracy_rows(files: Sequence[File]) -> NDArray[np.float64]:
    """Accuracy in percent by analysis file and bin of confidence; NaN where a bin is empty."""
    return np.stack([100 * _bins(content, "confidence").accuracy for content in files])


def confidence_map(files: Sequence[File]) -> Part:
    """Accuracy by confidence, a row per file, with each one's threshold."""
    canvas = Canvas()
    axes = canvas.axes
    axes.grid(visible=False)
    edges = _bins(files[0], "confidence").edges
    rows = np.arange(len(files) + 1) - 0.5
    values = np.ma.masked_invalid(accuracy_rows(files))
    mesh = axes.pcolormesh(
        edges, rows, values, cmap="cividis", vmin=0, vmax=100, edgecolors="face", linewidth=0.3
    )
    xis = [content["xi"] for content in files]
    for colour, width in (("white", 3.6), (BLACK, 1.5)):
        axes.vlines(xis, rows[:-1], rows[1:], color=colour, linewidth=width)
    axes.set_yticks(range(len(files)), [thousands(content["step"]) for content in files])
    label_axes(axes, "confidence (line: threshold ξ)", "iteration")
    canvas.colour_bar(mesh, "accuracy of CPL, %")
    return canvas.part("fig3a", "(a) accuracy by confidence")


def accuracy_lines(files: Sequence[File]) -> Part:
    """Accuracy by perplexity, a line for some of the files, the first and the last among them."""
    canvas = Canvas()
    axes = canvas.axes
    shown = spread(range(len(files)), _MOST_LINES)
    colours = ListedColormap(mpl.colormaps["cividis"](np.linspace(0, 0.85, len(shown))))
    for place, index in enumerate(shown):
        # pixels right at the threshold are few: bins of their own would show chance
        bins = _bins(files[index], "perplexity").merged(LEAST_SHARE)
        label = f"{'step ' if place == 0 else ''}{thousands(files[index]['step'])}"
        axes.plot(_middles(bins.edges), 100 * bins.accuracy, color=colours(place), label=label, marker="o")
    label_axes(axes, "perplexity", "accuracy of CPL, %")
    canvas.legend()
    return canvas.part("fig3c", "(c) accuracy by perplexity")


def _middles(edges: NDArray[np.float64]) -> NDArray[np.float64]:
    """Middles of the bins; of an open last one its lower edge, all that is known."""
    closed = edges.copy()
    if np.isinf(closed[-1]):
        closed[-1] = closed[-2]
    middles: NDArray[np.float64] = (closed[1:] + closed[:-1]) / 2
    return middles


def confidences(content: File) -> Part:
    """How confidences are distributed, in one colour below the threshold and in another above it."""
    canvas = Canvas()
    axes = canvas.axes
    bins, xi = _bins(content, "confidence"), content["xi"]
    shares = 100 * bins.counts / max(bins.counts.sum(), 1)
    for label, colour, low, high in (("background", GREY, 0.0, xi), ("foreground", BLUE, xi, 1.0)):
        left, right = np.clip(bins.edges[:-1], low, high), np.clip(bins.edges[1:], low, high)
        own = right > left  # a bin that the threshold cuts is drawn in both colours
        axes.bar(
            left[own], shares[own], (right - left)[own], align="edge", color=colour, label=label, linewidth=0
        )
    axes.axvline(xi, color=BLACK, linewidth=1.2, linestyle="--", label=f"threshold ξ = {xi:.2f}")
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter("{x:g}")
    label_axes(axes, "confidence", "share of pixels, % (log)")
    canvas.legend()
    return canvas.part("fig3e", f"(e) confidences after {thousands(content['step'])} iterations")


def boxes(files: Mapping[str, Sequence[File]]) -> Iterator[Part]:
    """Box plots of single images by arm: mIoU, mean perplexity, and distance to (1, 0), the perfect CPL.

    Args:
        files: By arm, one of each seed; arms without any are left out, and nothing is drawn of none.
    """
    images = {name: _images(found) for name, found in files.items() if found}
    if not images:
        return
    canvas = Canvas(columns=3)
    titles = {
        "iou": ("CPL mIoU, %", 100),
        "perplexity": ("mean perplexity", 1),
        "distance": ("MAE to (1, 0)", 1),
    }
    for axes, (kind, (title, scale)) in zip(canvas.all_axes, titles.items(), strict=True):
        _draw_boxes(axes, {name: found[kind] for name, found in images.items()}, scale)
        axes.set_title(title, fontsize=9)
    yield canvas.part("fig7-left", "over images")


def _images(files: Sequence[File]) -> dict[str, Bins]:
    """Histograms over the single images of all files, by what is counted."""
    contents = [content["networks"]["assignment"]["images"] for content in files]
    return {kind: Bins.total([Bins.read(content[kind]) for content in contents]) for kind in contents[0]}


def _draw_boxes(axes: Axes, bins: Mapping[str, Bins], scale: float) -> None:
    axes.grid(visible=False, axis="x")
    names = ("whislo", "q1", "med", "q3", "whishi")
    for place, (name, histogram) in enumerate(bins.items()):
        values = [scale * histogram.quantile(share) for share in _WHISKERS]
        axes.bxp(
            [dict(zip(names, values, strict=True))],
            positions=[place],
            widths=0.6,
            showfliers=False,
            patch_artist=True,
            boxprops={"facecolor": COLOURS[name], "alpha": 0.35, "edgecolor": COLOURS[name]},
            medianprops={"color": BLACK, "linewidth": 1.6},
            whiskerprops={"color": COLOURS[name]},
            capprops={"color": COLOURS[name]},
        )
    axes.set_xticks(range(len(bins)), list(bins))
