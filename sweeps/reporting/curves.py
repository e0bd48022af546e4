"""Each table's arms over iterations: the mean over seeds with a band of one sample deviation."""

from __future__ import annotations

from collections.abc import Sequence

from sweeps.reporting.histories import Recordings
from sweeps.reporting.plots import (
    BLACK,
    BLUE,
    GREEN,
    GREY,
    ORANGE,
    PURPLE,
    VERMILION,
    Canvas,
    Drawing,
    draw_lines,
    over_iterations,
    styled,
)
from sweeps.tables.metrics import METRICS, SEG_MIOU
from sweeps.tables.table import Table

_OTHERS = (ORANGE, GREEN, VERMILION, PURPLE, GREY, BLACK)
"""Colours of the arms beside the reference, solid and then dashed."""


def draw_curves(recordings: Recordings, tables: Sequence[Table]) -> dict[str, Drawing]:
    """A drawing for each table of which any arm has a history, by the table's name."""
    drawings = (draw(recordings, table) for table in tables)
    return {
        table.name: drawing for table, drawing in zip(tables, drawings, strict=True) if drawing is not None
    }


def draw(recordings: Recordings, table: Table) -> Drawing | None:
    """One metric of a table's arms over iterations; None where no arm has a history.

    The metric is label-free mIoU where the table shows it, else its first that is a fraction on val.
    """
    fractions = [key for key in table.metrics if METRICS[key].percent and key.startswith("val/")]
    key = SEG_MIOU if SEG_MIOU in fractions or not fractions else fractions[0]
    names = [table.reference, *(arm.name for arm in table.arms if arm.name != table.reference)]
    warmup = recordings.base.train.warmup
    histories = {
        name: recordings.series(table.arm(name).changes).histories(key, after=warmup - 1 if place else -1)
        for place, name in enumerate(names)
    }
    if not any(histories.values()):
        return None
    with styled():
        canvas = Canvas(height=3.1)
        for place, (name, found) in enumerate(histories.items()):
            colour = _OTHERS[(place - 1) % len(_OTHERS)] if place else BLUE
            draw_lines(canvas.axes, name, found, colour, dashed=place > len(_OTHERS))
        over_iterations(canvas.axes, f"{METRICS[key].title}, %", recordings.base.train, first=0)
        canvas.legend()
        part = canvas.part(f"curves-{table.name}", f"{METRICS[key].title} over iterations")
    seeds = max(len(found) for found in histories.values())
    band = "one seed" if seeds == 1 else f"mean over up to {seeds} seeds, band: one sample deviation"
    gone = [name for name, found in histories.items() if not found]
    return Drawing(
        title=f"{METRICS[key].title} over iterations",
        caption=f"AN on {recordings.base.data.val_split}; {band}. The warm-up is {table.reference}'s.",
        note=f"{', '.join(gone)} without a finished run" if gone else "",
        parts=(part,),
    )
