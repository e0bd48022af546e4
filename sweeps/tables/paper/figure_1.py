"""Figure 1: classification and CPL under each source of guidance; bars without printed values.

The paper's experiment takes a warm-up of 2,000 iterations; here every arm keeps its preset's own, so that
three of the four rows are trials of Table 4a.
"""

from __future__ import annotations

from sweeps.tables.table import Arm, Table, without

TABLE = Table(
    name="fig1",
    title="Guidance changes the CAMs, not the classification",
    metrics=("val/assignment/cls_precision", "val/assignment/cpl_miou"),
    settings=("s2c.source",),
    reference="NO",
    arms=(
        Arm("GT", {"s2c.source": "gt"}),
        Arm("SPL"),
        Arm("NO", without("GC")),
        Arm("NS", {"s2c.source": "noise"}),
    ),
    note="The paper prints no values with its bars; it says of the precision: over 97 % in every group.",
)
