"""The commands: `cosa-train`, `cosa-evaluate`, `cosa-predict`, `cosa-export`, `cosa-data`, `cosa-track`.

Every setting of a Config is a flag, described by the string under its field. Nothing heavy is imported
before the command line is understood, so that `--help` and a mistyped flag answer at once.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from cosa.cli import data as data_sets
from cosa.cli import evaluation, prediction, tracking, training
from cosa.cli import export as exporting
from cosa.cli.common import FAILED, INTERRUPTED, MISTAKE, run_command

__all__ = ["FAILED", "INTERRUPTED", "MISTAKE", "data", "evaluate", "export", "predict", "track", "train"]


def train(arguments: Sequence[str] | None = None) -> int:
    """`cosa-train`: train one preset, with any of its settings changed; the same command line resumes."""
    goes_on = "the same command goes on from the last checkpoint"
    return run_command("cosa-train", training.main, _given(arguments), goes_on=goes_on)


def evaluate(arguments: Sequence[str] | None = None) -> int:
    """`cosa-evaluate`: judge a trained network, perhaps on other data or scales; or submit it to VOC."""
    return run_command("cosa-evaluate", evaluation.main, _given(arguments))


def predict(arguments: Sequence[str] | None = None) -> int:
    """`cosa-predict`: class maps, overlays and heat maps of any images."""
    return run_command("cosa-predict", prediction.main, _given(arguments))


def export(arguments: Sequence[str] | None = None) -> int:
    """`cosa-export`: a trained network as a folder of its own, also for MLflow."""
    return run_command("cosa-export", exporting.main, _given(arguments))


def data(arguments: Sequence[str] | None = None) -> int:
    """`cosa-data`: check a whole data set, or draw some of it."""
    return run_command("cosa-data", data_sets.main, _given(arguments))


def track(arguments: Sequence[str] | None = None) -> int:
    """`cosa-track`: deliver to the tracking store what runs could not, or see what that is."""
    return run_command("cosa-track", tracking.main, _given(arguments))


def _given(arguments: Sequence[str] | None) -> Sequence[str]:
    return sys.argv[1:] if arguments is None else arguments
