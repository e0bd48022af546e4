"""CoSA-MS, the multi-stage half of Table 2: CoSA, its pseudo-labels, and the networks that learn from them.

python sweeps/multistage.py --preset shapes --seeds 3
python sweeps/multistage.py --preset voc --set data.root=DIR/VOCdevkit/VOC2012 \\
    --set-network WR38 network.weights=wideresnet38.safetensors --supervised
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])  # imports start at the house

from cosa.cli.common import Parser
from cosa.config import MACHINE_FIELDS, Config, difference
from cosa.config.recipes import RECIPES
from sweeps.running.arguments import changed, read_args
from sweeps.running.driver import run, run_script
from sweeps.tables import Arm, Table
from sweeps.tables.metrics import LABELS_MIOU, SEG_MIOU, SEG_MIOU_LABELLED

NETWORKS = {"R101": "deeplabv3plus", "WR38": "wideresnet38", "SWIN": "upernet"}
"""The paper's names of the networks of CoSA-MS, each with its recipe."""
SUPERVISED = {**NETWORKS, "ViT-B": "vit"}
"""Those of the fully supervised upper bounds."""


def main(arguments: Sequence[str] | None = None) -> int:
    """The script, from its command line to its exit code."""

    def script() -> int:
        given = sys.argv[1:] if arguments is None else arguments
        args = read_args("multistage", "Fill the multi-stage half of Table 2.", (), given, _add_flags)
        own = multistage_table(
            args.base,
            networks=args.own.networks,
            supervised=args.own.supervised,
            settings=_by_network(args.own.set_network),
        )
        return run(dataclasses.replace(args, tables=(own, *args.tables)))

    return run_script("multistage", script)


def _add_flags(parser: Parser) -> None:
    parser.flag(
        "--networks",
        "NETWORK",
        f"networks that learn from the labels, of {', '.join(SUPERVISED)} (default: {' '.join(NETWORKS)})",
        nargs="+",
        choices=list(SUPERVISED),
        default=list(NETWORKS),
    )
    parser.switch(
        "--supervised", "train networks on the ground-truth masks, too: upper bounds, called oracles"
    )
    parser.flag(
        "--set-network",
        "NETWORK",
        f"change settings of one network ({', '.join(SUPERVISED)}), as in WR38 network.weights=FILE",
        nargs="+",
        action="append",
        default=[],
    )


def _by_network(given: Sequence[Sequence[str]]) -> dict[str, list[str]]:
    """What each `--set-network` changes, by the network's name."""
    changes: dict[str, list[str]] = {}
    for name, *pairs in given:
        if name not in SUPERVISED or not pairs:
            raise ValueError(
                f"--set-network must be one of {', '.join(SUPERVISED)} and NAME=VALUE ..., "
                f"got {' '.join([name, *pairs])!r}"
            )
        changes.setdefault(name, []).extend(pairs)
    return changes


def multistage_table(
    base: Config,
    *,
    networks: Sequence[str] = tuple(NETWORKS),
    supervised: bool,
    settings: Mapping[str, Sequence[str]] = MappingProxyType({}),
) -> Table:
    """Our rows of Table 2: CoSA as `base` has it, then each standalone network by its recipe.

    Args:
        base: Settings of CoSA; networks have its data set.
        networks: Those that learn from the pseudo-labels, by names of `SUPERVISED`.
        supervised: Whether all networks also learn from the masks, in rows of their own.
        settings: What a network has otherwise than its recipe, `NAME=VALUE` by its name.

    Raises:
        ValueError, TypeError: An unknown setting, or a value against its law.
    """
    arms = [Arm("CoSA")]
    for masks in (False, True) if supervised else (False,):
        for name in SUPERVISED if masks else dict.fromkeys(networks):
            changes = {
                setting: value
                for setting, _, value in difference(
                    base, changed(RECIPES[SUPERVISED[name]](base), settings.get(name, ()))
                )
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
