"""How fast a run trains: the time of this session, evaluations left out."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator


class Clock:
    """Training speed of this session, evaluations left out."""

    def __init__(self, step: int) -> None:
        self.first_step = step
        self.begun = self.lap_begun = time.perf_counter()
        self.left_out = 0.0

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Time that does not count as training."""
        begun = time.perf_counter()
        yield
        self.left_out += time.perf_counter() - begun

    def speed(self, step: int) -> float:
        """Steps per second so far."""
        return (step - self.first_step) / max(time.perf_counter() - self.begun - self.left_out, 1e-9)

    def lap(self) -> float:
        """Seconds since the last lap, everything counted."""
        now = time.perf_counter()
        seconds, self.lap_begun = now - self.lap_begun, now
        return seconds
