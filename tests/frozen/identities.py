"""The identities of every preset and of every arm of every table, as the plan of a sweep finds them.

`python -m tests.frozen.identities`, from the root, writes them and the presets' settings to `data/`. That is
for a change of a preset, in a commit that says why: results made before it are no longer found under it.
"""

from __future__ import annotations

import json

from cosa.config import identity, to_json, warmup_identity
from cosa.config.presets import PRESETS, get_preset
from cosa.networks.published import pinned
from sweeps.planning.plan import make_plan
from sweeps.tables import tables
from tests.frozen.recipe import DATA


def identities() -> dict[str, dict[str, list[str]]]:
    """Identity and warm-up identity by preset and by arm, or why an arm does not go with a preset."""
    found: dict[str, dict[str, list[str]]] = {}
    for name in PRESETS:
        preset = pinned(get_preset(name))
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


def as_texts() -> dict[str, str]:
    """Every preset's settings as a run keeps them."""
    return {name: to_json(get_preset(name)) for name in PRESETS}


if __name__ == "__main__":
    for file, content in (("identities.json", identities()), ("presets.json", as_texts())):
        (DATA / file).write_text(json.dumps(content, indent=1, sort_keys=True) + "\n")
