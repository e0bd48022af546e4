"""Table 5d: momentum of AN, as multiples of how far back the preset's own average reaches, 1 / (1 - m) steps.

The paper's momenta suit its 20,000 steps; on a run of hundreds of steps all of them would freeze AN. Their
ratios make sense everywhere, and on VOC they are the paper's values: 0.9990 to 0.9999 around 0.9994, and 1.
"""

from __future__ import annotations

import math

from sweeps.tables.metrics import SEG_MIOU, SEG_MIOU_LABELLED
from sweeps.tables.table import Arm, Table, memory_times

TABLE = Table(
    name="5d",
    title="Momentum of the assignment network",
    metrics=(SEG_MIOU_LABELLED, SEG_MIOU),
    columns={"VOC": SEG_MIOU_LABELLED},
    protocol="PASCAL VOC val, labelled protocol, m 0.9990, 0.9992, 0.9994, 0.9996, 0.9999, 1",
    settings=("ema.momentum",),
    arms=(
        Arm("memory-x0.6", {"ema.momentum": memory_times(0.6)}, {"VOC": 73.79}),
        Arm("memory-x0.75", {"ema.momentum": memory_times(0.75)}, {"VOC": 75.40}),
        Arm("full", {}, {"VOC": 76.19}),
        Arm("memory-x1.5", {"ema.momentum": memory_times(1.5)}, {"VOC": 75.58}),
        Arm("memory-x6", {"ema.momentum": memory_times(6)}, {"VOC": 71.42}),
        Arm("frozen", {"ema.momentum": memory_times(math.inf)}),
    ),
    note=(
        "A memory of x0.6 averages over 0.6 times as many steps as the preset's own momentum, 1 / (1 - m). "
        "With m = 1 training collapses, says the paper; its value is illegible in our copy."
    ),
)
