"""One trial, in the process that Ray gives it: its folder's lock, its log, the trainer, its failure's reason.

With one worker the trainer runs in this very process, since starting Ray Train costs some fifteen seconds;
with several, through `cosa.distributed`. What happens here must not need the driver: when the driver dies,
the folder alone says how far the trial is.
"""

from __future__ import annotations

import contextlib
import logging
import traceback
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from cosa.storage.files import lock, one_line
from cosa.tracking import TrackingSpec
from cosa.training import trainer
from cosa.training.stop import StopFile, StoppedError
from cosa.training.trainer import RunSpec, TrainProgress
from sweeps.planning.folder import FAILURE, LOCK, LOG, STOP, checkpoint, trial_folder
from sweeps.planning.plan import Trial

LOCK_SECONDS = 60.0
"""How long a trial waits for a predecessor in its folder to die, whose driver was killed."""


def make_spec(trial: Trial, out: Path, tracking: TrackingSpec, data_tags: Mapping[str, str]) -> RunSpec:
    """The run that a trial of the sweep in the folder `out` is; it forks where its warm-up ends."""
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
    spec: RunSpec,
    out: Path,
    *,
    workers: int,
    report: Callable[[TrainProgress], object] = trainer.ignore,
) -> bool:
    """Train one trial to its end, going on from its folder's newest checkpoint if there is one.

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
                if workers > 1:
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
