"""`cosa-predict SOURCE --pseudo-labels DIR`: the CAM pseudo-labels of a run's training images."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from cosa.cli.common import Parser, changed_settings, find_model
from cosa.cli.console import Counter
from cosa.config import Config, override
from cosa.storage.files import require_folder

if TYPE_CHECKING:
    from cosa.storage.model_files import Facts

_FLAG = "--pseudo-labels"


def are_asked_for(arguments: Sequence[str]) -> bool:
    """Whether a command line of `cosa-predict` is for this module."""
    return any(argument.partition("=")[0] == _FLAG for argument in arguments)


def main(prog: str, arguments: Sequence[str]) -> int:
    """What `cosa-predict SOURCE --pseudo-labels DIR` does; returns the exit code."""
    given = _parser(prog).parse_known(arguments)
    from cosa.data.open import open_dataset
    from cosa.evaluation.pseudo_labels import LabelSettings, write_pseudo_labels
    from cosa.model import build_model

    _require_finished(given.source)
    stored = find_model(given)
    if stored.config.standalone:
        raise ValueError(
            f"source must be a CoSA run, got {given.source!r}, a standalone network without CAMs"
        )
    config = override(stored.config, changed_settings(given))
    settings = LabelSettings(source=given.cam, xi=_threshold(given, stored.facts), ignore=given.ignore)
    split = given.split or config.data.train_split
    dataset = open_dataset(config.data, split)
    out = given.pseudo_labels.expanduser().absolute()
    require_folder("--pseudo-labels", out)
    model = build_model(replace(stored, config=config))
    summary = write_pseudo_labels(model, dataset, out, settings, counted=Counter(len(dataset)).add)
    judged = f", mIoU {100 * summary['miou']:.2f}" if "miou" in summary else ""
    print(f"pseudo-labels of {len(dataset)} images of {split}{judged} in {out}")
    return 0


def _parser(prog: str) -> Parser:
    parser = Parser(
        prog=prog,
        usage=f"{prog} SOURCE {_FLAG} DIR [options] [--evaluation.SETTING VALUE ...]",
        description="Write the CAM pseudo-labels of every image that the run was trained on, whose labels "
        "are known: NAME.png holds class indices in the colours of VOC, pseudo_labels.json what they are "
        "made of and, against masks, how good they are. The same command goes on where it stopped. Settings "
        "default to those of the run.",
    )
    parser.source()
    parser.flag(_FLAG, "DIR", "folder of these pseudo-labels alone", type=Path)
    parser.flag("--split", "NAME", "other images of the data set than data.train_split")
    parser.add_argument(
        "--cam",
        choices=["cam", "aux_cam", "ensemble"],
        default="cam",
        help="M, M-dagger, or the mean of both (default cam)",
    )
    parser.flag("--xi", "X", "threshold in (0, 1), or `own`: the run's (default 0.5)", default="0.5")
    parser.flag(
        "--ignore",
        "WIDTH",
        "leave pixels without a label whose activation is closer to the threshold than this (default 0)",
        type=float,
        default=0.0,
    )
    parser.traceback()
    names = ("size", "scales", "flip", "batch_size")
    places = ("data.root", "data.cache", "data.loader_workers")
    parser.settings(Config(), (*places, *(f"evaluation.{name}" for name in names)))
    return parser


def _require_finished(source: str) -> None:
    """Refuse the folder of a run that has not ended: its newest checkpoint would be taken without a word."""
    folder = Path(source).expanduser()
    if (folder / "checkpoints").is_dir() and not (folder / "result.json").is_file():
        raise ValueError(
            f"source must be a finished run, got {str(folder)!r}, which has no result.json; finish it, or "
            "name one of its checkpoints"
        )


def _threshold(given: argparse.Namespace, facts: Facts) -> float:
    own = facts.aux_xi if given.cam == "aux_cam" else facts.xi
    if given.xi == "own" and own is not None:
        return own
    try:
        return float(given.xi)
    except ValueError:
        raise ValueError(f"--xi must be a number in (0, 1) or own, got {given.xi!r}") from None
