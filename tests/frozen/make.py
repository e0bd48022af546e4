"""Made the files in `data/`, on commit 25ac2bd: `python -m tests.frozen.make [PART ...]`, from the root.

The files are what that commit does. Made again on later code they would freeze nothing, so this script
refuses where `cosa/` or `sweeps/` differ from 25ac2bd: `git log --follow` leads to the commit on which it
ran. Parts, each some seconds to some minutes on two cores:

    identities   earlier_presets.json; identities.json and presets.json are of today, see identities.py
    training     training.json, names_run.json, stopped_run.tar.gz
    report       report.tar.gz (a store), tables.csv, tables.md, tables.tex, tables.txt, report_cells.json
    sweep        interrupted_sweep.tar.gz, sweep_tables.csv, names_sweep.json

Of these tables, rows without SA and the column `network` are of today, see test_report.py.
"""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from cosa.config import identity, to_json, warmup_identity
from cosa.config.presets import PRESETS, get_preset
from tests.frozen import recipe
from tests.frozen.recipe import DATA, ROOT

COMMIT = "25ac2bd"


def main() -> None:
    """Make the named parts, or all."""
    changed = subprocess.run(
        ["git", "diff", "--quiet", COMMIT, "--", "cosa", "sweeps"], cwd=ROOT, check=False
    )
    if changed.returncode:
        sys.exit(f"cosa/ and sweeps/ must be those of {COMMIT}: what later code does is not what is frozen")
    parts = {"identities": make_identities, "training": make_training, "report": make_report}
    parts["sweep"] = make_sweep
    for part in sys.argv[1:] or parts:
        with tempfile.TemporaryDirectory() as folder:
            parts[part](recipe.roomy(Path(folder)))


def make_identities(folder: Path) -> None:
    """Each preset's identities, and its settings as text."""
    presets = {name: get_preset(name) for name in PRESETS}
    _write(
        "earlier_presets.json",
        {
            name: {"identities": [identity(preset), warmup_identity(preset)], "settings": to_json(preset)}
            for name, preset in presets.items()
        },
    )


def make_training(folder: Path) -> None:
    """The small run on one rank and on two, the names it leaves in MLflow, and one that was stopped."""
    recipe.write_data(folder)
    recipe.finish(recipe.train_command("run", "--tracking-uri", f"sqlite:///{folder}/mlflow.db"), folder)
    _write("names_run.json", recipe.names_in_store(folder))
    ranks = [
        recipe.start(recipe.two_ranks_command(rank, "run/config.json", "two"), folder) for rank in (0, 1)
    ]
    assert [process.wait() for process in ranks] == [0, 0]
    _write(
        "training.json",
        {
            "made on": recipe.made_on(),
            "one rank": recipe.journal(folder / "run"),
            "two ranks": recipe.journal(folder / "two"),
        },
    )
    process = recipe.start(recipe.train_command("stopped", "--tracking-uri", "none"), folder)
    while recipe.last_step(folder / "stopped") < 15:
        assert process.poll() is None, "it came to its end before it was stopped"
        time.sleep(0.005)
    process.send_signal(signal.SIGTERM)
    assert process.wait() == 143
    (newest,) = sorted((folder / "stopped/checkpoints").glob("step_*.pt"))[-1:]
    assert "step_00000013" < newest.stem < "step_00000024", newest
    recipe.pack(
        folder,
        DATA / "stopped_run.tar.gz",
        lambda name: name.parts[0] == "stopped" and "step_00000012" not in name.name,
    )


def make_report(folder: Path) -> None:
    """The store of a finished sweep that takes some trials from an earlier one, and its report."""
    recipe.write_data(folder)
    for out, tables, seeds in (("first", ["4b"], "1"), ("second", ["3a", "3b", "4b", "5c"], "2")):
        recipe.finish(
            recipe.sweep_command(
                folder, out, tables, recipe.REPORT_SETTINGS, "--seeds", seeds, "--cpus-per-trial", "0.5"
            ),
            folder,
        )
    _pack_store(folder)
    with tempfile.TemporaryDirectory() as other:
        again = recipe.roomy(Path(other))
        recipe.unpack(DATA / "report.tar.gz", again)
        recipe.finish(recipe.report_command(again, "second"), again)
        for name in ("tables.csv", "tables.md", "tables.tex", "tables.txt"):
            assert (again / "report" / name).read_text() == (folder / "second" / name).read_text(), name
            shutil.copyfile(again / "report" / name, DATA / name)
        _write("report_cells.json", recipe.html_cells((again / "report/report.html").read_text()))


def _pack_store(folder: Path) -> None:
    """All of the store but what the report does not read, and the pictures of most arms, for their size."""
    shown = recipe.runs_of_arms(folder, {"full", "no-CSC"})

    def kept(name: Path) -> bool:
        if name.suffix == ".png" and not shown & {*name.parts}:
            return False
        return name.name == "mlflow.db" or (
            name.parts[0] == "mlartifacts" and not {"model", "report"} & {*name.parts}
        )

    recipe.pack(folder, DATA / "report.tar.gz", kept)


def make_sweep(folder: Path) -> None:
    """A sweep stopped in its second trial, and what the same sweep finds if nobody stops it."""
    whole = folder / "undisturbed"
    whole.mkdir()
    for place in (whole, folder):
        recipe.write_data(place)
    tables, settings = recipe.SWEEP_TABLES, recipe.SWEEP_SETTINGS
    recipe.finish(recipe.sweep_command(whole, "sweep", tables, settings, "--max-concurrent", "1"), whole)
    shutil.copyfile(whole / "sweep/tables.csv", DATA / "sweep_tables.csv")
    _write("names_sweep.json", recipe.names_in_store(whole))
    shutil.rmtree(whole)
    command = recipe.sweep_command(folder, "sweep", tables, settings, "--max-concurrent", "1")
    process = recipe.start(command, folder)
    while not _in_second_trial(folder / "sweep"):
        assert process.poll() is None, "it came to its end before it was stopped"
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    assert process.wait() == 130
    recipe.pack(
        folder,
        DATA / "interrupted_sweep.tar.gz",
        lambda name: name.parts[0] in {"mlflow.db", "mlartifacts", "sweep"} and "model" not in name.parts,
    )


def _in_second_trial(sweep: Path) -> bool:
    trials = [*(sweep / "trials").glob("trial-*")]
    done = [trial for trial in trials if (trial / "result.json").is_file()]
    return len(done) == 1 and any(recipe.last_step(trial) >= 36 for trial in trials if trial not in done)


def _write(name: str, content: Any) -> None:
    (DATA / name).write_text(json.dumps(content, indent=1, sort_keys=True) + "\n")


if __name__ == "__main__":
    main()
