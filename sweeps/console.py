"""The one place where a sweep talks to people: plain lines, and one line that is rewritten on a terminal."""

from __future__ import annotations

import shutil
import sys
from typing import TextIO

PLAIN_SECONDS = 15.0
"""Seconds between two progress lines where the output is no terminal, such as a Ray job's log."""


def say(text: str = "") -> None:
    """A line on standard output, at once."""
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def complain(text: str) -> None:
    """A line on standard error."""
    sys.stderr.write(text + "\n")
    sys.stderr.flush()


class LiveLine:
    """One line of progress: rewritten in place on a terminal, repeated now and then elsewhere."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._live = stream.isatty()
        self._shown_at = float("-inf")

    def show(self, text: str, now: float) -> None:
        """Show `text` as the state of things at the time `now` in seconds."""
        if self._live:
            width = shutil.get_terminal_size().columns - 1
            self._write(f"\r\x1b[K{text[:width]}")
        elif now - self._shown_at >= PLAIN_SECONDS:
            self._shown_at = now
            self._write(text + "\n")

    def note(self, text: str) -> None:
        """A line that stays, above the live one."""
        self._write(f"\r\x1b[K{text}\n" if self._live else text + "\n")

    def clear(self) -> None:
        """Leave an empty line behind on a terminal."""
        if self._live:
            self._write("\r\x1b[K")

    def _write(self, text: str) -> None:
        self._stream.write(text)
        self._stream.flush()


def duration(seconds: float) -> str:
    """`45 s`, `12 min` or `3 h 05 min`."""
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"
