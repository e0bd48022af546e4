"""The terminal: progress in place, plain lines in a log, durations and tables that read well."""

from __future__ import annotations

import contextlib
import io
import logging
import math
import os
import re

import pytest

from cosa.cli import console
from cosa.training.trainer import TrainProgress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def _line_on(stream: io.StringIO) -> console.LiveLine:
    with contextlib.redirect_stdout(stream):
        return console.LiveLine()


def _display_on(stream: io.StringIO) -> console.Display:
    with contextlib.redirect_stdout(stream):
        return console.Display()


def _progress(step: int, **metrics: float) -> TrainProgress:
    losses = {"train/loss/cls": 0.5, "train/loss/total": 0.5}
    return TrainProgress(
        step=step,
        iterations=100,
        metrics=metrics or losses,
        checkpoint=None,
        images_per_second=12.34,
        seconds_left=400.0,
    )


def test_a_terminal_shows_progress_in_one_line_that_is_rewritten() -> None:
    terminal = Terminal()
    display = _display_on(terminal)

    display(_progress(10))
    display(_progress(20))
    display.live.keep()

    shown = terminal.getvalue()
    assert shown.count("\n") == 1
    assert "step 20/100 | 7 min left | 12.3 images/s | loss 0.500: cls 0.500" in shown


def test_an_evaluation_stays_on_the_terminal() -> None:
    terminal = Terminal()
    display = _display_on(terminal)

    names = ("seg_miou", "seg_miou_labelled", "cpl_miou")
    display(_progress(10, **{f"val/assignment/{name}": 0.25 for name in names}))

    assert terminal.getvalue().endswith("step 10: AN seg 25.0, with image labels 25.0, CPL 25.0\n")


def test_a_warning_does_not_run_into_the_line_being_rewritten() -> None:
    terminal = Terminal()
    display = _display_on(terminal)
    display(_progress(10))

    display.emit(logging.makeLogRecord({"msg": "mind", "levelno": logging.WARNING, "levelname": "WARNING"}))

    assert re.search(r"\n(\x1b\[J|\r)*warning: mind\n$", terminal.getvalue())


def test_a_notice_is_no_warning() -> None:
    terminal = Terminal()

    _display_on(terminal).emit(logging.makeLogRecord({"msg": "drawing", "levelno": logging.INFO}))

    assert terminal.getvalue().endswith("drawing\n")
    assert "info" not in terminal.getvalue()


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.0, "0 s"),
        (45.4, "45 s"),
        (75.0, "75 s"),
        (90.0, "2 min"),
        (300.0, "5 min"),
        (3 * 3600 + 300.0, "3 h 05 min"),
        (math.nan, "?"),
        (math.inf, "?"),
    ],
)
def test_durations_read_well(seconds: float, text: str) -> None:
    assert console.duration(seconds) == text


class Clock:
    """A clock that stands still until it is set."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(console.time, "monotonic", clock)
    return clock


def test_a_counter_shows_how_far_it_is_in_one_line_that_is_rewritten(clock: Clock) -> None:
    terminal = Terminal()
    with contextlib.redirect_stdout(terminal):
        counter = console.Counter(40, "val: ")

    for clock.now in (2.0, 4.0):
        counter.add(10)

    lines = terminal.getvalue().split("\r\x1b[J")
    assert lines == [
        "",
        "val: 10/40 images | 5 images/s | 6 s left",
        "val: 20/40 images | 5 images/s | 4 s left",
    ]


def test_a_counter_writes_to_a_log_file_now_and_then_and_at_the_end(clock: Clock) -> None:
    log = io.StringIO()
    with contextlib.redirect_stdout(log):
        counter = console.Counter(35)

    for clock.now in range(1, 36):
        counter.add(1)

    assert [line.partition("/")[0] for line in log.getvalue().splitlines()] == ["1", "16", "31", "35"]


def test_a_table_is_markdown_with_its_columns_aligned() -> None:
    table = console.aligned_table({"IoU": ["cat", "aeroplane"], "seg": ["10.00", "9.50"]})

    assert table.splitlines() == [
        "| IoU       |   seg |",
        "| --------- | ----: |",
        "| cat       | 10.00 |",
        "| aeroplane |  9.50 |",
    ]


def test_a_bar_in_a_name_ends_no_cell_of_a_table() -> None:
    table = console.aligned_table({"IoU": ["car|truck", "cat"], "seg": ["10.00", "9.50"]})

    assert table.splitlines() == [
        "| IoU        |   seg |",
        "| ---------- | ----: |",
        r"| car\|truck | 10.00 |",
        "| cat        |  9.50 |",
    ]


def test_a_metric_that_a_network_lacks_is_no_zero() -> None:
    table = console.metrics_table({"AN": {"seg_miou": 0.5}, "ON": {}})

    assert re.search(r"label-free protocol +50\.00 +nan   seg_miou$", table, re.MULTILINE)


def test_off_a_terminal_lines_come_now_and_then(clock: Clock) -> None:
    stream = io.StringIO()
    line = _line_on(stream)
    for clock.now in range(31):
        line.show(f"at {clock.now}")
    assert stream.getvalue() == "at 0\nat 15\nat 30\n"


def test_on_a_terminal_one_line_is_rewritten() -> None:
    stream = Terminal()
    line = _line_on(stream)
    line.show("one")
    line.show("two")
    line.note("stays")
    assert stream.getvalue() == "\r\x1b[Jone\r\x1b[Jtwo\r\x1b[Jstays\n"


def test_on_a_terminal_several_lines_are_rewritten_from_the_first() -> None:
    stream = Terminal()
    line = _line_on(stream)
    line.show("all", ["head", "a", "b"])
    line.show("all", ["head", "a"])
    line.clear()
    assert stream.getvalue() == "\r\x1b[Jhead\na\nb\r\x1b[2A\x1b[Jhead\na\r\x1b[1A\x1b[J"


def test_a_view_never_scrolls_or_wraps_on_a_small_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.get_terminal_size", lambda: os.terminal_size((12, 6)))
    stream = Terminal()
    _line_on(stream).show("", ["a very long head", *"abcdef"])
    assert stream.getvalue() == "\r\x1b[Ja very long\na\nb\n... and 4 m"


def test_live_lines_can_be_left_as_they_stand() -> None:
    stream = Terminal()
    line = _line_on(stream)
    line.show("one")
    line.keep()
    line.keep()
    assert stream.getvalue() == "\r\x1b[Jone\n"


def test_off_a_terminal_nothing_is_rewritten() -> None:
    stream = io.StringIO()
    line = _line_on(stream)
    line.show("all in one", ["head", "a"])
    line.note("stays")
    line.clear()
    assert stream.getvalue() == "all in one\nstays\n"
