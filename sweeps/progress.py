"""The live line of a sweep: which trials run, how far each is, and when all will be done."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from sweeps import folders
from sweeps.console import LiveLine, duration
from sweeps.plan import Trial
from sweeps.schedule import Schedule, seconds_left

_MEASURABLE = 0.1
"""Part of a trial that must be done before its speed says anything: it starts with imports."""


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
        self, schedule: Schedule, root: Path, *, done_before: int, clock: Callable[[], float]
    ) -> None:
        self._schedule = schedule
        self._root = root
        self._done_before = done_before
        self._total = done_before + len(schedule.waiting)
        self._clock = clock
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
        return seconds

    def line(self) -> str:
        """How things stand now."""
        now = self._clock()
        for watch in list(self._watches.values()):
            watch.step = max(
                watch.step, folders.read_step(folders.trial_folder(self._root, watch.trial.name))
            )
        schedule = self._schedule
        parts = [f"{self._done_before + len(schedule.done)}/{self._total} done"]
        failed = len(schedule.failed) + len(schedule.skipped)
        if failed:
            parts.append(f"{failed} failed")
        parts += [
            f"{watch.trial.label} {watch.step}/{watch.trial.last_step}"
            for watch in list(self._watches.values())
        ]
        left = self.seconds_left(now)
        parts.append("time left not known yet" if left is None else f"{duration(left)} left{_at(left)}")
        return " | ".join(parts)

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
            line.show(progress.line(), time.monotonic())

    thread = threading.Thread(target=refresh, name="progress", daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
        line.clear()
