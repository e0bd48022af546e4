"""A run's own folder: whose it is, its journal of metrics, and the mark of a finished run."""

from __future__ import annotations

import json
from pathlib import Path

from cosa.config import MACHINE_FIELDS, Config, difference, from_json, identity


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
