"""How a run is told to save or to stop while it trains: by SIGTERM, or by a file that all its machines reach.

Machines that are taken back, schedulers and `kill` say so a while before they act. A run that hears it ends
the step it is in, saves a checkpoint, and stops; the same command goes on from there.
"""

from __future__ import annotations

import contextlib
import enum
import math
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

_LOOK_SECONDS = 1.0  # between looks at a file, which may lie on a distant server


class StopSignal(enum.IntEnum):
    """What a run is to do after the step it is in; of several, the highest counts."""

    GO_ON = 0
    SAVE = 1
    """Save a checkpoint now, and go on: this machine may be gone soon."""
    STOP = 2
    """Save a checkpoint now, and stop."""


StopCheck = Callable[[], StopSignal]
"""Asked between two steps whether to go on."""


class StoppedError(Exception):
    """The run was told to stop, and did; the message says where, and that nothing of it is lost."""


def never() -> StopSignal:
    """Never stop."""
    return StopSignal.GO_ON


class StopFile:
    """A file whose presence tells a run to stop, wherever in the cluster it trains."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._looked = -math.inf
        self._found = False

    def check(self) -> StopSignal:
        """STOP from when the file is seen, which takes up to a second longer than it is there."""
        now = time.monotonic()
        if not self._found and now - self._looked >= _LOOK_SECONDS:
            self._looked = now
            self._found = self.path.exists()
        return StopSignal.STOP if self._found else StopSignal.GO_ON

    def give(self) -> None:
        """Tell the run to stop."""
        self.path.touch()


@contextlib.contextmanager
def until_terminated() -> Iterator[StopCheck]:
    """While the block runs, SIGTERM is an order to stop; a second one ends the process as it did before.

    To be used in the main thread, where Python hears signals.
    """
    told: list[int] = []

    def on_signal(number: int, frame: object) -> None:  # noqa: ARG001 (the signal's own signature)
        told.append(number)
        signal.signal(signal.SIGTERM, before)

    before = signal.signal(signal.SIGTERM, on_signal)
    try:
        yield lambda: StopSignal.STOP if told else StopSignal.GO_ON
    finally:
        signal.signal(signal.SIGTERM, before)
