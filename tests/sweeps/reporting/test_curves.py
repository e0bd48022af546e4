"""Each table's arms over iterations, drawn from what its runs recorded."""

from __future__ import annotations

from sweeps.reporting.curves import draw, draw_curves
from sweeps.tables import Arm, Table, get_table
from tests.sweeps.made_up_sweep import made_up

TABLE = Table(
    name="mine", title="", arms=(Arm("weak", {"csc.weight": 0.0}), Arm("full"), Arm("gone", {"csc.tau": 0.9}))
)


def test_every_arm_with_a_history_is_a_line_and_others_are_named():
    _, recordings = made_up([TABLE], missing=("gone",))
    for runs in recordings_of(recordings).values():
        runs["val/assignment/seg_miou"] = runs["val/assignment/seg_miou_labelled"]
    drawing = draw(recordings, TABLE)
    assert drawing.note == "gone without a finished run"
    assert [part.file for part in drawing.parts] == ["curves-mine.svg"]
    assert "mean over up to 2 seeds" in drawing.caption


def recordings_of(recordings):
    return recordings.series({}).recordings[0].client.metrics


def test_a_table_without_any_history_has_no_drawing():
    _, recordings = made_up([get_table("3b")])
    assert draw_curves(recordings, [get_table("3b")]) == {}  # nobody recorded label-free mIoU
