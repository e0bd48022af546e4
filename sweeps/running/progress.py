"""The live view of a sweep: which trials run, how far each is, the best so far, and when all will be done."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cosa.cli.console import LiveLine, duration
from sweeps.planning import folder as folders
from sweeps.planning.plan import Trial
from sweeps.running.schedule import Schedule, seconds_left
from sweeps.tables.metrics import METRICS, SEG_MIOU

_MEASURABLE = 0.1
"""Part of a trial that must be done before its speed says anything: it starts with imports."""


_BAR = 20
"""Characters of a trial's bar on a terminal."""


@dataclass(frozen=True)
class Best:
    """The trial with the highest label-free mIoU so far."""

    label: str
    score: float

    def __str__(self) -> str:
        return f"best {self.label}: {METRICS[SEG_MIOU].title} {100 * self.score:.1f}"


def best_of(trials: Iterable[Trial], results: Mapping[str, Mapping[str, Any]]) -> Best | None:
    """The best of the finished `trials`, oracles apart: ground truth is no result.

    Args:
        trials: Trials to look among; a warm-up is none.
        results: What the trainer wrote of each, by name.
    """
    scores = {
        trial.label: result["metrics"][SEG_MIOU]
        for trial in trials
        if trial.kind == "trial" and not trial.config.oracle
        if (result := results.get(trial.name)) is not None and SEG_MIOU in result.get("metrics", {})
    }
    label = max(scores, key=lambda name: scores[name], default=None)
    return None if label is None else Best(label, scores[label])


@dataclass
class _Watch:
    """A running trial as the driver sees it."""

    trial: Trial
    started: float
    first_step: int
    step: int

    def pace(self, now: float) -> float | None:
        """Seconds per step so far, start-up and evaluations included; None while too little is done."""
        done = self.step - self.first_step
        return (now - self.started) / done if done > _MEASURABLE * self.steps else None

    @property
    def steps(self) -> int:
        """Steps that this start of the trial has to do."""
        return max(1, self.trial.last_step - self.first_step)


class Progress:
    """Follows a schedule and says how it stands. Reads the trials' journals; asks nothing of the trials."""

    def __init__(
        self,
        schedule: Schedule,
        root: Path,
        *,
        done_before: int,
        clock: Callable[[], float],
        best: Best | None = None,
    ) -> None:
        """Watch nothing yet.

        Args:
            schedule: What runs.
            root: Folder of the sweep.
            done_before: Trials finished earlier.
            clock: Seconds.
            best: The best of those.
        """
        self._schedule = schedule
        self._root = root
        self._done_before = done_before
        self._total = done_before + len(schedule.waiting)
        self._clock = clock
        self._best = best
        self._watches: dict[str, _Watch] = {}
        self._paces: dict[str, list[float]] = {"warmup": [], "trial": []}

    def started(self, trial: Trial) -> None:
        """A trial starts, perhaps from a checkpoint of its own."""
        step = max(trial.first_step, folders.read_step(folders.trial_folder(self._root, trial.name)))
        self._watches[trial.name] = _Watch(trial, self._clock(), step, step)

    def ended(self, trial: Trial, *, failed: bool) -> float:
        """A trial has ended; returns how many seconds it took."""
        watch = self._watches.pop(trial.name)
        seconds = self._clock() - watch.started
        if not failed and trial.last_step > watch.first_step:
            self._paces[trial.kind].append(seconds / (trial.last_step - watch.first_step))
        self._judge(trial)
        return seconds

    def _judge(self, trial: Trial) -> None:
        result = folders.read_result(self._root, trial)
        best = None if result is None else best_of([trial], {trial.name: result})
        if best is not None and (self._best is None or best.score > self._best.score):
            self._best = best

    def line(self) -> str:
        """How things stand now, in a line."""
        watches = self._look()
        running = [f"{watch.trial.label} {watch.step}/{watch.trial.last_step}" for watch in watches]
        parts = [self._counts(), *running, *([str(self._best)] if self._best else []), self._time_left()]
        return " | ".join(parts)

    def block(self) -> list[str]:
        """How things stand now, a line for all of it and one for each running trial."""
        watches = self._look()
        width = max((len(watch.trial.label) for watch in watches), default=0)
        lines = [f"{self._counts()} | {self._time_left()}", *([str(self._best)] if self._best else [])]
        for watch in watches:
            full = round(_BAR * watch.step / watch.trial.last_step)
            bar = "█" * full + "░" * (_BAR - full)
            lines.append(
                f"  {watch.trial.label:<{width}}  {bar}  {watch.step:>6,} of {watch.trial.last_step:,}"
            )
        return lines

    def _look(self) -> list[_Watch]:
        """The running trials, each at the step that its journal says."""
        watches = list(self._watches.values())
        for watch in watches:
            watch.step = max(
                watch.step, folders.read_step(folders.trial_folder(self._root, watch.trial.name))
            )
        return watches

    def _counts(self) -> str:
        schedule = self._schedule
        failed = len(schedule.failed) + len(schedule.skipped)
        done = f"{self._done_before + len(schedule.done)}/{self._total} done"
        return f"{done} | {failed} failed" if failed else done

    def _time_left(self) -> str:
        left = self.seconds_left(self._clock())
        return "time left not known yet" if left is None else f"{duration(left)} left{_at(left)}"

    def seconds_left(self, now: float) -> float | None:
        """Seconds until the whole schedule is done; None before any speed is known."""
        paces = {kind: list(known) for kind, known in self._paces.items()}
        for watch in list(self._watches.values()):
            pace = watch.pace(now)
            if pace is not None:
                paces[watch.trial.kind].append(pace)
        known = paces["trial"] or paces["warmup"]
        if not known:
            return None
        mean = {kind: sum(own or known) / len(own or known) for kind, own in paces.items()}

        def estimate(trial: Trial) -> float:
            return mean[trial.kind] * (trial.last_step - trial.first_step)

        running = {
            name: (watch.pace(now) or mean[watch.trial.kind]) * (watch.trial.last_step - watch.step)
            for name, watch in list(self._watches.items())
        }
        return seconds_left(list(self._schedule.waiting.values()), running, estimate, self._schedule.slots)


def _at(seconds: float) -> str:
    """`, done at 18:42` for what takes longer than a minute."""
    if seconds < 60:
        return ""
    return time.strftime(", done at %H:%M", time.localtime(time.time() + seconds))


@contextmanager
def shown(progress: Progress, line: LiveLine, every: float = 1.0) -> Iterator[None]:
    """Keep `line` up to date from a thread of its own."""
    stop = threading.Event()

    def refresh() -> None:
        while not stop.wait(every):
            line.show(progress.line(), time.monotonic(), progress.block())

    thread = threading.Thread(target=refresh, name="progress", daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
        line.clear()
