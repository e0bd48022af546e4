"""`cosa-track flush DIR`: deliver what runs could not; `cosa-track status DIR`: see what that is."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from cosa.cli.common import FAILED, Parser, add_traceback
from cosa.cli.console import print_error
from cosa.tracking import (
    RunGoneError,
    StillRunningError,
    TrackingError,
    find_tracked,
    sync_run,
    sync_status,
)


def main(prog: str, arguments: Sequence[str]) -> int:
    """What `cosa-track` does; returns the exit code."""
    parser = Parser(
        prog=prog,
        description="What runs told their tracker is kept in their folders until the tracking store has it. "
        "`flush` delivers what is left there of runs that have ended, and closes killed ones as KILLED; "
        "`status` shows how much is left.",
    )
    parser.add_argument("action", choices=("flush", "status"), metavar="flush|status")
    parser.flag("folder", "DIR", "a run's folder, or any folder above some", type=Path)
    parser.flag(
        "--tracking-uri",
        "URI",
        "of the store, if it moved or its URI has a password (default: where the run was tracked)",
        default="",
    )
    add_traceback(parser)
    given = parser.parse_known(arguments)
    folder = given.folder.expanduser().absolute()
    runs = find_tracked(folder)
    if not runs:
        raise ValueError(f"DIR must hold a run that was tracked, got none in {str(folder)!r}")
    names = {out: str(out.relative_to(folder)) if out != folder else out.name for out in runs}
    if given.action == "status":
        return _show(names)
    return _flush(prog, names, given.tracking_uri)


def _show(names: dict[Path, str]) -> int:
    for out, name in names.items():
        found = sync_status(out)
        run_id = found.run_id or "not made yet"
        state = "" if found.closed else ", not closed"
        print(f"{name}: {found.left} of {found.entries} entries left, run {run_id} in {found.uri}{state}")
    return 0


def _flush(prog: str, names: dict[Path, str], uri: str) -> int:
    """Deliver run by run; a store that does not answer is asked once, a run that is gone stops no other."""
    silent: set[str] = set()
    left = 0
    for out, name in names.items():
        store = uri or sync_status(out).uri
        if store in silent:
            left += sync_status(out).left
            continue
        try:
            found = sync_run(out, uri)
        except StillRunningError:
            print(f"{name}: has not ended, delivers by itself")
            continue
        except TrackingError as error:
            if not isinstance(error, RunGoneError):
                silent.add(store)
            print_error(f"{prog}: error: {error}")
            left += sync_status(out).left
            continue
        left += found.left
        went = (
            f"{found.delivered} entries delivered to run {found.run_id}"
            if found.delivered
            else "all is there"
        )
        print(f"{name}: {went}" + (f", {found.left} left" if found.left else ""))
        for note in found.notes:
            print_error(f"{name}: {note}")
    if left:
        print_error(f"{prog}: {left} entries are left; the same command delivers them later")
    return FAILED if left else 0
