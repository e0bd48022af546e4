"""What the sweep scripts share: from the command line to the report, resumable at every point.

Every start makes the same plan from the same arguments and runs what the trials' folders do not say is
finished. Exit codes: 0 all is finished, 1 a trial failed, 2 the user's mistake, 130 interrupted.
"""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from cosa.config import Config, override
from cosa.presets import PRESETS, get_preset
from cosa.tracking import TrackingError, resolve_uri
from sweeps import folders
from sweeps.console import LiveLine, complain, duration, say
from sweeps.plan import Plan, Trial, draw_tree, make_plan
from sweeps.ray_session import Request
from sweeps.tables import get_tables

if TYPE_CHECKING:
    from sweeps.store import Sweep
    from sweeps.trial import Train

FAILED, MISTAKE, INTERRUPTED = 1, 2, 130

_JOB_FOLDER = "runtime_resources"
"""Part of the path of the folder into which Ray unpacks what a job uploads; it ends with the cluster."""


@dataclass(frozen=True)
class Order:
    """What the command line asks for."""

    name: str
    """The script's name."""
    preset: str
    base: Config
    """Settings of every arm, paths absolute."""
    plan: Plan
    root: Path
    """The sweep's folder."""
    uri: str
    experiment: str
    request: Request
    retries: int
    commit: str
    dry_run: bool


class _Parser(argparse.ArgumentParser):
    """Reports a bad command line in one line."""

    def error(self, message: str) -> NoReturn:
        """Called by argparse."""
        raise ValueError(f"{message}; see {self.prog} --help")


def main(
    name: str,
    description: str,
    tables: Sequence[str],
    arguments: Sequence[str] | None = None,
    train: Train | None = None,
) -> int:
    """A sweep script, from its command line to its exit code.

    Args:
        name: The script's name.
        description: What its `--help` says of it.
        tables: Tables that it fills where the command line names no others.
        arguments: The command line; by default the process's own.
        train: Stands for `cosa.trainer.train` in a test.
    """
    try:
        order = read_order(name, description, tables, sys.argv[1:] if arguments is None else arguments)
        if order.dry_run:
            _show_plan(order)
            return 0
        with folders.locked(order.root):
            return _run(order, train)
    except (ValueError, TypeError, OSError, TrackingError) as error:
        if "--traceback" in sys.argv:
            raise
        complain(f"{name}: {' '.join(str(error).split())}")
        return MISTAKE
    except KeyboardInterrupt:
        complain(f"interrupted; this goes on from here:\n  {shlex.join(['python', *sys.argv])}")
        return INTERRUPTED


def read_order(name: str, description: str, tables: Sequence[str], arguments: Sequence[str]) -> Order:
    """What `arguments` ask for.

    Raises:
        ValueError, TypeError: An unknown preset, table or setting, or a value against its law.
    """
    parser = _parser(name, description, tables)
    found = parser.parse_args(arguments)
    if found.seeds < 1:
        raise ValueError(f"--seeds must be >= 1, got {found.seeds}")
    if found.retries < 0:
        raise ValueError(f"--retries must be >= 0, got {found.retries}")
    home = _home()
    base = override(get_preset(found.preset), _settings(found.set))
    places = {name: str(_absolute(home, getattr(base.data, name))) for name in ("root", "cache")}
    base = override(base, {f"data.{name}": path for name, path in places.items()})
    if base.network.weights:
        base = override(base, {"network.weights": str(_absolute(home, base.network.weights))})
    first = base.train.seed
    plan = make_plan(base, get_tables(found.tables), range(first, first + found.seeds))
    uri = (
        found.tracking_uri or os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{home / 'runs/mlflow.db'}"
    )
    return Order(
        name=name,
        preset=found.preset,
        base=base,
        plan=plan,
        root=_absolute(home, found.out or f"runs/{name}-{found.preset}"),
        uri=resolve_uri(uri),
        experiment=found.experiment,
        request=Request(
            found.cpus_per_trial, found.gpus_per_trial, found.workers_per_trial, found.max_concurrent
        ),
        retries=found.retries,
        commit=found.commit,
        dry_run=found.dry_run,
    )


