"""A run's own folder: what is in it, whose it is, and whether the run is finished.

A trial of a sweep has a lock, a log and the reason of a failure beside these, see `sweeps.planning.folder`.

    config.json              the settings
    encoder.json             the published weights that it began from: their source, their SHA-256
    checkpoints/             whole states, the newest few, each with its SHA-256; see checkpoint.py
    journal.jsonl            every metric with its step, and what else a tracker was told, an entry a line
    panels/                  a picture panel per evaluation
    analysis/                counts behind the paper's analysis figures, per evaluation
    model/                   the final AN as safetensors and JSON; see model_files.py
    result.json              written last: its presence means that the run is finished
    run.json                 the run's id in the tracking store, and how much the store has of the run
    tracking/                what the tracker needs beside the journal; see cosa.tracking.journal
    ray/                     notes of Ray Train on the attempts of several workers
    .storage.lock            of a run at a URL: held by the process that brings or sends files; see mirror.py
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from cosa.config import MACHINE_FIELDS, Config, difference, from_json, identity
from cosa.storage.files import read_lines

TRAINING_TAG = "cosa.data_fingerprint"
"""Tag of a tracked run that says which data it learned from."""
VALIDATION_TAG = "cosa.val_fingerprint"
"""And which it was judged on; empty where it was not."""


def require_same_run(out: Path, config: Config) -> None:
    """Refuse a folder that holds another run than that of `config`.

    Raises:
        ValueError: The settings differ in what makes the experiment; they are named.
    """
    if not (out / "config.json").is_file():
        return
    before = from_json((out / "config.json").read_text())
    if identity(before) != identity(config):
        changes = "; ".join(
            f"{name} {old!r} -> {new!r}"
            for name, old, new in difference(before, config)
            if name not in MACHINE_FIELDS
        )
        raise ValueError(
            f"out must be a new folder or hold this very run, got {str(out)!r}, whose run differs in "
            f"{changes}; choose another folder or the old settings"
        )


def is_finished(out: Path, step: int) -> bool:
    """Whether the run ended after `step` steps."""
    path = out / "result.json"
    return path.is_file() and json.loads(path.read_text())["step"] == step


def read_metrics(out: Path, after: int = 0) -> Iterator[tuple[int, dict[str, float]]]:
    """A run's metrics by step, as its journal has them, of steps beyond `after`."""
    for line in read_lines(out / "journal.jsonl"):
        step = line.content.get("step", 0)
        if step > after and "kind" not in line.content:  # what else a tracked run was told has one
            yield step, {k: value for k, value in line.content.items() if k not in {"step", "time", "again"}}
