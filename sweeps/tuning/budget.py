"""What a search may cost and what it has cost, over all starts of the same command line."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from cosa.cli.console import duration

DEFAULT_TRIALS = 30


@dataclass(frozen=True)
class Spent:
    """What a search has cost so far."""

    trials: int
    """Trials begun."""
    seconds: float
    """Of wall time, while the search's driver ran."""
    gpu_seconds: float
    """Of all GPUs that trials held, warm-ups among them."""


@dataclass(frozen=True)
class Budget:
    """Limits, of which the first one reached ends the search; trials that run then come to their end."""

    trials: int | None = None
    hours: float | None = None
    gpu_hours: float | None = None

    def __post_init__(self) -> None:
        for flag, value in (
            ("--trials", self.trials),
            ("--hours", self.hours),
            ("--gpu-hours", self.gpu_hours),
        ):
            if value is not None and not (value > 0 and math.isfinite(value)):
                raise ValueError(f"{flag} must be > 0, got {value:g}; a search needs a budget")

    def left(self, spent: Spent) -> bool:
        """Whether one more trial may begin."""
        return (
            (self.trials is None or spent.trials < self.trials)
            and (self.hours is None or spent.seconds < 3600 * self.hours)
            and (self.gpu_hours is None or spent.gpu_seconds < 3600 * self.gpu_hours)
        )

    def text(self) -> str:
        """`30 trials or 12 h`."""
        parts = [
            f"{self.trials} trials" if self.trials is not None else "",
            f"{self.hours:g} hours" if self.hours is not None else "",
            f"{self.gpu_hours:g} GPU-hours" if self.gpu_hours is not None else "",
        ]
        return " or ".join(filter(None, parts))


class Ledger:
    """Counts a search's time and keeps it in a file, so that a killed driver's time counts as well."""

    def __init__(self, path: Path, gpus: float, clock: Callable[[], float]) -> None:
        """Go on with what the file says.

        Args:
            path: The file, made at the first note.
            gpus: GPUs that a running trial holds.
            clock: Seconds that only rise.
        """
        self._path = path
        self._gpus = gpus
        self._clock = clock
        self._last = clock()
        self.seconds, self.gpu_seconds = read_spent(path)

    def note(self, running: int) -> None:
        """Count the time since the last note, in which `running` trials ran, and write it down."""
        now = self._clock()
        passed, self._last = now - self._last, now
        self.seconds += passed
        self.gpu_seconds += passed * running * self._gpus
        draft = self._path.with_suffix(".draft")
        draft.write_text(json.dumps({"seconds": self.seconds, "gpu_seconds": self.gpu_seconds}) + "\n")
        draft.replace(self._path)

    def text(self) -> str:
        """`2 h 10 min`, with the GPUs' hours where there are GPUs."""
        gpus = f", {self.gpu_seconds / 3600:.1f} GPU-hours" if self._gpus else ""
        return duration(self.seconds) + gpus


def read_spent(path: Path) -> tuple[float, float]:
    """Seconds and GPU-seconds that a ledger's file holds; zeros where there is none."""
    try:
        content = json.loads(path.read_text())
    except FileNotFoundError:
        return 0.0, 0.0
    return float(content["seconds"]), float(content["gpu_seconds"])
