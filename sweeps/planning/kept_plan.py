"""The plan that a sweep's folder keeps, `OUT/plan.json`: what the same folder may be asked for again.

More tables, more seeds, or fewer of them are fine. Other settings, or a row that has changed under its name,
would mix two experiments in one folder and are refused.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePath
from typing import Any

from cosa.config import MACHINE_FIELDS, Config, difference, override
from sweeps.planning.plan import Plan
from sweeps.runs import PLAN, RUN_KEY, base_of

_FREE = MACHINE_FIELDS | {"train.seed"}
"""Settings that change no result, and the first seed: plans name their seeds."""


def read(root: Path) -> Mapping[str, Any]:
    """The plan of the sweep in `root`, as `plan.to_json` wrote it; empty where there is none yet."""
    try:
        content: dict[str, Any] = json.loads((root / PLAN).read_text())
    except (FileNotFoundError, json.JSONDecodeError):
        return {}
    return content


def keep(root: Path, text: str) -> None:
    """Keep a plan in `root`, whole or not at all."""
    draft = root / f".{PLAN}.partial"
    draft.write_text(text)
    draft.replace(root / PLAN)


def check(root: Path, plan: Plan) -> None:
    """Refuse a plan that contradicts the one that `root` began with.

    Raises:
        ValueError: Settings or rows are others than before.
    """
    before = read(root)
    if not before:
        return
    changes = "; ".join([*_settings(base_of(before), plan.base)] or [*_rows(before, plan)])
    if changes:
        raise ValueError(
            f"settings must stay those of the sweep in {str(root)!r}, got {changes}; go on with the old "
            "ones, or begin another sweep with another --out"
        )


def _settings(before: Config, after: Config) -> Iterator[str]:
    """Settings of every arm that would change a result."""
    for name, old, new in difference(before, after):
        moved = name == "network.weights" and PurePath(old).name == PurePath(new).name
        if name not in _FREE and not moved:
            yield f"{name} {old} -> {new}"


def _rows(before: Mapping[str, Any], plan: Plan) -> Iterator[str]:
    """Rows that both plans have and that are trained otherwise."""
    base = base_of(before)
    kept = {
        (table["name"], arm["name"]): override(base, arm["changes"])
        for table in before["tables"]
        for arm in table["arms"]
    }
    for table in plan.tables:
        for arm in table.arms:
            if (old := kept.get((table.name, arm.name))) is not None:
                for name, was, now in difference(old, override(base, arm.changes)):
                    yield f"row {table.name}/{arm.name}: {name} {was} -> {now}"


def reused(root: Path) -> dict[str, str]:
    """Trials of the sweep in `root` that it took from earlier runs, by name, with the runs' ids."""
    return {trial["name"]: trial[RUN_KEY] for trial in read(root).get("trials", ()) if RUN_KEY in trial}
