"""The live view of a sweep or a search: which trials run, how far each is, and when all will be done."""

from __future__ import annotations

import contextlib
import heapq
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from statistics import fmean

from cosa.cli.console import LiveLine, duration, markdown_cell
from sweeps.planning.folder import Result, read_step, trial_folder
from sweeps.planning.plan import Trial
from sweeps.running.queue import Attempt, TrialQueue
from sweeps.tables.metrics import METRICS, SEG_MIOU, judged_key

_MEASURABLE = 0.1
"""Part of a trial that must be done before its speed says anything: it starts with imports."""
_TELL_SECONDS = 30
_BAR = 20
"""Characters of a trial's bar on a terminal."""


Tell = Callable[[Mapping[str, float], str], object]
"""Takes how a sweep stands: counts by their metric's name, and Markdown."""


class SweepProgress:
    """How a queue stands. The running trials' journals say how far they are; nothing is asked of them."""

    def __init__(
        self,
        queue: TrialQueue,
        head: Callable[[], Sequence[str]],
        *,
        all_queued: bool = True,
        before: int = 0,
        tell: Tell | None = None,
    ) -> None:
        """Nothing is read yet.

        Args:
            queue: What runs and waits.
            head: What stands first: how much is done, what failed, the best so far.
            all_queued: Whether all that will ever run is in the queue, so that an end can be foretold.
            before: Trials that were done before.
            tell: Told how things stand twice a minute, and in the end.
        """
        self._queue, self._head, self._all_queued = queue, head, all_queued
        self._before, self._tell = before, tell

    def lines(self) -> tuple[str, list[str]]:
        """How things stand now: in a line, and in one for all of it with one for each running trial."""
        steps = self.steps()
        head, left = self._head(), self._time_left(steps)
        running = [f"{run.trial.label} {step}/{run.trial.last_step}" for run, step in steps]
        width = max((len(run.trial.label) for run, _ in steps), default=0)
        bars = []
        for run, step in steps:
            full = round(_BAR * step / max(run.trial.last_step, 1))
            bar = "█" * full + "░" * (_BAR - full)
            bars.append(f"  {run.trial.label:<{width}}  {bar}  {step:>6,} of {run.trial.last_step:,}")
        return " | ".join([*head, *running, *left]), [" | ".join([*head, *left]), *bars]

    @contextmanager
    def shown(self, line: LiveLine, every: float = 1.0) -> Iterator[None]:
        """Keep `line` up to date from a thread of its own."""
        stop = threading.Event()

        def refresh() -> None:
            told = 0.0
            while not stop.wait(every):
                line.show(*self.lines())
                if time.monotonic() - told >= _TELL_SECONDS:
                    told = time.monotonic()
                    self._tell_now()

        thread = threading.Thread(target=refresh, name="progress", daemon=True)
        thread.start()
        try:
            yield
        finally:
            stop.set()
            thread.join()
            line.clear()
            self._tell_now()

    def _tell_now(self) -> None:
        if self._tell:
            with contextlib.suppress(OSError):  # a full disk ends trials, which say so
                self._tell(*self.standing())

    def standing(self) -> tuple[dict[str, float], str]:
        """How things stand now: counts of trials and, where it is known, the hours left; and as Markdown."""
        queue, steps = self._queue, self.steps()
        ended = [run.why for run in list(queue.ended)]
        counts: dict[str, float] = {
            "sweep/done": self._before + ended.count(""),
            "sweep/running": len(steps),
            "sweep/waiting": len(queue.waiting),
            "sweep/failed": len(queue.failures),
        }
        left = self.seconds_left(steps) if self._all_queued else None
        if left is not None:
            counts["sweep/hours_left"] = left / 3600
        rows = [
            f"| {markdown_cell(run.trial.label)} | {step:,} of {run.trial.last_step:,} |"
            for run, step in steps
        ]
        head = " | ".join([*self._head(), *self._time_left(steps)]).replace("|", "·")
        return counts, "\n".join([head, "", "| running now | steps |", "|:--|--:|", *rows]) if rows else head

    def steps(self) -> list[tuple[Attempt, int]]:
        """The running trials, each with its step."""
        out, running = self._queue.out, list(self._queue.running.values())
        return [(run, max(run.first_step, read_step(trial_folder(out, run.trial.name)))) for run in running]

    def _time_left(self, steps: Sequence[tuple[Attempt, int]]) -> list[str]:
        if not self._all_queued:
            return []
        left = self.seconds_left(steps)
        if left is None:
            return ["time left not known yet"]
        clock = time.strftime(", done at %H:%M", time.localtime(time.time() + left)) if left >= 60 else ""
        return [f"{duration(left)} left{clock}"]

    def seconds_left(self, steps: Sequence[tuple[Attempt, int]]) -> float | None:
        """Seconds until the whole queue is done; None before any speed is known."""
        now = self._queue.clock()
        told = [(run, run.seconds, run.steps) for run in list(self._queue.ended) if not run.why and run.steps]
        begun = [(run, now - run.started, step - run.first_step) for run, step in steps]
        told += [(run, seconds, done) for run, seconds, done in begun if done > _MEASURABLE * run.steps]
        paces: dict[tuple[bool, str], list[float]] = {}  # seconds per step, start-up included
        own = {}
        for run, seconds, done in told:
            own[run.trial.name] = seconds / done
            paces.setdefault(_pace(run.trial), []).append(seconds / done)
        if not paces:
            return None
        any_kind = paces[min(paces)]  # of trials rather than of warm-ups

        def pace(trial: Trial) -> float:
            return fmean(paces.get(_pace(trial), any_kind))

        running = {
            run.trial.name: own.get(run.trial.name, pace(run.trial)) * (run.trial.last_step - step)
            for run, step in steps
        }
        waiting = list(self._queue.waiting.values())
        return play_forward(waiting, running, lambda t: pace(t) * t.steps, self._queue.slots)


def _pace(trial: Trial) -> tuple[bool, str]:
    """What trials must have in common for the speed of one to say something of the other's."""
    return trial.kind == "warmup", trial.config.network.architecture


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
            if len(ends) < slots and trial.after not in open_names:
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
        trial.label: results[trial.name]["metrics"][key]
        for trial in trials
        if trial.kind == "trial" and not trial.config.oracle
        if (key := judged_key(SEG_MIOU, trial.config.judged_network))
        in results.get(trial.name, {}).get("metrics", {})
    }
    if not scores:
        return ""
    label = max(scores, key=lambda name: scores[name])
    return f"best {label}: {METRICS[SEG_MIOU].title} {100 * scores[label]:.1f}"
