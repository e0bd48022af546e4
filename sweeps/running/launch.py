"""Trials on Ray Tune: one Tuner, no barrier, nothing that has to be restored.

Tune's own experiment state is thrown away. What is finished is read from the trials' folders at every start,
and what is not goes on from its own checkpoint: the same command line again is the resume. Tune alone could
run warm-ups first and then the rest; with three warm-ups on two slots that leaves 6 % of the time idle.
"""

from __future__ import annotations

import contextlib
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ray import tune
from ray.tune.search import Searcher

from cosa.cli.console import LiveLine, duration, print_line
from cosa.distributed.session import Slots
from cosa.storage.files import one_line
from cosa.tracking import TrackingSpec
from cosa.training.stop import StopFile
from cosa.training.trainer import RunSpec, TrainProgress, ignore
from sweeps.planning.folder import STOP, Result, SweepState, read_failure, read_result, scratch, trial_folder
from sweeps.planning.plan import Trial
from sweeps.running.arguments import SweepArgs
from sweeps.running.progress import SweepProgress, Tell, best_so_far
from sweeps.running.queue import Attempt, TrialQueue
from sweeps.running.trial import LabelsSpec, make_spec, run_trial

SECONDS = "seconds"
"""What a trial tells Tune of itself: how long it was in its own hands."""
STOPPED = "stopped"
"""What a trial tells Tune when it stopped because the sweep was told to."""
KILLED = "its process ended without a word: killed, or out of memory"
NO_RESULT = "ended without a result"
PATIENCE = 25.0
"""Seconds that trials have to end their step and save; machines that are taken back give thirty."""


class TrialSearcher(Searcher):
    """Hands Tune the queue's next trial whenever one is ready, and watches it end."""

    def __init__(self, queue: TrialQueue, make: Callable[[Trial], RunSpec | LabelsSpec]) -> None:
        """Nothing runs yet; `make` says which run a trial is."""
        super().__init__()
        self.queue, self.out, self.line, self._make = queue, queue.out, LiveLine(), make
        self.results: dict[str, Result] = {}
        self.inside = 0.0
        """Seconds that trials were in their own hands."""
        self.stopped = False
        """Set where the sweep is told to stop: no more trials start."""
        self._names: dict[str, str] = {}

    def next_trial(self) -> Trial | None:
        """Start the next trial; None while every other one waits."""
        return self.queue.start_next()

    @property
    def exhausted(self) -> bool:
        """Whether nothing will ever start again."""
        return not self.queue.waiting

    def should_stop(self, trial_id: str, result: Mapping[str, Any]) -> bool:  # noqa: ARG002 (Tune's own)
        """Called by Tune at everything that a trial reports on its way: whether it is stopped there."""
        return False

    def end(self, trial: Trial, why: str) -> str:
        """A trial has ended for good, failed where there is a reason; returns how, in a word."""
        if not why and (result := read_result(self.out, trial)) is not None:
            self.results[trial.name] = result
        else:
            why = why or NO_RESULT
        self.queue.end(trial.name, why)
        return "failed" if why else "done"

    def suggest(self, trial_id: str) -> Any:
        """Called by Tune: a trial, None while every other one waits, FINISHED when nothing is left."""
        if self.stopped:
            return Searcher.FINISHED
        trial = self.next_trial()
        if trial is None:
            return Searcher.FINISHED if self.exhausted else None
        self._names[trial_id] = trial.name
        # Tune keeps this in its files: without the store's address
        return {"trial": trial.name, "spec": _tracked_at("", self._make(trial))}

    def on_trial_complete(
        self, trial_id: str, result: Mapping[str, Any] | None = None, error: bool = False
    ) -> None:
        """Called by Tune: a trial's retries are used up, or it is done, or stopped with the whole sweep."""
        trial = self.queue.running[self._names[trial_id]].trial
        if (result or {}).get(STOPPED):  # goes on with the next start, like one whose driver was killed
            self.line.note(f"stopped: {trial.label}")
            return
        why = (read_failure(trial_folder(self.out, trial.name)) or KILLED) if error else ""
        how = self.end(trial, why)
        seconds = self.queue.ended[-1].seconds
        self.inside += (result or {}).get(SECONDS, seconds)
        self.line.note(f"{how}: {trial.label}, {duration(seconds)}")

    def save(self, checkpoint_path: str) -> None:
        """Nothing is saved: the trials' folders say what is finished."""

    def restore(self, checkpoint_path: str) -> None:
        """Nothing is restored, see `save`."""

    def __getstate__(self) -> dict[str, object]:
        """Nothing is pickled: Tune writes a copy down that nobody reads."""
        return {}


def launch(
    state: SweepState,
    trials: Sequence[Trial],
    args: SweepArgs,
    slots: Slots,
    track: Callable[[Trial], TrackingSpec],
    data_tags: Mapping[str, str],
    tell: Tell | None = None,
) -> tuple[Mapping[str, Result], Mapping[str, str]]:
    """Run `trials` of a plan, each after the one it waits for, and tell the time; needs a running Ray.

    Args:
        state: What the live view counts as done before.
        trials: What to run; a warm-up that is not among them is finished.
        args: The folder, on storage that all machines of the cluster reach, and what a trial asks for.
        slots: What each trial gets.
        track: Where to track a trial.
        data_tags: Fingerprints of the data that a trial must find on its machine; empty takes any.
        tell: Told how the sweep stands, now and then.

    Returns:
        Results of the trials that finished and, of those that did not, the reasons in one line, by name.

    Raises:
        KeyboardInterrupt: Ctrl-C or SIGTERM, once the trials have saved and stopped.
    """
    queue = TrialQueue(trials, slots.count, args.out)
    searcher = TrialSearcher(
        queue, lambda trial: make_spec(trial, args.out, track(trial), data_tags, state.reused)
    )
    total = len(state.plan.trials)

    def head() -> list[str]:
        done = total - len(trials) + len(searcher.results)
        failed = [f"{len(queue.failures)} failed"] if queue.failures else []
        best = best_so_far(state.plan.trials, {**state.results, **searcher.results})
        return [f"{done}/{total} done", *failed, *([best] if best else [])]

    begun = time.monotonic()
    progress = SweepProgress(queue, head, before=total - len(trials), tell=tell)
    errors = run_on_tune(searcher, progress, args, slots)
    spent = where_time_went(time.monotonic() - begun, slots.count, queue.ended, searcher.inside)
    print_line(f"trained for {spent}")
    return searcher.results, {
        name: one_line(errors[name]) if why == KILLED and name in errors else why
        for name, why in queue.failures.items()
    }


