"""Table 3a: components added one after the other, on PASCAL VOC and COCO val."""

from __future__ import annotations

from sweeps.tables.metrics import SEG_MIOU_LABELLED
from sweeps.tables.table import Arm, Table, without

TABLE = Table(
    name="3a",
    title="Components added to the baseline",
    columns={"VOC": SEG_MIOU_LABELLED, "COCO": SEG_MIOU_LABELLED},
    protocol="PASCAL VOC and COCO val, labelled protocol",
    components=("GC", "SA", "RAW", "CSC", "DT"),
    arms=(
        Arm("Base", without("GC", "SA", "RAW", "CSC", "DT"), {"VOC": 55.96, "COCO": 37.32}),
        Arm("GC", without("SA", "RAW", "CSC", "DT"), {"VOC": 63.09, "COCO": 42.55}),
        Arm("GC+SA", without("RAW", "CSC", "DT"), {"VOC": 64.41, "COCO": 43.92}),
        Arm("GC+SA+RAW", without("CSC", "DT"), {"VOC": 68.22, "COCO": 45.39}),
        Arm("GC+SA+CSC", without("RAW", "DT"), {"VOC": 71.66, "COCO": 47.10}),
        Arm("GC+SA+RAW+CSC", without("DT"), {"VOC": 75.54, "COCO": 49.67}),
        Arm("full", {}, {"VOC": 76.19, "COCO": 51.00}),
    ),
)
