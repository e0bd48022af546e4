"""How progress and metrics look on a terminal and in a log file."""

from __future__ import annotations

import logging
import math
import shutil
import sys
import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cosa.training.trainer import Progress
else:
    Progress = Any  # the trainer imports torch; tests check annotations as the program runs


class Display(logging.Handler):
    """Progress of a run: a line that is rewritten in place on a terminal, plain lines elsewhere."""

    def __init__(self) -> None:
        super().__init__(logging.INFO)
        self._stream = sys.stdout
        self.terminal = sys.stdout.isatty()
        self._open = False

    def __call__(self, progress: Progress) -> None:
        """Show where the run stands; an evaluation stays on the screen."""
        if "train/loss/total" in progress.metrics:
            self.rewrite(_progress_line(progress))
        evaluated = _evaluation_line(progress)
        if evaluated:
            self.line(evaluated)

    def emit(self, record: logging.LogRecord) -> None:
        """Show a notice, or a warning marked as such, on a line of its own."""
        marked = "" if record.levelno < logging.WARNING else f"{record.levelname.lower()}: "
        self.line(marked + record.getMessage())

    def line(self, text: str) -> None:
        """A line that stays."""
        self.rest()
        self._stream.write(text + "\n")
        self._stream.flush()

    def rewrite(self, text: str) -> None:
        """A line that the next one replaces on a terminal."""
        if not self.terminal:
            self.line(text)
            return
        self._stream.write("\r\x1b[2K" + text[: shutil.get_terminal_size().columns - 1])
        self._stream.flush()
        self._open = True

    def rest(self) -> None:
        """Leave the line that was being rewritten."""
        if self._open:
            self._stream.write("\n")
            self._stream.flush()
        self._open = False


class Counter:
    """How far a command has come: `12/57 images | 3.4 images/s | 13 s left`."""

    def __init__(self, display: Display, total: int, what: str) -> None:
        self._display, self._total, self._what = display, total, what
        self._done = 0
        self._begun = time.perf_counter()
        self._shown = -math.inf

    def add(self, count: int) -> None:
        """So many more are done; a log file hears of it only now and then."""
        self._done += count
        now = time.perf_counter()
        pause = 0.2 if self._display.terminal else 10.0
        if now < self._shown + pause and self._done < self._total:
            return
        self._shown = now
        speed = self._done / max(now - self._begun, 1e-9)
        left = duration((self._total - self._done) / speed)
        self._display.rewrite(
            f"{self._done}/{self._total} {self._what} | {speed:.3g} {self._what}/s | {left} left"
        )


def _progress_line(progress: Progress) -> str:
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


def _evaluation_line(progress: Progress) -> str:
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