def where_time_went(wall: float, slots: int, ended: Sequence[Attempt], inside: float) -> str:
    """Where the slots' time went in one launch, in a line.

    Args:
        wall: Seconds from the launch to its end.
        slots: Trials that ran side by side.
        ended: Those that ended, each with the seconds until the driver knew.
        inside: Of these seconds, those spent in the trials themselves: reading data, training, evaluating,
            saving.
    """
    whole, held = max(wall * slots, 1e-9), sum(attempt.seconds for attempt in ended)
    between, waiting = held - inside, wall * slots - held
    each = between / max(len(ended), 1)
    return (
        f"{duration(wall)} on {slots} slots: {inside / whole:.1%} of it in trials, "
        f"{between / whole:.1%} between them ({each:.1f} s each), {waiting / whole:.1%} waiting for a "
        f"warm-up or with nothing left to start"
    )


def _tracked_at(uri: str, spec: RunSpec | LabelsSpec) -> RunSpec | LabelsSpec:
    return replace(spec, tracking=replace(spec.tracking, uri=uri))


def run_on_tune(
    searcher: TrialSearcher,
    progress: SweepProgress,
    args: SweepArgs,
    slots: Slots,
    report: Callable[[TrainProgress], object] = ignore,
) -> Mapping[str, Exception]:
    """Have Tune train what `searcher` hands out, until nothing is left.

    Args:
        searcher: What to train.
        progress: The live view of it.
        args: The folder, the store, and what a trial asks for.
        slots: What each trial gets.
        report: Called with a trial's progress in its own process; what it reports to Tune goes to
            `searcher.should_stop`.

    Returns:
        What Ray says of trials that failed, by name.

    Raises:
        KeyboardInterrupt: Ctrl-C or SIGTERM, once the trials have saved and stopped.
    """
    out, workers, uri = args.out, args.resources.workers, args.uri

    def trainable(settings: dict[str, Any]) -> dict[str, Any]:
        begun = time.monotonic()
        ended = run_trial(_tracked_at(uri, settings["spec"]), out, workers=workers, report=report)
        return {SECONDS: time.monotonic() - begun, STOPPED: not ended}

    share = {"CPU": slots.cpus, **({"GPU": slots.gpus} if slots.gpus else {})}
    with orderly(out, searcher), scratch(out) as notes, progress.shown(searcher.line):
        ended = tune.Tuner(
            # the workers of Ray Train ask for their own share
            tune.with_resources(trainable, {"CPU": 0.01} if workers > 1 else share),
            tune_config=tune.TuneConfig(
                search_alg=searcher,
                num_samples=-1,
                reuse_actors=True,  # a trial finds torch imported by the one before it
                trial_dirname_creator=lambda trial: str(trial.trial_id),
            ),
            run_config=tune.RunConfig(
                storage_path=str(notes),
                stop=searcher.should_stop,
                verbose=0,
                failure_config=tune.FailureConfig(max_failures=args.retries),
            ),
        ).fit()
    if searcher.stopped:
        raise KeyboardInterrupt
    results = [ended[index] for index in range(len(ended))]
    return {
        result.config["trial"]: getattr(result.error, "cause", None) or result.error
        for result in results
        if result.config and result.error
    }


@contextlib.contextmanager
def orderly(out: Path, searcher: TrialSearcher, patience: float = PATIENCE) -> Iterator[None]:
    """While the block runs, the first Ctrl-C or SIGTERM has the trials save and stop.

    The second one interrupts the block at once, and so does a trial that takes longer than `patience`
    seconds, such as one in the middle of an evaluation: it goes on from its last checkpoint.

    Args:
        out: Folder of the sweep, which all trials reach.
        searcher: Starts no more trials then.
        patience: Seconds to wait for the trials.
    """
    file = StopFile(out / STOP)
    file.path.unlink(missing_ok=True)  # of a driver that was killed
    timer = threading.Timer(patience, signal.raise_signal, [signal.SIGINT])
    timer.daemon = True

    def on_signal(number: int, frame: object) -> None:  # noqa: ARG001 (the signal's own signature)
        if searcher.stopped:
            raise KeyboardInterrupt
        searcher.stopped = True
        file.give()
        timer.start()
        text = "stopping: trials save and end, in half a minute at most; once more stops at once"
        threading.Thread(
            target=searcher.line.note, args=[text], daemon=True
        ).start()  # its stream may be in use

    numbers = [n for n in (signal.SIGINT, signal.SIGTERM) if signal.getsignal(n) != signal.SIG_IGN]
    before = {number: signal.signal(number, on_signal) for number in numbers}
    try:
        yield
    finally:
        timer.cancel()
        for number, handler in before.items():
            signal.signal(number, handler)
        with contextlib.suppress(OSError):  # on a full disk it may stay: the next start removes it
            file.path.unlink(missing_ok=True)
