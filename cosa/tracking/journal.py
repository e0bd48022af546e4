"""A run's journal: what was told, on the disk before anything else, and how much of it the store has.

    journal.jsonl            an entry a line: metrics as {"step", "time", NAME: VALUE...}; of a tracked run
                             also entries of other kinds: {"step", "time", "kind": "file"...}, among them
                             metrics of the machine, which no other run of the experiment repeats
    run.json                 the run's id in the store, and how much of the journal is there: SyncState
    tracking/journal.jsonl   entries that left the journal because a resumed run trains their steps again;
                             in folders that older code began, all that their trackers were told
    tracking/texts/          texts that are to be kept as files
    tracking/lock            held by whoever syncs: the run itself, or `cosa-track flush`

A step that is trained again is in the journal with its new values, which are marked as told before: the store
keeps the first ones, or may yet get them from a request that a killed process sent. No password is kept.
"""

from __future__ import annotations

import itertools
import json
import os
import re
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from cosa.storage.files import append_line, last_entry, read_lines, write_atomically

JOURNAL = "journal.jsonl"
REWOUND = "tracking/journal.jsonl"
RUN_FILE = "run.json"
TEXTS = "tracking/texts"
LOCK = "tracking/lock"
ODD_TAG = "cosa.non_finite."


@dataclass(frozen=True)
class Entry:
    """What a run was told at one moment."""

    kind: str
    """`open`, `data`, `metrics`, `file`, `tags` or `finish`; empty for a torn line, or one that no tracker
    was told."""
    end: int
    """Where the next line begins, in bytes."""
    content: Mapping[str, Any]
    """`step`, `time` in milliseconds, and what belongs to the kind."""
    metrics: Mapping[str, float]
    """Metrics by the names that MLflow takes, without those that were told before."""

    @property
    def tells(self) -> bool:
        """Whether there is something for the store."""
        return bool(self.metrics if self.kind == "metrics" else self.kind)


def read_entries(path: Path, start: int = 0) -> Iterator[Entry]:
    """Entries from the byte `start` on; nothing where there is no such file."""
    for line in read_lines(path, start):
        kind, metrics = line.content.get("kind", "metrics" if "time" in line.content else ""), {}
        if kind == "metrics" and "metrics" in line.content:  # as older code wrote them
            odd = {tag.removeprefix(ODD_TAG): text for tag, text in line.content["tags"].items()}
            metrics = {name: float(text.split()[0]) for name, text in odd.items()} | line.content["metrics"]
        elif kind == "metrics":
            rest = {"kind", "step", "time", "at", "again", *line.content.get("again", ())}
            metrics = {fit(name): value for name, value in line.content.items() if name not in rest}
        yield Entry(kind, line.end, line.content, metrics)


def fit(name: str) -> str:
    """`name` with the characters that MLflow refuses replaced."""
    return re.sub(r"[^\w\-. :/]", "_", name, flags=re.ASCII)


def first_open(out: Path) -> Mapping[str, Any] | None:
    """How the run in `out` was opened first; None for one that was never tracked."""
    entries = itertools.chain(read_entries(out / REWOUND), read_entries(out / JOURNAL))
    return next((entry.content for entry in entries if entry.kind == "open"), None)


def last_step(out: Path) -> int:
    """The last step that the journal of the run in `out` knows of."""
    return int(last_entry(out / JOURNAL).get("step", 0))


def add_entry(out: Path, step: int, **content: object) -> None:
    """Keep what the run in `out` is told at a step: metrics by their names, or another `kind`.

    Raises:
        OSError: No space, or no permission; one line.
    """
    entry = {"step": step, "time": int(time.time() * 1000), **content}
    append_line(out / JOURNAL, entry, sync=True)


