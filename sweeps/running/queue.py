"""Which trial may start next, and how those ended that did. Knows no Ray."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from sweeps.planning.folder import read_step, trial_folder
from sweeps.planning.plan import Trial


@dataclass(frozen=True)
class Attempt:
    """A trial that was started now, and how that ended."""

    trial: Trial
    started: float
    """Seconds of the queue's clock."""
    first_step: int
    """Step that this start goes on from."""
    seconds: float = 0.0
    """From its start by the driver until the driver knew its end; 0 while it runs."""
    why: str = ""
    """Why it failed; empty where it did not."""

    @property
    def steps(self) -> int:
        """Steps that it has to do."""
        return self.trial.last_step - self.first_step


class TrialQueue:
    """Trials in the order in which they start, as many at a time as allowed, each after its warm-up.

    There is no barrier between warm-ups and the rest: what is ready starts, whatever others wait for. The
    warm-up of a seed comes before the trials of the seed ahead of it, or in the end the last warm-up would
    run with nothing beside it: on two slots, Tables 3a and 3b of `shapes` over three seeds would leave 6 % of
    the time idle, as a barrier does; so it is 1 %.
    """

    def __init__(
        self,
        trials: Sequence[Trial],
        slots: int,
        out: Path,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Start with nothing running.

        Args:
            trials: Those to run; a warm-up that is not among them is finished.
            slots: Most trials that run at a time, >= 1.
            out: The sweep's folder, whose journals say where a trial goes on.
            clock: Seconds that only rise.
        """
        self.slots = slots
        first = sorted(trials, key=lambda t: (t.seed - (t.kind == "warmup"), t.kind != "warmup"))
        self.waiting = {trial.name: trial for trial in first}
        self.running: dict[str, Attempt] = {}
        self.ended: list[Attempt] = []
        self.failures: dict[str, str] = {}
        """Why trials failed or could not start, by name."""
        self.out = out
        self.clock = clock

    def start_next(self) -> Trial | None:
        """Start the first trial that is ready, or None while there is no slot or every other one waits."""
        if len(self.running) >= self.slots:
            return None
        for trial in self.waiting.values():
            if trial.after not in self.waiting and trial.after not in self.running:
                step = max(trial.first_step, read_step(trial_folder(self.out, trial.name)))
                del self.waiting[trial.name]
                self.running[trial.name] = Attempt(trial, self.clock(), step)
                return trial
        return None

    def end(self, name: str, why: str = "") -> None:
        """A running trial has ended, failed where there is a reason: what waits for it cannot run then."""
        run = self.running.pop(name)
        self.ended.append(replace(run, seconds=self.clock() - run.started, why=why))
        if why:
            self.failures[name] = why
            for trial in [*self.waiting.values()]:  # in the order of the plan: what waits comes later
                if trial.after in self.failures:
                    del self.waiting[trial.name]
                    self.failures[trial.name] = f"not run: {trial.after} failed"
