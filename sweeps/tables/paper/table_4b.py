"""Table 4b: CPL on VOC val with and without contrastive separation, over classes that coexist and over all.

The row without CSC is Table 3b's. The paper's table also holds three other methods, run by its authors.
"""

from __future__ import annotations

from sweeps.tables.table import Arm, Table, without

C_MIOU, MIOU = "val/assignment/cpl_cmiou", "val/assignment/cpl_miou"

TABLE = Table(
    name="4b",
    title="Contrastive separation against coexistence",
    metrics=(C_MIOU, MIOU),
    columns={"C-mIoU": C_MIOU, "mIoU": MIOU},
    protocol="PASCAL VOC val, CPL at ξ 0.5; C-mIoU over classes that the paper does not name",
    arms=(
        Arm("no-CSC", without("CSC"), {"C-mIoU": 62.61, "mIoU": 67.82}),
        Arm("full", {}, {"C-mIoU": 82.34, "mIoU": 76.37}),
    ),
    note="The paper's others, C-mIoU / mIoU: FPR 53.09 / 53.34, MCT 58.46 / 61.24, ToCo 63.62 / 72.33.",
)
