"""The identities of every preset and of every arm of every table, as the plan of a sweep finds them."""

from __future__ import annotations

from cosa.config import identity, warmup_identity
from cosa.config.presets import PRESETS, get_preset
from sweeps.planning.plan import make_plan
from sweeps.tables import tables


def identities() -> dict[str, dict[str, list[str]]]:
    """Identity and warm-up identity by preset and by arm, or why an arm does not go with a preset."""
    found: dict[str, dict[str, list[str]]] = {}
    for name in PRESETS:
        preset = get_preset(name)
        own = found[name] = {"preset": [identity(preset), warmup_identity(preset)]}
        for table in tables().values():
            try:
                plan = make_plan(preset, [table], [preset.train.seed])
            except ValueError as error:
                own[table.name] = [f"does not apply: {error}"]
                continue
            for trial in plan.trials:
                rows = trial.arms if trial.kind == "trial" else [f"warm-up of {' '.join(trial.arms)}"]
                for row in rows:
                    own[row] = [trial.name, identity(trial.config), warmup_identity(trial.config)]
    return found
