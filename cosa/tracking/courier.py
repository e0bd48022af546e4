"""Delivers a run's journal while the run goes on, in a thread that training never waits for."""

from __future__ import annotations

import contextlib
import threading
from collections import deque
from pathlib import Path

from cosa.tracking.journal import Lock, read_run_id
from cosa.tracking.place import TrackingError
from cosa.tracking.sync import Delivery

_PAUSE = 2.0
"""Seconds between two deliveries; after a failure twice as long each time, up to the longest."""
_LONGEST_PAUSE = 30.0


class Courier:
    """A thread that delivers what a journal holds, again and again until it is told to end."""

    def __init__(self, out: Path, uri: str) -> None:
        """Nothing is begun before `start`."""
        self.run_id = read_run_id(out)
        self.notes: deque[str] = deque()
        """What the user is to know of, to be taken from here."""
        self.failure = ""
        """Why the last attempt did not deliver everything; empty where it did."""
        self._out = out
        self._uri = uri
        self._lock = Lock(out)
        self._delivery: Delivery | None = None
        self._changed = threading.Condition()
        self._wanted = self._done = 0  # calls of `deliver`: the last one made, the last one answered
        self._ending = False
        self._thread = threading.Thread(target=self._work, name="tracking", daemon=True)

    def start(self) -> None:
        """Begin to deliver."""
        self._thread.start()

    def deliver(self, seconds: float) -> bool:
        """Have all delivered that the journal holds by now, waiting for one attempt and at most so long.

        Returns:
            Whether it was; `failure` says why not.
        """
        with self._changed:
            self._wanted += 1
            wanted = self._wanted
            self._changed.notify_all()
            if not self._changed.wait_for(lambda: self._done >= wanted, seconds):
                self.failure = self.failure or f"it took longer than {seconds:g} s"
                return False
            return not self.failure

    def end(self) -> None:
        """No further attempt; the journal is free for others as soon as one under way is over."""
        with self._changed:
            self._ending = True
            self._changed.notify_all()
        self._thread.join(timeout=1.0)

    def _work(self) -> None:
        pause = _PAUSE
        try:
            while True:
                with self._changed:
                    self._changed.wait_for(lambda: self._ending or self._wanted > self._done, pause)
                    if self._ending:
                        return
                    wanted = self._wanted
                failure = self._attempt(urgent=wanted > self._done)
                pause = min(2 * pause, _LONGEST_PAUSE) if failure else _PAUSE
                with self._changed:
                    self.failure, self._done = failure, wanted
                    self._changed.notify_all()
        finally:
            self._lock.release()

    def _attempt(self, *, urgent: bool) -> str:
        """Deliver; returns why not everything went."""
        try:
            if not self._lock.acquire():
                return "another process delivers it just now"
            self._delivery = self._delivery or Delivery(self._out, self._uri)  # only now: the lock is ours
            self._delivery.run(all_files=urgent)
        except TrackingError as error:
            failure = str(error).partition("; ")[0]  # what to do is said at the run's end
            if not self.failure:
                self.notes.append(
                    f"training goes on, what is tracked is kept in {str(self._out)!r}: {failure}"
                )
            return failure
        except Exception as error:  # noqa: BLE001 (a thread that ends without a word would lose the rest)
            return f"{type(error).__name__}: {error}"
        finally:
            if self._delivery is not None:
                self.run_id = self._delivery.account.run_id
                with contextlib.suppress(IndexError):
                    while True:
                        self.notes.append(self._delivery.notes.popleft())
        return (
            f"{len(waiting)} files could not be kept" if (waiting := self._delivery.account.waiting) else ""
        )
