"""One trial, in the process that Ray gives it: its folder's lock, its log, the trainer, its failure's reason.

With one worker the trainer runs in this very process, since starting Ray Train costs some fifteen seconds;
with several, through `cosa.distributed`. What happens here must not need the driver: when the driver dies,
the folder alone says how far the trial is.
"""

from __future__ import annotations

import contextlib
import json
import logging
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

from cosa.config import Config, identity
from cosa.data.open import open_dataset
from cosa.evaluation.pseudo_labels import LabelSettings, write_pseudo_labels
from cosa.model import load_model
from cosa.storage.files import lock, one_line, write_atomically
from cosa.storage.label_files import SUMMARY
from cosa.storage.run_folder import TRAINING_TAG
from cosa.tracking import TrackingSpec
from cosa.training import trainer
from cosa.training.stop import StopCheck, StopFile, StoppedError, StopSignal
from cosa.training.trainer import RunSpec, TrainProgress
from sweeps.planning.folder import (
    FAILURE,
    LABELS,
    LOCK,
    LOG,
    RESULT,
    STOP,
    checkpoint,
    trial_folder,
    with_labels,
)
from sweeps.planning.plan import Trial
from sweeps.tables.metrics import LABELS_MIOU

LOCK_SECONDS = 60.0
"""How long a trial waits for a predecessor in its folder to die, whose driver was killed."""


@dataclass(frozen=True, kw_only=True)
class LabelsSpec:
    """Pseudo-labels to write; as RunSpec, plain data that travels."""

    config: Config
    """Settings of the network whose they are."""
    source: str
    """The run that has it: its folder, or its id in the store."""
    out: Path
    """The trial's folder; the pseudo-labels are in LABELS inside it."""
    data_tags: Mapping[str, str]
    """As `RunSpec.data_tags`."""
    tracking: TrackingSpec


def make_spec(
    trial: Trial,
    out: Path,
    tracking: TrackingSpec,
    data_tags: Mapping[str, str],
    reused: Mapping[str, str] = MappingProxyType({}),
) -> RunSpec | LabelsSpec:
    """What a trial of the sweep in the folder `out` has to do; a run forks where its warm-up ends.

    Args:
        trial: Which one it is; the one that it waits for is finished.
        out: The sweep's folder.
        tracking: Where it is tracked.
        data_tags: Fingerprints of the data that it must find.
        reused: Ids of the earlier runs that stand for trials, by the trials' names.
    """
    if trial.kind == "labels":
        assert trial.source is not None, "pseudo-labels are some network's"
        return LabelsSpec(
            config=trial.config,
            source=reused.get(trial.source) or str(trial_folder(out, trial.source)),
            out=trial_folder(out, trial.name),
            data_tags=dict(data_tags),
            tracking=tracking,
        )
    trial = with_labels(out, trial)
    warmup = trial_folder(out, trial.warmup) if trial.warmup else None
    return RunSpec(
        config=trial.config,
        out=trial_folder(out, trial.name),
        fork_from=checkpoint(warmup, trial.first_step) if warmup else None,
        stop_at=trial.last_step if trial.kind == "warmup" else None,
        momenta=trial.momenta,
        data_tags=dict(data_tags),
        tracking=tracking,
    )


def run_trial(
    spec: RunSpec | LabelsSpec,
    out: Path,
    *,
    workers: int,
    report: Callable[[TrainProgress], object] = trainer.ignore,
) -> bool:
    """Train one trial to its end, or write its pseudo-labels, going on from what its folder has of it.

    Args:
        spec: What to train.
        out: Folder of the sweep, where its order to stop is left.
        workers: Data-parallel processes; 0 and 1 train in this very process.
        report: Told of the progress; what it raises ends the trial.

    Returns:
        Whether it came to its end; False where the sweep was told to stop, and a checkpoint is saved.

    Raises:
        InUseError: Another process still trains in its folder.
        Exception: Whatever training raised; its first line is kept in the folder as the reason.
    """
    folder = Path(spec.out)
    should_stop = StopFile(out / STOP).check
    with lock(folder / LOCK, wait=LOCK_SECONDS):
        (folder / FAILURE).unlink(missing_ok=True)
        with _logged(folder / LOG):
            try:
                if isinstance(spec, LabelsSpec):
                    _write_labels(spec, should_stop)
                elif workers > 1:
                    from cosa.distributed.train import fit

                    fit(spec, workers=workers, report=report, should_stop=should_stop)
                else:
                    trainer.train(spec, report=report, should_stop=should_stop)
            except StoppedError as stopped:
                print(stopped)  # into the log
                return False
            except Exception as error:
                traceback.print_exc()
                (folder / FAILURE).write_text(one_line(error) + "\n")
                raise
    return True


def _write_labels(spec: LabelsSpec, should_stop: StopCheck) -> None:
    """Write the pseudo-labels of all training images, then their result, and track both as training does."""
    begun, data = time.monotonic(), spec.config.data

    def look(_: int) -> None:
        if should_stop() == StopSignal.STOP:
            raise StoppedError("told to stop, and stopped; the same command goes on with the next image")

    tracker = spec.tracking.tracker()
    tracker.start(spec.config, out=spec.out, tags={TRAINING_TAG: spec.data_tags.get(TRAINING_TAG, "")})
    try:
        dataset = open_dataset(data, data.train_split)
        model = load_model(spec.source, tracking_uri=spec.tracking.uri)
        folder = spec.out / LABELS
        summary = write_pseudo_labels(model, dataset, folder, LabelSettings(), counted=look)
        result = {
            "identity": identity(spec.config),
            "step": 0,
            "metrics": {LABELS_MIOU: summary["miou"]} if "miou" in summary else {},
            "seconds": time.monotonic() - begun,
            "run_id": tracker.run_id,
            "data_fingerprint": summary["data_fingerprint"],
        }
        tracker.log_metrics(result["metrics"], 0)
        write_atomically(spec.out / RESULT, json.dumps(result, indent=2) + "\n")
        for path in (folder / SUMMARY, spec.out / RESULT):
            tracker.log_artifact(path)
    except BaseException as error:
        stopped = isinstance(error, KeyboardInterrupt | SystemExit | StoppedError)
        tracker.finish("KILLED" if stopped else "FAILED")
        raise
    tracker.finish("FINISHED")


@contextlib.contextmanager
def _logged(path: Path) -> Iterator[None]:
    """Everything that this process prints or logs goes to the end of the file `path`."""
    with (
        path.open("a", buffering=1) as file,
        contextlib.redirect_stdout(file),
        contextlib.redirect_stderr(file),
    ):
        handler = logging.StreamHandler(file)
        handler.setFormatter(logging.Formatter("%(asctime)s %(name)s %(levelname)s: %(message)s"))
        logging.getLogger().addHandler(handler)
        logging.getLogger("cosa").setLevel(logging.INFO)
        try:
            yield
        finally:
            logging.getLogger().removeHandler(handler)
