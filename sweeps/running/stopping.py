"""How a sweep ends early: its trials save and stop first, then its driver does."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from cosa.training.stop import StopFile
from sweeps.planning import folder as folders

PATIENCE = 25.0
"""Seconds that trials have to end their step and save; machines that are taken back give thirty."""


@dataclass
class Stopping:
    """Whether the sweep was told to stop."""

    told: bool = False


@contextlib.contextmanager
def orderly(root: Path, note: Callable[[str], object], patience: float = PATIENCE) -> Iterator[Stopping]:
    """While the block runs, the first Ctrl-C or SIGTERM has the trials save and stop.

    The second one interrupts the block at once, and so does a trial that takes longer than `patience`
    seconds, such as one in the middle of an evaluation: it goes on from its last checkpoint.

    Args:
        root: Folder of the sweep, which all trials reach.
        note: Shows a line.
        patience: Seconds to wait for the trials.
    """
    stopping, file = Stopping(), StopFile(root / folders.STOP)
    file.path.unlink(missing_ok=True)  # of a driver that was killed
    timer = threading.Timer(patience, signal.raise_signal, [signal.SIGINT])
    timer.daemon = True

    def hear(number: int, frame: object) -> None:  # noqa: ARG001 (the signal's own signature)
        if stopping.told:
            raise KeyboardInterrupt
        stopping.told = True
        file.give()
        timer.start()
        text = "stopping: trials save and end, in half a minute at most; once more stops at once"
        threading.Thread(target=note, args=[text], daemon=True).start()  # the stream may be in use here

    numbers = [n for n in (signal.SIGINT, signal.SIGTERM) if signal.getsignal(n) != signal.SIG_IGN]
    before = {number: signal.signal(number, hear) for number in numbers}
    try:
        yield stopping
    finally:
        timer.cancel()
        for number, handler in before.items():
            signal.signal(number, handler)
        with contextlib.suppress(OSError):  # on a full disk it may stay: the next start removes it
            file.path.unlink(missing_ok=True)
