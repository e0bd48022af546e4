"""The one place where a sweep talks to people: plain lines, and one line that is rewritten on a terminal."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Sequence
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
    """Progress: a few lines rewritten in place on a terminal, one plain line now and then elsewhere."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._live = stream.isatty()
        self._shown_at = float("-inf")
        self._height = 0  # lines on the terminal that are to be rewritten

    def show(self, text: str, now: float, block: Sequence[str] = ()) -> None:
        """Show `text` as the state of things at the time `now` in seconds.

        Args:
            text: A line.
            now: Seconds of any clock that only rises.
            block: The same in several lines, for a terminal.
        """
        if self._live:
            size = shutil.get_terminal_size()
            lines = list(block or (text,))
            if len(lines) > (room := max(1, size.lines - 2)):
                lines = [*lines[: room - 1], f"... and {len(lines) - room + 1} more"]
            self._write(self._erased() + "\n".join(line[: size.columns - 1] for line in lines))
            self._height = len(lines)
        elif now - self._shown_at >= PLAIN_SECONDS:
            self._shown_at = now
            self._write(text + "\n")

    def note(self, text: str) -> None:
        """A line that stays, above the live ones."""
        self._write(f"{self._erased()}{text}\n")

    def clear(self) -> None:
        """Leave an empty line behind on a terminal."""
        self._write(self._erased())

    def _erased(self) -> str:
        """What takes the live lines off the terminal, the cursor where the first one began."""
        if not self._live:
            return ""
        up = f"\x1b[{self._height - 1}A" if self._height > 1 else ""
        self._height = 0
        return f"\r{up}\x1b[J"

    def _write(self, text: str) -> None:
        self._stream.write(text)
        self._stream.flush()


def duration(seconds: float) -> str:
    """`45 s`, `12 min` or `3 h 05 min`."""
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"
