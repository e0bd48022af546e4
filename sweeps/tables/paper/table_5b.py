"""Table 5b: weight of the segmentation's loss, as multiples of the preset's own (0.1 on VOC)."""

from __future__ import annotations

from sweeps.tables.metrics import SEG_MIOU, SEG_MIOU_LABELLED
from sweeps.tables.table import Arm, Table, times

TABLE = Table(
    name="5b",
    title="Weight of CAM2Seg",
    metrics=(SEG_MIOU_LABELLED, SEG_MIOU),
    columns={"VOC": SEG_MIOU_LABELLED},
    protocol="PASCAL VOC val, labelled protocol, weights 0.4, 0.2, 0.1, 0.05, 0.025",
    settings=("c2s.weight",),
    arms=(
        Arm("c2s-x4", {"c2s.weight": times(4)}, {"VOC": 74.67}),
        Arm("c2s-x2", {"c2s.weight": times(2)}, {"VOC": 75.56}),
        Arm("full", {}, {"VOC": 76.19}),
        Arm("c2s-x0.5", {"c2s.weight": times(0.5)}, {"VOC": 73.95}),
        Arm("c2s-x0.25", {"c2s.weight": times(0.25)}, {"VOC": 61.55}),
    ),
)
