"""`cosa-track flush DIR`: deliver what runs could not; `cosa-track status DIR`: see what that is."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from cosa.cli.common import FAILED, Parser
from cosa.cli.console import print_error
from cosa.tracking.journal import find_tracked, sync_status
from cosa.tracking.store import RunGoneError, TrackingError
from cosa.tracking.sync import StillRunningError, sync_run


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
    parser.traceback()
    given = parser.parse_known(arguments)
    folder = given.folder.expanduser().absolute()
    runs = find_tracked(folder)
    if not runs:
        raise ValueError(f"DIR must hold a run that was tracked, got none in {str(folder)!r}")
    names = {out: str(out.relative_to(folder)) if out != folder else out.name for out in runs}
    if given.action == "flush":
        return _flush(prog, names, given.tracking_uri)
    for out, name in names.items():
        found = sync_status(out)
        state = "" if found.closed else ", not closed"
        run = f"run {found.run_id or 'not made yet'} in {found.uri}{state}"
        print(f"{name}: {found.left} of {found.entries} entries left, {run}")
    return 0


def _flush(prog: str, names: dict[Path, str], uri: str) -> int:
    """Deliver run by run; a store that does not answer is asked once, a run that is gone stops no other."""
    silent: set[str] = set()
    left = 0
    for out, name in names.items():
        found = sync_status(out)
        store = uri or found.uri
        try:
            if store not in silent:
                found = sync_run(out, uri)
                some = f"{found.delivered} entries delivered to run {found.run_id}"
                rest = f", {found.left} left" if found.left else ""
                print(f"{name}: {some if found.delivered else 'all is there'}{rest}")
        except StillRunningError:
            print(f"{name}: has not ended, delivers by itself")
            continue
        except TrackingError as error:
            if not isinstance(error, RunGoneError):
                silent.add(store)
            print_error(f"{prog}: error: {error}")
            found = sync_status(out)
        left += found.left
        for note in found.notes:
            print_error(f"{name}: {note}")
    if left:
        print_error(f"{prog}: {left} entries are left; the same command delivers them later")
    return FAILED if left else 0
