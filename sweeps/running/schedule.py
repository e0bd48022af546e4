"""Which trial may start next, and when all will be done. Pure: knows no Ray, no files, no clock."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Mapping, Sequence

from sweeps.planning.plan import Trial


class Schedule:
    """Trials started in the plan's order, as many at a time as allowed, each after the one it forks from.

    There is no barrier: what is ready starts, whatever others still wait for.
    """

    def __init__(self, trials: Sequence[Trial], slots: int) -> None:
        """Start with nothing running.

        Args:
            trials: Those still to run; a warm-up that is not among them is finished.
            slots: Most trials that run at a time, >= 1.
        """
        self.slots = slots
        self.waiting = {trial.name: trial for trial in trials}
        self.running: dict[str, Trial] = {}
        self.done: dict[str, Trial] = {}
        self.failed: dict[str, Trial] = {}
        self.skipped: dict[str, Trial] = {}

    @property
    def exhausted(self) -> bool:
        """Whether nothing will ever start again."""
        return not self.waiting

    def start_next(self) -> Trial | None:
        """Start the first trial that is ready, or None while there is no slot or every other one waits."""
        if len(self.running) >= self.slots:
            return None
        for trial in self.waiting.values():
            if trial.warmup not in self.waiting and trial.warmup not in self.running:
                self.running[trial.name] = self.waiting.pop(trial.name)
                return trial
        return None

    def end(self, name: str, *, failed: bool) -> None:
        """A running trial has ended; what would fork from a failed one is skipped."""
        trial = self.running.pop(name)
        (self.failed if failed else self.done)[name] = trial
        if failed:
            forks = [fork for fork in self.waiting.values() if fork.warmup == name]
            self.skipped.update((fork.name, self.waiting.pop(fork.name)) for fork in forks)


def seconds_left(
    waiting: Sequence[Trial],
    running: Mapping[str, float],
    estimate: Callable[[Trial], float],
    slots: int,
) -> float:
    """Seconds until all have run, by playing the schedule forward.

    Args:
        waiting: Trials not started, in the order in which they will be.
        running: Seconds that each running trial still needs.
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
