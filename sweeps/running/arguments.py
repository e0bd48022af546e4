"""What the command line of a sweep script asks for, checked before anything is read or written."""

from __future__ import annotations

import os
from argparse import Namespace
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from cosa.cli.common import Parser
from cosa.config import Config, absolute_paths, override
from cosa.config.presets import PRESETS, get_preset, short_name
from cosa.distributed.session import TrialResources
from cosa.networks.published import pinned
from cosa.storage.files import mask, require_folder
from cosa.tracking import require_name, resolve_uri, sqlite_uri
from sweeps.tables import Table, get_tables

_JOB_FOLDER = "runtime_resources"
"""Part of the path of the folder into which Ray unpacks what a job uploads; it ends with the cluster."""


@dataclass(frozen=True, kw_only=True)
class SweepArgs:
    """What the command line asks for."""

    name: str
    """The script's name."""
    preset: str
    """A preset's name, or a file of settings."""
    base: Config
    """Settings of every arm, paths absolute."""
    tables: tuple[Table, ...]
    """Tables to fill."""
    seeds: range
    """Seeds of every arm."""
    out: Path
    """The sweep's folder."""
    uri: str
    """MLflow's tracking URI."""
    experiment: str
    system_metrics: bool
    """Whether trials keep how busy their machines were."""
    resources: TrialResources
    """What each trial asks of the cluster."""
    retries: int
    """New starts of a failed trial."""
    commit: str
    """Commit to record; empty where the code comes with its history."""
    dry_run: bool
    fresh: bool
    """Whether nothing is taken from earlier runs."""
    retry_failed: bool
    """Whether only what failed is run."""
    own: Namespace
    """Values of the script's own flags, such as `--supervised`."""


def read_args(
    name: str,
    description: str,
    tables: Sequence[str],
    arguments: Sequence[str],
    add_flags: Callable[[Parser], None] | None = None,
) -> SweepArgs:
    """What `arguments` ask for.

    Args:
        name: The script's name.
        description: What its `--help` says of it.
        tables: Tables that it fills where the command line names no others.
        arguments: The command line.
        add_flags: Adds the script's own to the parser.

    Raises:
        ValueError, TypeError: An unknown preset, table or setting, or a value against its law; settings of a
            standalone network.
    """
    parser = _parser(name, description, tables)
    if add_flags:
        add_flags(parser)
    found = parser.parse_args(arguments)
    if found.seeds < 1:
        raise ValueError(f"--seeds must be >= 1, got {found.seeds}")
    if found.retries < 0:
        raise ValueError(f"--retries must be >= 0, got {found.retries}")
    require_name("--experiment", found.experiment)
    require_name("--out", found.out)
    if "://" in found.out:
        raise ValueError(
            f"--out of a sweep must be a folder that all of its machines reach, got {mask(found.out)!r}; "
            "mount the storage, or keep single runs there: cosa-train --out URL"
        )
    home = _home()
    base = changed(get_preset(found.preset), found.set)
    if base.standalone:
        raise ValueError(
            f"network.architecture must be cosa in a sweep's preset, got {base.network.architecture!r}; "
            "standalone networks are rows of sweeps/multistage.py or of a table of your own"
        )
    base = pinned(base)
    out = home / Path(found.out or f"runs/{name}-{short_name(found.preset)}").expanduser()
    require_folder("--out", out)
    uri = found.tracking_uri or os.environ.get("MLFLOW_TRACKING_URI") or sqlite_uri(home / "runs/mlflow.db")
    return SweepArgs(
        name=name,
        preset=found.preset,
        base=base,
        tables=tuple(get_tables(found.tables)),
        seeds=range(base.train.seed, base.train.seed + found.seeds),
        out=out,
        uri=resolve_uri(uri),
        experiment=found.experiment,
        system_metrics=not found.no_system_metrics,
        resources=TrialResources(
            found.cpus_per_trial, found.gpus_per_trial, found.workers_per_trial, found.max_concurrent
        ),
        retries=found.retries,
        commit=found.commit,
        dry_run=found.dry_run,
        fresh=found.fresh,
        retry_failed=found.retry_failed,
        own=found,
    )


def _parser(name: str, description: str, tables: Sequence[str]) -> Parser:
    parser = Parser(prog=f"sweeps/{name}.py", description=description)
    flag, switch = parser.flag, parser.switch
    presets = f"settings of every arm: {', '.join(PRESETS)}, or a file such as best.json (default: shapes)"
    known = f"tables to fill: names such as {', '.join(tables or ['3a'])}, all, or files such as my_table.py"
    changes = "change settings of the preset, as in csc.weight=0.2; an arm's own changes win over them"
    gpus = "GPUs of a trial, 0.25 packs four on one (default: auto, the GPUs shared by --max-concurrent)"
    workers = "data-parallel processes of a trial; 0 and 1 train in the trial's own (default: 1)"
    flag("--preset", "PRESET", presets, default="shapes")
    flag(
        "--tables",
        "TABLE",
        f"{known} (default: {' '.join(tables) or 'its own'})",
        nargs="+",
        default=list(tables),
    )
    flag("--seeds", "N", "seeds of every arm, counted up from train.seed (default: 1)", type=int, default=1)
    flag("--set", "NAME=VALUE", changes, nargs="+", action="extend", default=[])
    flag("--out", "FOLDER", f"folder of the sweep (default: runs/{name}-PRESET)", default="")
    flag("--tracking-uri", "URI", "MLflow store (default: MLFLOW_TRACKING_URI or runs/mlflow.db)", default="")
    parser.experiment()
    parser.system_metrics()
    flag(
        "--max-concurrent",
        "N|auto",
        "most trials at a time; auto packs as many on a GPU as its memory holds (default: as many as fit)",
        type=concurrent,
    )
    flag("--cpus-per-trial", "N", "CPUs and threads of a trial (default: 1)", type=float, default=1.0)
    flag("--gpus-per-trial", "N", gpus, type=lambda text: None if text == "auto" else float(text))
    flag("--workers-per-trial", "N", workers, type=int, default=1)
    flag(
        "--retries",
        "N",
        "new starts of a failed trial, from its checkpoint (default: 1)",
        type=int,
        default=1,
    )
    switch(
        "--retry-failed",
        "run only what failed, and the warm-ups that it needs; leave what was never run alone",
    )
    switch(
        "--fresh",
        "train every trial here; by default one that finished in an earlier run of the experiment, with "
        "the same settings, data and commit, is taken from there",
    )
    flag(
        "--commit",
        "COMMIT",
        "commit to record where the code comes without its history: a Ray job",
        default="",
    )
    switch("--dry-run", "show the plan, train nothing")
    parser.traceback()
    return parser


def concurrent(text: str) -> int | Literal["auto"]:
    """The value of `--max-concurrent`."""
    return "auto" if text == "auto" else int(text)


def changed(config: Config, pairs: Sequence[str]) -> Config:
    """A config with the changes of `--set`, paths absolute.

    Raises:
        ValueError, TypeError: No pair NAME=VALUE, an unknown setting, or a value against its law.
    """
    changes = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not equals:
            raise ValueError(f"--set must be NAME=VALUE, got {pair!r}")
        changes[name.strip()] = value
    return absolute_paths(override(config, changes), _home())


def _home() -> Path:
    """Where relative paths start: here, or ~/cosa where here is a Ray job's copy of the code."""
    here = Path.cwd()
    return Path.home() / "cosa" if _JOB_FOLDER in here.parts else here
