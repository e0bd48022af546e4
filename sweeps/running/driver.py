"""What the sweep scripts share: from the command line to the report, resumable at every point.

Every start makes the same plan from the same arguments and runs what neither the trials' folders nor, of
earlier sweeps, MLflow says is finished. Exit codes: 0 all that was asked for is finished, 1 a trial failed,
2 the user's mistake, 130 interrupted.
"""

from __future__ import annotations

import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cosa.cli.console import LiveLine, print_error, print_line
from cosa.config import difference, override
from cosa.config.presets import get_preset, short_name
from cosa.tracking import TrackingError, mask
from cosa.tracking.provenance import source_tags
from sweeps.planning import cost, kept_plan
from sweeps.planning import folder as folders
from sweeps.planning import plan as planning
from sweeps.planning.plan import Plan, Trial, draw_tree
from sweeps.planning.reuse import COMMIT_TAG, Reuse, find_reusable, still_there
from sweeps.running.arguments import Order, read_order
from sweeps.running.progress import best_of
from sweeps.runs import explained, find_experiment

if TYPE_CHECKING:
    from mlflow import MlflowClient

    from sweeps.running.store import Sweep
    from sweeps.running.trial import Train

__all__ = ["FAILED", "INTERRUPTED", "MISTAKE", "Order", "main", "read_order"]

FAILED, MISTAKE, INTERRUPTED = 1, 2, 130


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
        train: Stands for `cosa.training.trainer.train` in a test.
    """
    try:
        order = read_order(name, description, tables, sys.argv[1:] if arguments is None else arguments)
        kept_plan.check(order.root, order.plan)
        if order.dry_run:
            _preview(order)
            return 0
        with folders.locked(order.root):
            return _run(order, train)
    except (ValueError, TypeError, OSError, TrackingError) as error:
        if "--traceback" in sys.argv:
            raise
        print_error(f"{name}: {' '.join(str(error).split())}")
        return MISTAKE
    except KeyboardInterrupt:
        print_error(f"interrupted; this goes on from here:\n  {shlex.join(['python', *sys.argv])}")
        return INTERRUPTED


def _finished(order: Order) -> dict[str, Mapping[str, Any]]:
    """Results of the trials that are finished, by name."""
    results = {trial.name: folders.read_result(order.root, trial) for trial in order.plan.trials}
    return {name: result for name, result in results.items() if result is not None}


def _preview(order: Order) -> None:
    """Show the plan and what it will cost; nothing is made, neither data nor a store."""
    earlier, store_found = Reuse({}), None
    try:
        if may_answer(order.uri):
            store_found = find_experiment(order.uri, order.experiment)
            earlier = _earlier(order, data_tags_if_there(order))
    except TrackingError as error:
        print_error(str(error))
    _show_plan(order, earlier)
    _show_cost(order, order.plan.remaining({*_finished(order), *earlier.runs}), store_found)


def may_answer(uri: str) -> bool:
    """Whether a store can be there: a file that is not need not be asked, nor MLflow be imported for it."""
    return not uri.startswith("sqlite") or Path(uri.partition(":///")[2]).is_file()


def data_tags_if_there(order: Order) -> Mapping[str, str]:
    """The data's fingerprints by tag; none where there are no data yet: `shapes` is written by the sweep."""
    data = order.base.data
    if not Path(data.root).exists():
        return {}
    from cosa.data.open import read_fingerprints  # imports torch

    return read_fingerprints(data)


def _earlier(order: Order, data_tags: Mapping[str, str]) -> Reuse:
    """The earlier runs that this sweep takes: those it took before, and others that will do."""
    found = None if order.fresh else find_experiment(order.uri, order.experiment)
    if found is None:
        return Reuse({})
    client, experiment_id = found
    code = {COMMIT_TAG: order.commit} if order.commit else source_tags()
    with explained(order.uri):
        taken = still_there(client, order.plan.trials, kept_plan.reused(order.root))
        missing = [t for t in order.plan.remaining({*_finished(order), *taken}) if t.kind == "trial"]
        new = find_reusable(client, experiment_id, missing, code, data_tags)
    return Reuse({**taken, **new.runs}, new.refused)


def _show_plan(order: Order, earlier: Reuse) -> None:
    print_line(draw_tree(order.plan, _finished(order), earlier.runs))
    if earlier.refused:
        print_line(earlier.refused)
    asking = [table.name for table in order.plan.tables if any(m.startswith("train/") for m in table.metrics)]
    if asking and not order.base.evaluation.train_split:
        print_line(
            f"table {', '.join(asking)} shows CPL of training images: its cells stay empty without "
            f"--set evaluation.train_split={order.base.data.train_split}"
        )


def _show_cost(order: Order, trials: Sequence[Trial], found: tuple[MlflowClient, str] | None) -> None:
    """What `trials` will take at the speed of finished runs, or how to measure one."""
    if not trials:
        return
    speed = None
    if found is not None:
        with explained(order.uri):
            speed = cost.measured(*found, order.base)
    if speed is None:
        print_line(
            f"hours: not known, no finished run of this network, crop and batch is in {mask(order.uri)}; "
            f"one measures them, a short one will do:\n  {measuring(order)}"
        )
        return
    print_line(cost.told(trials, speed, order.request))


