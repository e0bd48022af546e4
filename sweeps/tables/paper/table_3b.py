"""Table 3b: components taken out of the full model one at a time, on PASCAL VOC and COCO val."""

from __future__ import annotations

from sweeps.tables.metrics import SEG_MIOU_LABELLED
from sweeps.tables.table import Arm, Table, without

TABLE = Table(
    name="3b",
    title="Components taken out of the full model",
    columns={"VOC": SEG_MIOU_LABELLED, "COCO": SEG_MIOU_LABELLED},
    protocol="PASCAL VOC and COCO val, labelled protocol",
    components=("GC", "SA", "RAW", "CSC", "DT"),
    arms=(
        Arm("full", {}, {"VOC": 76.19, "COCO": 51.00}),
        Arm("no-DT", without("DT"), {"VOC": 75.54, "COCO": 49.67}),
        Arm("no-CSC", without("CSC"), {"VOC": 69.89, "COCO": 45.95}),
        Arm("no-RAW", without("RAW"), {"VOC": 72.45, "COCO": 47.83}),
        Arm("no-SA", without("SA"), {"VOC": 72.10, "COCO": 49.04}),
        Arm("no-GC", without("GC"), {"VOC": 74.12, "COCO": 49.67}),
    ),
)
