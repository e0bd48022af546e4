"""Two checkouts, or two settings, measured side by side in one run: one call of each in turn, by CPU time.

Each side is a process of its own with one thread that imports `cosa` from its checkout and does one piece of
work whenever it is told to. A pair is one piece of each, so that a noisy machine is as noisy for both;
medians over pairs are printed, and the ratio is the median of the pairs' ratios.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
GIBIBYTE = 2**30

Work = Callable[[], int]
"""Does one piece of work and says how many images were in it."""


def arguments(doc: str) -> argparse.ArgumentParser:
    """What all benchmarks of pairs are asked for."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("other", type=Path, help="checkout to measure against; `.` for the same code")
    parser.add_argument("--pairs", type=int, default=7)
    parser.add_argument("--classes", type=int, default=20, help="foreground classes of the other side")
    parser.add_argument("--classes-here", type=int, help="of ours, where they differ")
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="of both sides")
    parser.add_argument("--set-here", action="append", default=[], metavar="NAME=VALUE", help="of ours")
    parser.add_argument("--side", help=argparse.SUPPRESS)
    return parser


def run(doc: str, settings: dict[str, str], prepare: Callable[[argparse.Namespace, Any], Work]) -> None:
    """Be one side where that is asked for, else start both and print what they took.

    Args:
        doc: The script's own.
        settings: Of its case, before what the command line sets.
        prepare: Makes the work of one side from the command line and the Config.
    """
    given = arguments(doc).parse_args()
    if given.side:
        _serve(given, settings, prepare)
        return
    sides = [_Side("here", ROOT), _Side("other", given.other.resolve())]
    pairs = [[side.once() for side in sides] for _ in range(given.pairs)]
    here, other = zip(*pairs, strict=True)
    say(f"{platform.processor() or platform.machine()}, one thread; medians of {given.pairs} pairs, CPU time")
    for side, found in zip(sides, (here, other), strict=True):
        seconds = statistics.median(one["seconds"] for one in found)
        say(
            f"{side.name:<6}{side.commit}  {seconds:.3f} s, {found[0]['images'] / seconds:.2f} images/s, "
            f"at most {found[-1]['peak'] / GIBIBYTE:.2f} GiB"
        )
    ratios = sorted(a["seconds"] / b["seconds"] for a, b in pairs)
    memory = here[-1]["peak"] / other[-1]["peak"]
    say(
        f"here / other: time {statistics.median(ratios):.3f} ({ratios[0]:.3f} to {ratios[-1]:.3f}), "
        f"memory {memory:.3f}"
    )
    for name, share in here[-1]["shares"].items():
        say(f"  {share:6.1%}  {name}")
    for side in sides:
        side.end()


def module(*names: str) -> Any:
    """The first of some modules that the checkout has: rooms were moved."""
    for name in names:
        try:
            return importlib.import_module(name)
        except ModuleNotFoundError as error:
            if not name.startswith(str(error.name)):
                raise
    raise ModuleNotFoundError(" or ".join(names))


def say(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


class _Side:
    """A process that works when it is told to."""

    def __init__(self, name: str, checkout: Path) -> None:
        self.name = name
        git = ["git", "-C", str(checkout), "describe", "--always", "--dirty", "--exclude", "*"]
        self.commit = subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip()
        threads = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "NO_ALBUMENTATIONS_UPDATE"), "1")
        self.process = subprocess.Popen(
            [sys.executable, *sys.argv, "--side", name],
            env={**os.environ, **threads, "PYTHONPATH": str(checkout)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self._answer()  # it is ready

    def once(self) -> dict[str, Any]:
        """What one piece of work took."""
        assert self.process.stdin
        self.process.stdin.write("go\n")
        self.process.stdin.flush()
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self.process.stdout
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"the side {self.name!r} ended with code {self.process.wait()}")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def end(self) -> None:
        assert self.process.stdin
        self.process.stdin.close()
        self.process.wait()


def _serve(
    given: argparse.Namespace,
    settings: dict[str, str],
    prepare: Callable[[argparse.Namespace, Any], Work],
) -> None:
    """One side: works once to warm up, then once for each line that it is told."""
    # an editable install would lend a checkout the modules that it does not have
    sys.meta_path[:] = [f for f in sys.meta_path if "__editable__" not in getattr(f, "__module__", "")]

    import torch

    from cosa.config import Config, override

    torch.set_num_threads(1)
    here = given.side == "here"
    changes = dict(item.split("=", 1) for item in (*given.set, *(given.set_here if here else ())))
    if here and given.classes_here:
        given.classes = given.classes_here
    work = prepare(given, override(Config(), settings | changes))
    work()
    SHARES.clear()
    say("{}")
    spent = 0.0
    for _ in sys.stdin:
        begun = time.process_time()
        images = work()
        seconds = time.process_time() - begun
        spent += seconds
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        shares = {name: share / spent for name, share in SHARES.items()}
        say(json.dumps({"seconds": seconds, "images": images, "peak": peak, "shares": shares}))


SHARES: dict[str, float] = {}
"""CPU seconds in what `share` watches."""


def share(name: str, owner: Any, attributes: Sequence[str]) -> None:
    """Count the CPU time of some functions of a module or class, without that of watched ones inside."""
    for attribute in attributes:
        setattr(owner, attribute, _watched(name, getattr(owner, attribute)))


_INSIDE: list[float] = []


def _watched(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    def watched(*args: Any, **kwargs: Any) -> Any:
        begun = time.process_time()
        _INSIDE.append(0.0)
        try:
            return function(*args, **kwargs)
        finally:
            spent = time.process_time() - begun
            own = spent - _INSIDE.pop()
            SHARES[name] = SHARES.get(name, 0.0) + own
            if _INSIDE:
                _INSIDE[-1] += spent

    return watched
