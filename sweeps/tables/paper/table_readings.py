"""What the paper leaves open or the authors' code has otherwise, a row each; docs/method.md tells of each.

Presets differ in some switches, with their reasons: a row has the value that its preset does not have.
"""

from __future__ import annotations

from sweeps.tables.table import Arm, Table, opposite, without

_BASE = without("GC", "SA", "RAW", "CSC", "DT")

TABLE = Table(
    name="readings",
    title="Open readings, each changed alone",
    settings=(
        "s2c.cam",
        "c2s.average",
        "network.aux_norm",
        "cam.fusion",
        "cam.aux_fusion",
        "optim.decay_vectors",
        "network.train_pos_embed",
        "network.aux_head",
    ),
    arms=(
        Arm("full"),
        Arm("s2c-relu", {"s2c.cam": "relu"}),
        Arm("c2s-balanced", {"c2s.average": "balanced"}),
        Arm("other-aux-norm", {"network.aux_norm": opposite()}),
        Arm("fusion-sum", {"cam.fusion": "sum", "cam.aux_fusion": "last"}),
        Arm("other-decay", {"optim.decay_vectors": opposite()}),
        Arm("other-positions", {"network.train_pos_embed": opposite()}),
        Arm("Base", _BASE),
        Arm("Base-no-aux", {**_BASE, "network.aux_head": False}),
    ),
    note="The paper has no such table. Fusion says nothing on a preset with one scale, positions nothing on "
    "one that starts from scratch. Base-no-aux learns no M-dagger: the paper introduces it for CSC.",
)
