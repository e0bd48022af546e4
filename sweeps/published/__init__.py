"""Published values of the paper's Tables 1, 2, 6, 7, 11, 12 and 13, one CSV file each, as printed.

Percent, hours, images per second, millions of parameters. A cell that the paper leaves empty, or that is
illegible in its text, is empty: the second half of CoSA*'s row in Table 11. The row below it is no print but
the CRF column of the log that the authors released with their code (01d3467, PASCAL VOC val), which says the
same in the first half. What does not agree as printed stays as it is: Table 6a gives ToCo a gain of 0.9 from
69.2 to 71.1; the classes of MCT in Table 13 average 42.16 where the table says 42.0; ToCo has 42.3 on COCO in
Table 2 and 42.4 in Table 13. Values of Tables 3, 4, 5 and Fig. 9 are in sweeps/tables.
"""

from __future__ import annotations

import csv
import functools
from importlib import resources

Row = dict[str, str]
"""One printed row by column; text as printed, an empty cell as empty text."""


@functools.cache
def read_published(table: str) -> tuple[Row, ...]:
    """The rows of a table, `11` or `6a`, in the paper's order."""
    text = resources.files(__name__).joinpath(f"table_{table}.csv").read_text(encoding="utf-8")
    return tuple(csv.DictReader(text.splitlines()))


VOC_NAMES = {
    "bkg": "background",
    "plane": "aeroplane",
    "bike": "bicycle",
    "table": "diningtable",
    "mbike": "motorbike",
    "plant": "pottedplant",
    "tv": "tvmonitor",
}
"""Our names of the classes that Tables 11 and 12 shorten; the others have the same."""

COCO_NAMES = {"cellphone": "cell phone"}
"""Our names of the classes that Table 13 spells otherwise."""
