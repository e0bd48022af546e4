"""The live view of a sweep or a search: which trials run, how far each is, and when all will be done."""

from __future__ import annotations

import heapq
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from statistics import fmean

from cosa.cli.console import LiveLine, duration
from sweeps.planning.folder import Result, read_step, trial_folder
from sweeps.planning.plan import Trial
from sweeps.running.queue import Attempt, TrialQueue
from sweeps.tables.metrics import METRICS, SEG_MIOU

_MEASURABLE = 0.1
"""Part of a trial that must be done before its speed says anything: it starts with imports."""
_BAR = 20
"""Characters of a trial's bar on a terminal."""


class SweepProgress:
    """How a queue stands. The running trials' journals say how far they are; nothing is asked of them."""

    def __init__(
        self, queue: TrialQueue, head: Callable[[], Sequence[str]], *, all_queued: bool = True
    ) -> None:
        """Nothing is read yet.

        Args:
            queue: What runs and waits.
            head: What stands first: how much is done, what failed, the best so far.
            all_queued: Whether all that will ever run is in the queue, so that an end can be foretold.
        """
        self._queue, self._head, self._all_queued = queue, head, all_queued

    def line(self) -> str:
        """How things stand now, in a line."""
        steps = self._steps()
        running = [f"{run.trial.label} {step}/{run.trial.last_step}" for run, step in steps]
        return " | ".join([*self._head(), *running, *self._time_left(steps)])

    def block(self) -> list[str]:
        """How things stand now, a line for all of it and one for each running trial."""
        steps = self._steps()
        width = max((len(run.trial.label) for run, _ in steps), default=0)
        lines = [" | ".join([*self._head(), *self._time_left(steps)])]
        for run, step in steps:
            full = round(_BAR * step / run.trial.last_step)
            bar = "█" * full + "░" * (_BAR - full)
            lines.append(f"  {run.trial.label:<{width}}  {bar}  {step:>6,} of {run.trial.last_step:,}")
        return lines

    def seconds_left(self) -> float | None:
        """Seconds until the whole queue is done; None before any speed is known."""
        return self._seconds_left(self._steps())

    @contextmanager
    def shown(self, line: LiveLine, every: float = 1.0) -> Iterator[None]:
        """Keep `line` up to date from a thread of its own."""
        stop = threading.Event()

        def refresh() -> None:
            while not stop.wait(every):
                line.show(self.line(), self.block())

        thread = threading.Thread(target=refresh, name="progress", daemon=True)
        thread.start()
        try:
            yield
        finally:
            stop.set()
            thread.join()
            line.clear()

    def _steps(self) -> list[tuple[Attempt, int]]:
        """The running trials, each with its step."""
        running = list(self._queue.running.values())
        out = self._queue.out
        return [(r, max(r.first_step, read_step(trial_folder(out, r.trial.name)))) for r in running]

    def _time_left(self, steps: Sequence[tuple[Attempt, int]]) -> list[str]:
        if not self._all_queued:
            return []
        left = self._seconds_left(steps)
        if left is None:
            return ["time left not known yet"]
        clock = time.strftime(", done at %H:%M", time.localtime(time.time() + left)) if left >= 60 else ""
        return [f"{duration(left)} left{clock}"]

    def _seconds_left(self, steps: Sequence[tuple[Attempt, int]]) -> float | None:
        now, known = self._queue.clock(), list(self._queue.ended)
        paces: dict[str, list[float]] = {"warmup": [], "trial": []}  # seconds per step, start-up included
        for ended in known:
            if not ended.why and ended.steps:
                paces[ended.trial.kind].append(ended.seconds / ended.steps)
        own = {}
        for run, step in steps:
            done = step - run.first_step
            if done > _MEASURABLE * run.steps:
                own[run.trial.name] = (now - run.started) / done
                paces[run.trial.kind].append(own[run.trial.name])
        any_kind = paces["trial"] or paces["warmup"]
        if not any_kind:
            return None
        mean = {kind: fmean(values or any_kind) for kind, values in paces.items()}
        running = {
            run.trial.name: own.get(run.trial.name, mean[run.trial.kind]) * (run.trial.last_step - step)
            for run, step in steps
        }
        waiting = list(self._queue.waiting.values())
        return play_forward(waiting, running, lambda t: mean[t.kind] * t.steps, self._queue.slots)


def play_forward(
    waiting: Sequence[Trial],
    running: Mapping[str, float],
    estimate: Callable[[Trial], float],
    slots: int,
) -> float:
    """Seconds until all trials have run.

    Args:
        waiting: Trials not started, in the order in which they will be.
        running: Seconds that each running trial still needs, by name.
        estimate: Seconds that a waiting trial will take.
        slots: Trials that run at a time.
    """
    now = 0.0
    ends = [(left, name) for name, left in running.items()]
    heapq.heapify(ends)
    todo = list(waiting)
    while ends or todo:
        open_names = {trial.name for trial in todo} | {name for _, name in ends}
        for trial in list(todo):
            if len(ends) < slots and trial.warmup not in open_names:
                heapq.heappush(ends, (now + estimate(trial), trial.name))
                todo.remove(trial)
        if not ends:  # what is left waits for a trial that nobody will run
            break
        now, _ = heapq.heappop(ends)
    return now


def best_so_far(trials: Sequence[Trial], results: Mapping[str, Result]) -> str:
    """The trial with the highest label-free mIoU so far, oracles apart: ground truth is no result.

    Args:
        trials: Trials to look among; a warm-up is none.
        results: What the trainer wrote of each that is finished, by name.
    """
    scores = {
        trial.label: results[trial.name]["metrics"][SEG_MIOU]
        for trial in trials
        if trial.kind == "trial" and not trial.config.oracle
        if SEG_MIOU in results.get(trial.name, {}).get("metrics", {})
    }
    if not scores:
        return ""
    label = max(scores, key=lambda name: scores[name])
    return f"best {label}: {METRICS[SEG_MIOU].title} {100 * scores[label]:.1f}"