def _parser(name: str, description: str, tables: Sequence[str]) -> argparse.ArgumentParser:
    parser = _Parser(prog=f"sweeps/{name}.py", description=description, allow_abbrev=False)
    add = parser.add_argument
    add("--preset", default="shapes", help=f"settings of every arm: {', '.join(PRESETS)} (default: shapes)")
    add(
        "--tables",
        nargs="+",
        default=list(tables),
        metavar="TABLE",
        help=(
            f"tables to fill: names such as {', '.join(tables)}, all, or files such as my_table.py "
            f"(default: {' '.join(tables)})"
        ),
    )
    add("--seeds", type=int, default=1, help="seeds of every arm, counted up from train.seed (default: 1)")
    add(
        "--set",
        nargs="+",
        action="extend",
        default=[],
        metavar="NAME=VALUE",
        help="change settings of the preset, as in csc.weight=0.2; an arm's own changes win over them",
    )
    add("--out", default="", help=f"folder of the sweep (default: runs/{name}-PRESET)")
    add("--tracking-uri", default="", help="MLflow store (default: MLFLOW_TRACKING_URI or runs/mlflow.db)")
    add("--experiment", default="cosa", help="MLflow experiment (default: cosa)")
    add("--max-concurrent", type=int, help="most trials at a time (default: as many as fit)")
    add("--cpus-per-trial", type=float, default=1.0, help="CPUs and threads of a trial (default: 1)")
    add(
        "--gpus-per-trial",
        type=lambda text: None if text == "auto" else float(text),
        help="GPUs of a trial, 0.25 packs four on one (default: auto, the GPUs shared by --max-concurrent)",
    )
    add(
        "--workers-per-trial",
        type=int,
        default=1,
        help="data-parallel processes of a trial; 0 and 1 train in the trial's own (default: 1)",
    )
    add(
        "--retries",
        type=int,
        default=1,
        help="new starts of a failed trial, from its checkpoint (default: 1)",
    )
    add("--commit", default="", help="commit to record where the code comes without its history: a Ray job")
    add("--dry-run", action="store_true", help="show the plan, train nothing")
    add("--traceback", action="store_true", help="show where an error came from")
    return parser


def _settings(pairs: Sequence[str]) -> Mapping[str, str]:
    """`--set` pairs as changes for `override`."""
    changes = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not equals:
            raise ValueError(f"--set must be NAME=VALUE, got {pair!r}")
        changes[name.strip()] = value
    return changes


def _home() -> Path:
    """Where relative paths start: here, or ~/cosa where here is a Ray job's copy of the code."""
    here = Path.cwd()
    return Path.home() / "cosa" if _JOB_FOLDER in here.parts else here


def _absolute(home: Path, path: str) -> Path:
    return home / Path(path).expanduser()


def _finished(order: Order) -> dict[str, Mapping[str, Any]]:
    """Results of the trials that are finished, by name."""
    results = {trial.name: folders.read_result(order.root, trial) for trial in order.plan.trials}
    return {name: result for name, result in results.items() if result is not None}


def _show_plan(order: Order) -> None:
    say(draw_tree(order.plan, _finished(order)))
    asking = [table.name for table in order.plan.tables if any(m.startswith("train/") for m in table.metrics)]
    if asking and not order.base.evaluation.train_split:
        say(
            f"table {', '.join(asking)} shows CPL of training images: its cells stay empty without "
            f"--set evaluation.train_split={order.base.data.train_split}"
        )


