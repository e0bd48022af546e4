"""One trial, in the process that Ray gives it: its folder's lock, its log, the trainer, its failure's reason.

With one worker the trainer runs in this very process, since starting Ray Train costs some fifteen seconds;
with several, through `cosa.distributed`. What happens here must not need the driver: when the driver dies,
the folder alone says how far the trial is.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import traceback
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from cosa.tracking import TrackingSpec, read_run_id
from cosa.training import trainer
from cosa.training.stop import StopFile, StoppedError
from cosa.training.trainer import RunSpec, TrainProgress, ignore
from sweeps.planning import folder as folders
from sweeps.planning.plan import Trial

LOCK_SECONDS = 60.0
"""How long a trial waits for a predecessor in its folder to die, whose driver was killed."""

Train = Callable[..., object]
"""`cosa.training.trainer.train`, or what stands for it in a test."""

Report = Callable[[TrainProgress], object]
"""Told where a trial stands."""


def make_spec(trial: Trial, root: Path, tracking: TrackingSpec, data_tags: Mapping[str, str]) -> RunSpec:
    """The run that a trial of the sweep in the folder `root` is; it forks where its warm-up ends."""
    warmup = folders.trial_folder(root, trial.warmup) if trial.warmup else None
    return RunSpec(
        config=trial.config,
        out=folders.trial_folder(root, trial.name),
        fork_from=folders.checkpoint(warmup, trial.first_step) if warmup else None,
        stop_at=trial.last_step if trial.kind == "warmup" else None,
        momenta=trial.momenta,
        data_tags=dict(data_tags),
        tracking=tracking,
    )


def run(
    spec: RunSpec, root: Path, *, workers: int, train: Train | None = None, report: Report = ignore
) -> bool:
    """Train one trial to its end, going on from its folder's newest checkpoint if there is one.

    Args:
        spec: What to train.
        root: Folder of the sweep, where its order to stop is left.
        workers: Data-parallel processes; 0 and 1 train in this very process.
        train: Stands for `cosa.training.trainer.train` in a test.
        report: Told of the progress; what it raises ends the trial.

    Returns:
        Whether it came to its end; False where the sweep was told to stop, and a checkpoint is saved.

    Raises:
        FolderInUseError: Another process still trains in its folder.
        Exception: Whatever training raised; its first line is kept in the folder as the reason.
    """
    folder = Path(spec.out)
    with folders.locked(folder, wait=LOCK_SECONDS):
        reason = folder / folders.FAILURE
        reason.unlink(missing_ok=True)
        with _logged(folder / folders.LOG):
            try:
                should_stop = StopFile(root / folders.STOP).check
                if workers > 1:
                    from cosa.distributed.train import fit

                    fit(_with_lineage(spec), workers=workers, report=report, should_stop=should_stop)
                else:
                    (train or trainer.train)(_with_lineage(spec), report=report, should_stop=should_stop)
            except StoppedError as stopped:
                print(stopped)  # into the log
                return False
            except Exception as error:
                traceback.print_exc()
                reason.write_text(describe(error) + "\n")
                raise
    return True


def _with_lineage(spec: RunSpec) -> RunSpec:
    """`spec`, tracked with the run that it forks from, which has an id now."""
    if spec.fork_from is None:
        return spec
    warmup = spec.fork_from.parents[1]
    tags = {**spec.tracking.tags, "cosa.forked_from": read_run_id(warmup) or warmup.name}
    return dataclasses.replace(spec, tracking=dataclasses.replace(spec.tracking, tags=tags))


def describe(error: BaseException) -> str:
    """An error in one line: its type and the first line of what it says."""
    text = str(error).strip().partition("\n")[0]
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


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
