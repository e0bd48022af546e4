"""The one terminal: lines for people, progress that is rewritten in place, tables of metrics.

On a terminal progress takes a line, or a few, that the next state replaces; in a log file it is a plain
line now and then. Nothing heavy is imported: `--help` and a sweep's plan answer at once.
"""

from __future__ import annotations

import logging
import math
import shutil
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from cosa.training.trainer import TrainProgress
else:
    TrainProgress = Any  # the trainer imports torch; tests check annotations as the program runs

T = TypeVar("T")

PLAIN_SECONDS = 15.0
"""Seconds between two progress lines where the output is no terminal, such as a Ray job's log."""


def print_line(text: str = "") -> None:
    """A line on standard output, at once."""
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def print_error(text: str) -> None:
    """A line on standard error, at once."""
    sys.stderr.write(text + "\n")
    sys.stderr.flush()


class LiveLine:
    """Progress: a few lines rewritten in place on a terminal, one plain line now and then elsewhere."""

    def __init__(self, *, every: float = PLAIN_SECONDS) -> None:
        """Write to standard output; where that is no terminal, at most one line in `every` seconds."""
        self._stream, self._every = sys.stdout, every
        self.terminal = self._stream.isatty()
        self._shown_at = -math.inf
        self._height = 0  # lines on the terminal that are to be rewritten

    def show(self, text: str, now: float | None = None, block: Sequence[str] = ()) -> None:
        """Show `text` as the state of things.

        Args:
            text: A line.
            now: Seconds of any clock that only rises (by default a clock of its own).
            block: The same in several lines, for a terminal.
        """
        if self.terminal:
            size = shutil.get_terminal_size()
            lines = list(block or (text,))
            if len(lines) > (room := max(1, size.lines - 2)):
                lines = [*lines[: room - 1], f"... and {len(lines) - room + 1} more"]
            self._write(self._erased() + "\n".join(line[: size.columns - 1] for line in lines))
            self._height = len(lines)
            return
        now = time.monotonic() if now is None else now
        if now - self._shown_at >= self._every:
            self._shown_at = now
            self._write(text + "\n")

    def note(self, text: str) -> None:
        """A line that stays, above the live ones."""
        self._write(f"{self._erased()}{text}\n")

    def clear(self) -> None:
        """Leave an empty line behind on a terminal."""
        self._write(self._erased())

    def keep(self) -> None:
        """Leave the live lines on the terminal as they stand, and go on below them."""
        if self._height:
            self._height = 0
            self._write("\n")

    def _erased(self) -> str:
        """What takes the live lines off the terminal, the cursor where the first one began."""
        if not self.terminal:
            return ""
        up = f"\x1b[{self._height - 1}A" if self._height > 1 else ""
        self._height = 0
        return f"\r{up}\x1b[J"

    def _write(self, text: str) -> None:
        self._stream.write(text)
        self._stream.flush()


class Display(logging.Handler):
    """Progress of a run, its evaluations and what it logs, on standard output."""

    def __init__(self) -> None:
        super().__init__(logging.INFO)
        self.live = LiveLine(every=0.0)

    def __call__(self, progress: TrainProgress) -> None:
        """Show where the run stands; an evaluation stays on the screen."""
        if "train/loss/total" in progress.metrics:
            self.live.show(_progress_line(progress))
        evaluated = _evaluation_line(progress)
        if evaluated:
            self.line(evaluated)

    def emit(self, record: logging.LogRecord) -> None:
        """Show a notice, or a warning marked as such, on a line of its own."""
        marked = "" if record.levelno < logging.WARNING else f"{record.levelname.lower()}: "
        self.line(marked + record.getMessage())

    def line(self, text: str) -> None:
        """A line that stays, below what was shown last."""
        self.live.keep()
        self.live.note(text)


class Counter:
    """How far a command has come: `12/57 images | 3.4 images/s | 13 s left`."""

    def __init__(self, total: int, what: str) -> None:
        self._live = LiveLine(every=0.0)
        self._total, self._what = total, what
        self._done = 0
        self._begun = time.perf_counter()
        self._shown = -math.inf

    def add(self, count: int) -> None:
        """So many more are done; a log file hears of it only now and then."""
        self._done += count
        now = time.perf_counter()
        pause = 0.2 if self._live.terminal else 10.0
        if now < self._shown + pause and self._done < self._total:
            return
        self._shown = now
        speed = self._done / max(now - self._begun, 1e-9)
        left = duration((self._total - self._done) / speed)
        self._live.show(f"{self._done}/{self._total} {self._what} | {speed:.3g} {self._what}/s | {left} left")

    def each(self, items: Iterable[T], size: Callable[[T], int] = lambda _: 1) -> Iterator[T]:
        """The items, each counted once the next one is asked for; the count then stays on the terminal."""
        for item in items:
            yield item
            self.add(size(item))
        self._live.keep()