def _run(order: Order, train: Train | None) -> int:
    """Run what remains, mend what a killed process left behind, report."""
    from sweeps import report, store  # mlflow and all that comes with it

    plan, root = order.plan, order.root
    _show_plan(order)
    say(f"outputs: {root}")
    _check_data(order)
    sweep = store.open_sweep(order.uri, order.experiment, root, order.base, plan, _tags(order))
    try:
        remaining = plan.remaining(_finished(order))
        failures = _train(order, sweep, remaining, train) if remaining else {}
        _mend(order, sweep, failures)
        results = sweep.results()
        files = report.write(results, root, report.ui_command(order.uri))
        sweep.close(report.headline(results), files, failed=bool(failures))
    except BaseException as error:
        interrupted = isinstance(error, KeyboardInterrupt)
        sweep.stop(root, plan.trials, "KILLED" if interrupted else "FAILED")
        raise
    say(report.terminal(results))
    say(f"report: {files[0]}")
    say(f"MLflow: {report.ui_command(order.uri)}")
    return _verdict(plan, failures)


def _check_data(order: Order) -> None:
    """Open the data before anything is started; `shapes` is written here, once, and not by every trial.

    Raises:
        ValueError: Data that cannot be trained on, or other data than the finished trials saw.
    """
    from cosa.data.dataset import open_dataset  # imports torch

    data = order.base.data
    seen = open_dataset(data, data.train_split).fingerprint()
    if data.val_split:
        open_dataset(data, data.val_split)
    if order.base.evaluation.train_split:
        open_dataset(data, order.base.evaluation.train_split, needs="masks")
    for name, result in _finished(order).items():
        before = result.get("data_fingerprint", seen)
        if before != seen:
            raise ValueError(
                f"data in {data.root!r} must be what the sweep began with, got fingerprint {seen} instead of "
                f"{before} ({order.plan.named(name).label}); bring it back, or choose another --out"
            )


def _tags(order: Order) -> dict[str, str]:
    return {
        "cosa.preset": order.preset,
        **({"mlflow.source.git.commit": order.commit} if order.commit else {}),
    }


def _train(order: Order, sweep: Sweep, remaining: Sequence[Trial], train: Train | None) -> Mapping[str, str]:
    """Train what remains; returns the reasons of what failed, by trial."""
    from sweeps.ray_session import connected

    with connected(order.request) as allotment:
        from sweeps.launch import launch

        slots = f"{allotment.slots} at a time, each with {allotment.cpus:g} CPU"
        say(
            f"{len(remaining)} trials to run, {slots}"
            + (f", {allotment.gpus:g} GPU" if allotment.gpus else "")
        )
        if order.request.concurrent and allotment.slots < order.request.concurrent:
            say(f"--max-concurrent {order.request.concurrent} does not fit: give each trial less than a CPU")
        outcome = launch(
            remaining,
            order.root,
            sweep.spec,
            allotment,
            workers=order.request.workers,
            retries=order.retries,
            done_before=len(order.plan.trials) - len(remaining),
            line=LiveLine(sys.stdout),
            train=train,
        )
    idle = 1 - outcome.busy_seconds / max(outcome.wall_seconds * allotment.slots, 1e-9)
    say(f"trained for {duration(outcome.wall_seconds)}, slots idle {idle:.0%} of it")
    return outcome.failures


def _mend(order: Order, sweep: Sweep, failures: Mapping[str, str]) -> None:
    """Bring MLflow to what the folders say."""
    seconds = 0.0
    for name, result in _finished(order).items():
        sweep.mend(order.root, order.plan.named(name), result)
        seconds += result.get("seconds", 0.0)
    sweep.fail(order.root, failures)
    sweep.tag("cosa.training_hours", f"{seconds / 3600:.3f}")


def _verdict(plan: Plan, failures: Mapping[str, str]) -> int:
    """The exit code, after a table of what failed."""
    if not failures:
        return 0
    complain(f"{len(failures)} of {len(plan.trials)} trials failed; the same command tries them again:")
    labels = {name: plan.named(name).label for name in failures}
    width = max(map(len, labels.values()))
    for name, reason in failures.items():
        complain(f"  {labels[name]:<{width}}  {reason}")
    return FAILED
