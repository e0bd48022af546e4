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
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cosa.config import from_json, to_json
from cosa.tracking import TrackingSpec, read_run_id
from cosa.training.stop import StopFile, StoppedError
from sweeps.planning import folder as folders
from sweeps.planning.plan import Trial

LOCK_SECONDS = 60.0
"""How long a trial waits for a predecessor in its folder to die, whose driver was killed."""

Train = Callable[..., Any]
"""`cosa.training.trainer.train`, or what stands for it in a test."""

Report = Callable[..., None]
"""Takes the trainer's Progress."""


@dataclass(frozen=True)
class Job:
    """All that a trial's process must know, in plain text."""

    config: str
    """The Config as JSON."""
    folder: str
    """Its folder."""
    warmup_folder: str
    """Folder of the shared warm-up that it forks from, or empty."""
    first_step: int
    """Step that it forks at; 0 without a shared warm-up."""
    momenta: tuple[float, ...]
    """Momenta of the further ANs that a warm-up carries."""
    stop_at: int | None
    """Last step of a warm-up; None trains to the end."""
    tracking: TrackingSpec
    """Where to track it."""
    workers: int
    """Data-parallel processes; 0 and 1 train in the trial's own."""
    data_tags: Mapping[str, str]
    """Fingerprints of the data that the sweep saw: a machine with others is refused; empty takes any."""
    stop_file: str
    """The sweep's order to stop, see `folders.STOP`."""


def make_job(
    trial: Trial, root: Path, tracking: TrackingSpec, workers: int, data_tags: Mapping[str, str]
) -> Job:
    """What `run` must know of a trial of the sweep in the folder `root`."""
    return Job(
        config=to_json(trial.config),
        folder=str(folders.trial_folder(root, trial.name)),
        warmup_folder=str(folders.trial_folder(root, trial.warmup)) if trial.warmup else "",
        first_step=trial.first_step,
        momenta=trial.momenta,
        stop_at=trial.last_step if trial.kind == "warmup" else None,
        tracking=tracking,
        workers=workers,
        data_tags=dict(data_tags),
        stop_file=str(root / folders.STOP),
    )


def run(job: Job, train: Train | None = None, report: Report | None = None) -> bool:
    """Train one trial to its end, going on from its folder's newest checkpoint if there is one.

    Args:
        job: What to train.
        train: Stands for `cosa.training.trainer.train` in a test.
        report: Told of the progress; what it raises ends the trial.

    Returns:
        Whether it came to its end; False where the sweep was told to stop, and a checkpoint is saved.

    Raises:
        FolderInUseError: Another process still trains in its folder.
        Exception: Whatever training raised; its first line is kept in the folder as the reason.
    """
    folder = Path(job.folder)
    with folders.locked(folder, wait=LOCK_SECONDS):
        reason = folder / folders.FAILURE
        reason.unlink(missing_ok=True)
        with _logged(folder / folders.LOG):
            try:
                _train(job, train, report)
            except StoppedError as stopped:
                print(stopped)  # into the log
                return False
            except Exception as error:
                traceback.print_exc()
                reason.write_text(describe(error) + "\n")
                raise
    return True


def _train(job: Job, train: Train | None, report: Report | None) -> None:
    config = from_json(job.config)
    out, warmup = Path(job.folder), Path(job.warmup_folder) if job.warmup_folder else None
    tracking = job.tracking
    if warmup:
        lineage = {"cosa.forked_from": read_run_id(warmup) or warmup.name}
        tracking = dataclasses.replace(tracking, tags={**tracking.tags, **lineage})
    fork_from = folders.checkpoint(warmup, job.first_step) if warmup else None
    ask = StopFile(Path(job.stop_file)).ask
    if job.workers > 1:
        from cosa.distributed.train import fit

        fit(
            config,
            out=out,
            workers=job.workers,
            tracking=tracking,
            fork_from=fork_from,
            stop_at=job.stop_at,
            momenta=job.momenta,
            data_tags=job.data_tags,
            show=report,
            ask=ask,
        )
        return
    if train is None:
        from cosa.training import trainer

        train = trainer.train
    more: dict[str, Any] = {"report": report} if report else {}
    train(
        config,
        out=out,
        tracker=tracking.tracker(),
        fork_from=fork_from,
        stop_at=job.stop_at,
        momenta=job.momenta,
        ask=ask,
        data_tags=job.data_tags,
        **more,
    )


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
