"""The commands: `cosa-train`, `-segment`, `-evaluate`, `-predict`, `-export`, `-import`, `-data`, `-track`.

Every setting of a Config is a flag, described by the string under its field. Nothing heavy is imported
before the command line is understood, so that `--help` and a mistyped flag answer at once. Each command
takes its arguments (by default those of the process) and returns its exit code.
"""

from __future__ import annotations

from functools import partial

from cosa.cli import data as data_sets
from cosa.cli import evaluation, importing, prediction, tracking, training
from cosa.cli import export as exporting
from cosa.cli.common import FAILED, INTERRUPTED, MISTAKE, run_command

__all__ = [
    "FAILED",
    "INTERRUPTED",
    "MISTAKE",
    "data",
    "evaluate",
    "export",
    "import_",
    "predict",
    "segment",
    "track",
    "train",
]

_ONWARD = "the same command goes on from the last checkpoint"

train = partial(run_command, "cosa-train", training.main, goes_on=_ONWARD)
"""`cosa-train`: train one preset, with any of its settings changed; the same command line resumes."""
segment = partial(run_command, "cosa-segment", partial(training.main, standalone=True), goes_on=_ONWARD)
"""`cosa-segment`: train a standalone segmentation network on pseudo-labels or on masks."""
evaluate = partial(run_command, "cosa-evaluate", evaluation.main)
"""`cosa-evaluate`: judge a trained network, perhaps on other data or scales; or submit it to VOC."""
predict = partial(run_command, "cosa-predict", prediction.main)
"""`cosa-predict`: class maps, overlays and heat maps of any images."""
export = partial(run_command, "cosa-export", exporting.main)
"""`cosa-export`: a trained network as a folder of its own, also for MLflow."""
import_ = partial(run_command, "cosa-import", importing.main)
"""`cosa-import`: the authors' released weights as a model's folder."""
data = partial(run_command, "cosa-data", data_sets.main)
"""`cosa-data`: check a whole data set, or draw some of it."""
track = partial(run_command, "cosa-track", tracking.main)
"""`cosa-track`: deliver to the tracking store what runs could not, or see what that is."""