class SplitBar:
    """How far reading is: a bar for each split on a terminal, a line per tenth elsewhere."""

    def __init__(self) -> None:
        self._live = LiveLine(every=0.0)
        self._split, self._tenth, self._begun = "", 0, 0.0

    def __call__(self, split: str, done: int, total: int) -> None:
        """Show that `done` of the `total` images of a split are read; 0 of 0 while it is opened."""
        if split != self._split:
            self.keep()
            self._split, self._tenth = split, 0
        if not total:
            self._live.show(f"{split}: opening")
            self._begun = time.monotonic()
            return
        left = (time.monotonic() - self._begun) / done * (total - done) if done else math.inf
        text = f"{done}/{total} images, {duration(left)} left"
        tenth = 10 * done // total
        if self._live.terminal:
            filled = 30 * done // total
            self._live.show(f"{split} [{'#' * filled}{'.' * (30 - filled)}] {text}")
        elif tenth > self._tenth:
            self._tenth = tenth
            self._live.show(f"{split}: {text}")

    def keep(self) -> None:
        """Leave the bar on the terminal, and go on below it."""
        self._live.keep()


def _progress_line(progress: TrainProgress) -> str:
    """`step 40/800 | 4 min left | 52 images/s | xi 0.44 0.39 | loss 1.78: cls 0.70 c2s 1.84`.

    What a narrow terminal cuts off comes last.
    """
    metrics = progress.metrics
    prefix = "train/loss/"
    terms = {name.removeprefix(prefix): v for name, v in metrics.items() if name.startswith(prefix)}
    total = terms.pop("total")
    thresholds = [metrics[name] for name in ("train/threshold", "train/aux_threshold") if name in metrics]
    parts = [
        f"step {progress.step}/{progress.iterations}",
        f"{duration(progress.seconds_left)} left",
        f"{progress.images_per_second:.3g} images/s",
        *(["xi " + " ".join(f"{xi:.2f}" for xi in thresholds)] if thresholds else []),
        f"loss {total:.3f}: " + " ".join(f"{name} {value:.3f}" for name, value in terms.items()),
    ]
    return " | ".join(parts)


def _evaluation_line(progress: TrainProgress) -> str:
    """The figures of an evaluation that matter most, in percent; empty where there was none."""
    found = []
    for network, short in NETWORKS.items():
        names = ("seg_miou", "seg_miou_labelled", "cpl_miou")
        values = [progress.metrics.get(f"val/{network}/{name}", math.nan) for name in names]
        if not all(map(math.isnan, values)):
            seg, labelled, cpl = (f"{100 * value:.1f}" for value in values)
            found.append(f"{short} seg {seg}, with image labels {labelled}, CPL {cpl}")
    return f"step {progress.step}: {' | '.join(found)}" if found else ""


def duration(seconds: float) -> str:
    """`45 s`, `12 min`, `3 h 05 min`; `?` where nobody knows yet."""
    if not math.isfinite(seconds):
        return "?"
    minutes = round(seconds / 60)
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60:02} min"


NETWORKS = {"assignment": "AN", "online": "ON"}

_CAPTIONS = {
    "seg_miou": "segmentation mIoU, label-free protocol",
    "seg_miou_labelled": "segmentation mIoU, labelled protocol (as in the paper on val)",
    "seg_cmiou": "segmentation C-mIoU, label-free protocol",
    "seg_cmiou_labelled": "segmentation C-mIoU, labelled protocol",
    "cpl_miou": "CPL mIoU at evaluation.xi",
    "cpl_cmiou": "CPL C-mIoU at evaluation.xi",
    "cpl_miou_own": "CPL mIoU at the training's own threshold",
    "cpl_best_miou": "CPL mIoU at its best threshold",
    "aux_cpl_miou": "CPL mIoU of M-dagger at evaluation.xi",
    "ensemble_cpl_miou": "CPL mIoU of both CAMs at evaluation.xi",
    "cls_map": "classification mAP",
    "cls_precision": "classification precision at probability 0.5",
    "cls_recall": "classification recall at probability 0.5",
}


def metrics_table(columns: Mapping[str, Mapping[str, float]]) -> str:
    """Metrics by name, one column per network, in percent."""
    rows = [(name, text) for name, text in _CAPTIONS.items() if any(name in c for c in columns.values())]
    width = max((len(text) for _, text in rows), default=0)
    lines = [" " * width + "".join(f"{title:>8}" for title in columns) + "   percent"]
    for name, text in rows:
        values = "".join(f"{100 * column.get(name, math.nan):8.2f}" for column in columns.values())
        lines.append(f"{text:{width}}{values}   {name}")
    return "\n".join(lines)


def aligned_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table that is also readable as it stands; all columns but the first hold numbers."""
    columns = list(zip(header, *rows, strict=True))
    widths = [max(map(len, column)) for column in columns]
    rule = [f"{'-' * (width - 1)}{'-' if i == 0 else ':'}" for i, width in enumerate(widths)]
    lines = []
    for row in (header, rule, *rows):
        cells = [
            text.ljust(width) if i == 0 else text.rjust(width)
            for i, (text, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)