def _run(order: Order, train: Train | None) -> int:
    """Run what remains, mend what a killed process left behind, report."""
    from sweeps.reporting import render as report
    from sweeps.running import store  # mlflow and all that comes with it

    plan, root = order.plan, order.root
    data_tags = _check_data(order)
    earlier = _earlier(order, data_tags)
    _show_plan(order, earlier)
    print_line(f"outputs: {root}")
    sweep = store.open_sweep(order.uri, order.experiment, root, order.base, plan, _tags(order), earlier.runs)
    kept_plan.keep(root, planning.to_json(plan, earlier.runs))
    try:
        remaining = _remaining(order, sweep, earlier)
        failures = _train(order, sweep, remaining, data_tags, train) if remaining else {}
        _mend(order, sweep, failures)
        results = sweep.results()
        files = report.write(results, root, order.uri)
        sweep.close(report.headline(results), files, failed=bool(failures))
    except BaseException as error:
        interrupted = isinstance(error, KeyboardInterrupt)
        sweep.stop(root, plan.trials, "KILLED" if interrupted else "FAILED")
        raise
    print_line(report.terminal(results))
    print_line(f"report: {files[0]}")
    print_line(f"MLflow: {report.ui_command(order.uri)}")
    return _verdict(plan, failures)


def measuring(order: Order) -> str:
    """The command of a short run like the sweep's own."""
    short = override(
        order.base, {"train.iterations": 40, "train.warmup": 20, "train.log_every": 10, "optim.lr_warmup": 0}
    )
    changes = [
        part
        for name, _, value in difference(get_preset(order.preset), short)
        for part in (f"--{name}", ",".join(map(str, value)) if isinstance(value, tuple) else str(value))
    ]
    return shlex.join(["cosa-train", order.preset, *changes, "--tracking-uri", mask(order.uri)])


def _remaining(order: Order, sweep: Sweep, earlier: Reuse) -> list[Trial]:
    """Trials to run now: all that are not finished, or of them those that failed."""
    plan, done = order.plan, {*_finished(order), *earlier.runs}
    if not order.retry_failed:
        return plan.remaining(done)
    failed = {t.name for t in plan.trials if folders.read_failure(folders.trial_folder(order.root, t.name))}
    failed |= sweep.failures().keys()
    others = {trial.name for trial in plan.trials if trial.kind == "trial"} - failed
    remaining = plan.remaining({*done, *others})
    waiting = sum(trial.kind == "trial" for trial in plan.remaining(done)) - sum(
        trial.kind == "trial" for trial in remaining
    )
    if not remaining:
        print_line("nothing has failed")
    if waiting:
        print_line(
            f"not run yet and left alone: {waiting}; the same command without --retry-failed runs them"
        )
    return remaining


def _check_data(order: Order) -> Mapping[str, str]:
    """Open the data before anything is started; `shapes` is written here, once, and not by every trial.

    Returns:
        Its fingerprints by tag.

    Raises:
        ValueError: Data that cannot be trained on, or other data than the finished trials saw.
    """
    from cosa.data.open import TRAINING_TAG, VALIDATION_TAG, fingerprints, open_dataset  # imports torch

    data = order.base.data
    training = open_dataset(data, data.train_split)
    seen = fingerprints(training, open_dataset(data, data.val_split) if data.val_split else None)
    if order.base.evaluation.train_split:
        open_dataset(data, order.base.evaluation.train_split, needs="masks")
    for name, result in _finished(order).items():
        for key, tag in (("data_fingerprint", TRAINING_TAG), ("val_fingerprint", VALIDATION_TAG)):
            before = result.get(key, seen[tag])
            if before != seen[tag]:
                raise ValueError(
                    f"data in {data.root!r} must be what the sweep began with, got fingerprint {seen[tag]} "
                    f"instead of {before} ({order.plan.named(name).label}); bring it back, or choose another "
                    "--out"
                )
    return seen


def _tags(order: Order) -> dict[str, str]:
    return {
        "cosa.preset": short_name(order.preset),
        **({"mlflow.source.git.commit": order.commit} if order.commit else {}),
    }


def _train(
    order: Order,
    sweep: Sweep,
    remaining: Sequence[Trial],
    data_tags: Mapping[str, str],
    train: Train | None,
) -> Mapping[str, str]:
    """Train what remains; returns the reasons of what failed, by trial."""
    from cosa.distributed.session import connected

    with connected(order.request) as allotment:
        from sweeps.running.launch import launch

        slots = f"{allotment.slots} at a time, each with {allotment.cpus:g} CPU"
        print_line(
            f"{len(remaining)} trials to run, {slots}"
            + (f", {allotment.gpus:g} GPU" if allotment.gpus else "")
        )
        if order.request.concurrent and allotment.slots < order.request.concurrent:
            print_line(
                f"--max-concurrent {order.request.concurrent} does not fit: give each trial less than a CPU"
            )
        outcome = launch(
            remaining,
            order.root,
            sweep.spec,
            allotment,
            workers=order.request.workers,
            data_tags=data_tags,
            retries=order.retries,
            done_before=len(order.plan.trials) - len(remaining),
            line=LiveLine(),
            best=best_of(order.plan.trials, _finished(order)),
            train=train,
        )
    print_line(f"trained for {outcome.times}")
    return outcome.failures


def _mend(order: Order, sweep: Sweep, failures: Mapping[str, str]) -> None:
    """Bring MLflow to what the folders say."""
    sweep.collect(order.root)
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
    print_error(
        f"{len(failures)} of {len(plan.trials)} trials failed; the same command tries them again, "
        "with --retry-failed them alone:"
    )
    labels = {name: plan.named(name).label for name in failures}
    width = max(map(len, labels.values()))
    for name, reason in failures.items():
        print_error(f"  {labels[name]:<{width}}  {reason}")
    return FAILED
