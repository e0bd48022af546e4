"""CoSA-MS, the multi-stage half of Table 2: CoSA, its pseudo-labels, and the networks that learn from them.

python sweeps/multistage.py --preset shapes --seeds 3
python sweeps/multistage.py --preset voc --set data.root=DIR/VOCdevkit/VOC2012 --supervised
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])  # imports start at the house

from cosa.config import MACHINE_FIELDS, Config, difference
from cosa.config.recipes import RECIPES
from sweeps.running.arguments import read_args
from sweeps.running.driver import run, run_script
from sweeps.tables import Arm, Table
from sweeps.tables.metrics import LABELS_MIOU, SEG_MIOU, SEG_MIOU_LABELLED

NETWORKS = {"R101": "deeplabv3plus", "WR38": "wideresnet38", "SWIN": "upernet"}
"""The paper's names of the networks of CoSA-MS, each with its recipe."""
SUPERVISED = {**NETWORKS, "ViT-B": "vit"}
"""Those of the fully supervised upper bounds."""
_SWITCHES = {"--supervised": "train networks on the ground-truth masks, too: upper bounds, called oracles"}


def main(arguments: Sequence[str] | None = None) -> int:
    """The script, from its command line to its exit code."""

    def script() -> int:
        given = sys.argv[1:] if arguments is None else arguments
        args = read_args("multistage", "Fill the multi-stage half of Table 2.", (), given, _SWITCHES)
        own = multistage_table(args.base, supervised="--supervised" in args.switches)
        return run(dataclasses.replace(args, tables=(own, *args.tables)))

    return run_script("multistage", script)


def multistage_table(base: Config, *, supervised: bool) -> Table:
    """Our rows of Table 2: CoSA as `base` has it, then each standalone network by its recipe."""
    arms = [Arm("CoSA")]
    for masks in (False, True) if supervised else (False,):
        for name, recipe in (SUPERVISED if masks else NETWORKS).items():
            changes = {
                setting: value
                for setting, _, value in difference(base, RECIPES[recipe](base))
                if setting not in MACHINE_FIELDS
            }
            if masks:
                changes["segmentation.supervision"] = "masks"
            arms.append(Arm(f"{name}-masks" if masks else name, changes))
    return Table(
        name="2",
        title="CoSA-MS, standalone networks on the pseudo-labels of CoSA",
        reference="CoSA",
        metrics=(SEG_MIOU, SEG_MIOU_LABELLED, LABELS_MIOU),
        arms=tuple(arms),
        note="CoSA is judged on AN, a standalone network on itself; `-masks` learned from the ground truth",
    )


if __name__ == "__main__":
    sys.exit(main())
