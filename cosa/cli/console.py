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
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from cosa.training.trainer import TrainProgress

T = TypeVar("T")

PLAIN_SECONDS = 15.0
"""Seconds between two progress lines where the output is no terminal, such as a Ray job's log."""


def print_line(text: str = "") -> None:
    """A line on standard output, at once."""
    print(text, flush=True)


def print_error(text: str) -> None:
    """A line on standard error, at once."""
    print(text, file=sys.stderr, flush=True)


class LiveLine:
    """Progress: a few lines rewritten in place on a terminal, one plain line now and then elsewhere."""

    def __init__(self) -> None:
        self._stream = sys.stdout
        self.terminal = self._stream.isatty()
        self._shown_at = -math.inf
        self._height = 0  # lines on the terminal that are to be rewritten

    def show(self, text: str, block: Sequence[str] = (), *, always: bool = False) -> None:
        """Show `text` as the state of things.

        Args:
            text: A line.
            block: The same in several lines, for a terminal.
            always: Whether a log file gets the line however short after another.
        """
        if self.terminal:
            size = shutil.get_terminal_size()
            lines = list(block or (text,))
            if len(lines) > (room := max(1, size.lines - 2)):
                lines = [*lines[: room - 1], f"... and {len(lines) - room + 1} more"]
            self._write(self._erased() + "\n".join(line[: size.columns - 1] for line in lines))
            self._height = len(lines)
        elif always or time.monotonic() - self._shown_at >= PLAIN_SECONDS:
            self._shown_at = time.monotonic()
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
        self.live = LiveLine()

    def __call__(self, progress: TrainProgress) -> None:
        """Show where the run stands; an evaluation stays on the screen."""
        if "train/loss/total" in progress.metrics:
            self.live.show(_progress_line(progress), always=True)
        if evaluated := _evaluation_line(progress):
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

    def __init__(self, total: int, title: str = "") -> None:
        """Begin now to count to `total` images, on lines that start with `title`."""
        self.live = LiveLine()
        self.done, self._total, self._title = 0, total, title
        self._begun = time.monotonic()

    def add(self, count: int) -> None:
        """So many more are done; a log file hears of it now and then, the last count stays on a terminal."""
        self.done += count
        speed = self.done / max(time.monotonic() - self._begun, 1e-9)
        left = duration((self._total - self.done) / speed)
        text = f"{self._title}{self.done}/{self._total} images | {speed:.3g} images/s | {left} left"
        self.live.show(text, always=self.done == self._total)
        if self.done == self._total:
            self.live.keep()

    def each(self, items: Iterable[T], size: Callable[[T], int] = lambda _: 1) -> Iterator[T]:
        """The items, each counted once the next one is asked for."""
        for item in items:
            yield item
            self.add(size(item))


def _progress_line(progress: TrainProgress) -> str:
    """`step 40/800 | 4 min left | 52 images/s | xi 0.44 0.39 | loss 1.78: cls 0.70 c2s 1.84`.

    What a narrow terminal cuts off comes last.
    """
    metrics, prefix = progress.metrics, "train/loss/"
    terms = {name.removeprefix(prefix): v for name, v in metrics.items() if name.startswith(prefix)}
    total = terms.pop("total")
    xi = [f"{metrics[name]:.2f}" for name in ("train/threshold", "train/aux_threshold") if name in metrics]
    parts = [
        f"step {progress.step}/{progress.iterations}",
        f"{duration(progress.seconds_left)} left",
        f"{progress.images_per_second:.3g} images/s",
        *([" ".join(["xi", *xi])] if xi else []),
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
            of_cams = "" if network == "standalone" else f", CPL {cpl}"
            found.append(f"{short} seg {seg}, with image labels {labelled}{of_cams}")
    return f"step {progress.step}: {' | '.join(found)}" if found else ""


def duration(seconds: float) -> str:
    """`45 s`, `12 min`, `3 h 05 min`; `?` where nobody knows yet."""
    if not math.isfinite(seconds):
        return "?"
    minutes = round(seconds / 60)
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60:02} min"


NETWORKS = {"assignment": "AN", "online": "ON", "standalone": "network"}
"""How a run's networks are called in tables and lines."""

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


def markdown_cell(text: str) -> str:
    """`text` as it stands in a Markdown table, whose cells end at a bar."""
    return text.replace("|", r"\|")


def aligned_table(columns: Mapping[str, Sequence[str]]) -> str:
    """A Markdown table that is also readable as it stands; all columns but the first hold numbers."""
    padded = []
    for place, (title, texts) in enumerate(columns.items()):
        cells = [markdown_cell(text) for text in texts]
        width = max(map(len, (title, *cells)))
        rule, pad = ("-" * width, str.ljust) if place == 0 else ("-" * (width - 1) + ":", str.rjust)
        padded.append([pad(text, width) for text in (title, rule, *cells)])
    return "\n".join(f"| {' | '.join(row)} |" for row in zip(*padded, strict=True))