def rewind(out: Path, step: int) -> None:
    """Cut off what was told after `step`, and a torn end. Of a tracked run it is kept for the store."""
    path = out / JOURNAL
    lines = list(read_lines(path)) if path.is_file() else []  # what is no file is told as it is written to
    at = next(
        (line.start for line in lines if line.content.get("step", 0) > step), lines[-1].end if lines else 0
    )
    tracked = (out / TEXTS).is_dir()
    cut = [line for line in lines if tracked and line.start >= at and "time" in line.content]
    for line in cut:  # before the cut, so that a kill between the two loses nothing
        append_line(out / REWOUND, {**line.content, "at": at}, sync=line is cut[-1])
    if path.is_file():
        os.truncate(path, at)


@dataclass
class SyncState:
    """What a run's store has of its journal, as `run.json` keeps it."""

    run_id: str = ""
    tracking_uri: str = ""
    """Without its password."""
    key: str = ""
    """Of the journal that the positions belong to."""
    journal: int = 0
    """The store has everything before this byte, but for what waits."""
    rewound: int = 0
    """The same of what left the journal."""
    waiting: list[dict[str, str]] = field(default_factory=list)
    """Files that could not be kept yet: `path`, and `folder` in the store."""


def read_state(out: Path) -> SyncState:
    """What is noted of the run in `out`; its id alone where the journal that is there now is another."""
    noted = _read_note(out)
    if "position" in noted:  # as older code wrote it
        waiting = [next(read_entries(out / REWOUND, start)).content for start in noted["waiting"]]
        noted["waiting"] = [{"path": file["path"], "folder": file["folder"]} for file in waiting]
        noted["rewound"] = noted["position"]
    known = {f.name for f in fields(SyncState)}
    state = SyncState(**{name: value for name, value in noted.items() if name in known})
    key = (first_open(out) or {}).get("key", "")
    if state.key != key or (state.journal and state.journal > (out / JOURNAL).stat().st_size):
        return SyncState(run_id=state.run_id, key=key)  # what is given again is there once
    return state


def _read_note(out: Path) -> dict[str, Any]:
    try:
        noted: dict[str, Any] = json.loads((out / RUN_FILE).read_text())
    except (FileNotFoundError, NotADirectoryError, ValueError):  # never tracked, or torn
        return {}
    return noted


def write_state(out: Path, state: SyncState) -> None:
    """Note it, whole or not at all."""
    write_atomically(out / RUN_FILE, json.dumps(asdict(state), indent=2) + "\n")


def read_run_id(out: Path) -> str:
    """The id of the tracked run that belongs to an out folder; empty where the store never told it."""
    return str(_read_note(out).get("run_id", ""))


def find_tracked(folder: Path) -> list[Path]:
    """Out folders in `folder`, itself among them, whose runs were tracked."""
    return sorted(path.parents[2] for path in folder.rglob(f"{TEXTS}/config.json"))


@dataclass(frozen=True)
class SyncStatus:
    """How much of what a run was told its store has."""

    run_id: str
    """The run's id in the store; empty where the store never told it."""
    uri: str
    """Tracking URI, without its password; empty for a run that was never tracked."""
    entries: int
    """What it was told, a step that was trained again once."""
    left: int
    """Of them not there yet."""
    closed: bool
    """Whether the run said how it ended."""
    delivered: int = 0
    """Entries that went now, where this is what a sync came to."""
    notes: tuple[str, ...] = ()
    """What it left out or what waits, and why."""


def sync_status(out: Path) -> SyncStatus:
    """How much of what the run in `out` was told its store has."""
    state = read_state(out)
    given = {out / REWOUND: state.rewound, out / JOURNAL: state.journal}
    told = [(entry, entry.end > end) for path, end in given.items() for entry in read_entries(path)]
    told = [(entry, left) for entry, left in told if entry.tells]
    opened = [entry.content["uri"] for entry, _ in told if entry.kind == "open"]
    events = [entry.kind for entry, _ in told if entry.kind in {"open", "finish"}]
    return SyncStatus(
        run_id=state.run_id,
        uri=opened[-1] if opened else "",
        entries=len(told),
        left=sum(left for _, left in told) + len(state.waiting),
        closed=events[-1:] == ["finish"],
    )
