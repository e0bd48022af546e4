"""Free search with Optuna on Ray Tune, beyond the paper's grid: the same command line again goes on.

python sweeps/search.py --preset shapes --trials 30
python sweeps/search.py --preset voc --gpu-hours 200 --set data.root=DIR/VOCdevkit/VOC2012

Around the preset it varies what `sweeps/tuning/space.py` lists. The paper's own rows come first, then TPE
suggests. A trial is stopped at a rung of co-training where its label-free mIoU is in the worst third of those
that were there so far. In the end the best trials and the preset are trained again with fresh seeds.
"""

from __future__ import annotations

import argparse
import shlex
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from cosa.cli.console import LiveLine, print_error, print_line
from cosa.config import Config, override
from cosa.tracking import TrackingError
from sweeps.planning import folder as folders
from sweeps.running.arguments import Order, read_order
from sweeps.running.driver import FAILED, INTERRUPTED, MISTAKE
from sweeps.tables import Table
from sweeps.tables.metrics import SEG_MIOU
from sweeps.tuning.budget import DEFAULT_TRIALS, Budget, Ledger, Spent, read_spent
from sweeps.tuning.confirm import Outcome, best_of, plan_confirmation
from sweeps.tuning.preview import first_rows, first_trials, show_costs, show_plan
from sweeps.tuning.rungs import Rungs, choose_rungs
from sweeps.tuning.space import SPACE, Space, read_space

if TYPE_CHECKING:
    from sweeps.planning.plan import Plan, Trial
    from sweeps.running.trial import Train
    from sweeps.tuning.record import Record
    from sweeps.tuning.study import SearchStudy
    from sweeps.tuning.track import SearchTrack

ROWS = ("3b", "5a", "5b", "5c", "5d")
"""Tables whose rows are tried first, as far as they lie in the space."""
SPENT = "spent.json"
"""In the search's folder: what the search has cost."""


@dataclass(frozen=True)
class Request:
    """What the command line asks for."""

    order: Order
    """What it shares with other sweeps."""
    base: Config
    """What every trial starts from: the preset, evaluated at every rung."""
    space: Space
    """Resolved for the base."""
    rungs: Rungs
    budget: Budget
    rows: Mapping[str, Config]
    """The paper's rows by origin, the preset first."""
    confirm: int
    """Best trials that are trained again."""
    seeds: int
    """Fresh seeds of each."""


class _Parser(argparse.ArgumentParser):
    """Reports a bad command line in one line."""

    def error(self, message: str) -> NoReturn:
        """Called by argparse."""
        raise ValueError(f"{message}; see {self.prog} --help")


def main(arguments: Sequence[str] | None = None, train: Train | None = None) -> int:
    """The script, from its command line to its exit code.

    Args:
        arguments: The command line; by default the process's own.
        train: Stands for `cosa.training.trainer.train` in a test.
    """
    try:
        request = read_request(sys.argv[1:] if arguments is None else arguments)
        show_plan(request)
        if request.order.dry_run:
            show_costs(request)
            return 0
        with folders.locked(request.order.root):
            return _run(request, train)
    except (ValueError, TypeError, OSError, TrackingError) as error:
        if "--traceback" in sys.argv:
            raise
        print_error(f"search: {' '.join(str(error).split())}")
        return MISTAKE
    except KeyboardInterrupt:
        print_error(f"interrupted; this goes on from here:\n  {shlex.join(['python', *sys.argv])}")
        return INTERRUPTED


def read_request(arguments: Sequence[str]) -> Request:
    """What `arguments` ask for.

    Raises:
        ValueError, TypeError: A flag or setting against its law, or a space that does not fit the preset.
    """
    parser = _parser()
    if {"-h", "--help"} & set(arguments):
        print_line(parser.format_help() + "\nand what all sweeps take:\n")
    found, rest = parser.parse_known_args(arguments)
    order = read_order(
        "search", "Shared by all sweeps; --tables names rows that are tried first.", ROWS, rest
    )
    if len(order.plan.seeds) != 1:
        raise ValueError(
            f"--seeds must be 1 in a search, got {len(order.plan.seeds)}; "
            f"--confirm-seeds are those of the best trials"
        )
    for flag, value in (("--confirm", found.confirm), ("--confirm-seeds", found.confirm_seeds)):
        if value < 0:
            raise ValueError(f"{flag} must be >= 0, got {value}")
    given = (found.trials, found.hours, found.gpu_hours)
    budget = Budget(*given) if any(v is not None for v in given) else Budget(trials=DEFAULT_TRIALS)
    if not order.base.data.val_split:
        raise ValueError("data.val_split must name a split with masks to search by, got none")
    rungs = choose_rungs(order.base.train, order.base.evaluation.every)
    base = override(order.base, {"evaluation.every": rungs.every})
    space = (read_space(Path(found.space)) if found.space else SPACE).resolved(base)
    rows = paper_rows(order.plan.tables, base)
    seeds = found.confirm_seeds
    return Request(order, base, space, rungs, budget, rows, found.confirm if seeds else 0, seeds)


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="sweeps/search.py",
        description="Search the settings of co-training with Optuna's TPE on Ray Tune.",
        add_help=False,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--trials", type=int, help=f"begin so many trials (default: {DEFAULT_TRIALS}, without other limits)")
    add("--hours", type=float, help="begin trials for so many hours, those of earlier starts counted")
    add("--gpu-hours", type=float, help="begin trials until so many GPU-hours are used, warm-ups counted")
    add("--space", default="", metavar="FILE", help="Python file whose SPACE is searched instead of ours")
    add("--confirm", type=int, default=3, help="best trials to train again with fresh seeds (default: 3)")
    add("--confirm-seeds", type=int, default=3, help="fresh seeds of each, and of the preset (default: 3)")
    return parser


def paper_rows(tables: Sequence[Table], base: Config) -> dict[str, Config]:
    """The preset and the paper's rows by origin: first the preset, then of each table those nearest to it."""
    nearest: list[tuple[int, int, str, Config]] = []
    for place, table in enumerate(tables):
        names = [arm.name for arm in table.arms]
        middle = names.index(table.reference)
        nearest += [
            (
                abs(names.index(arm.name) - middle),
                place,
                f"{table.name}/{arm.name}",
                override(base, arm.changes),
            )
            for arm in table.arms
            if arm.name != table.reference
        ]
    rows = {origin: config for *_, origin, config in sorted(nearest, key=lambda row: row[:3])}
    return {"full": base, **rows}


def _run(request: Request, train: Train | None) -> int:
    """Search, confirm, mend what a killed process left behind, report."""
    from sweeps.reporting import render as report
    from sweeps.tuning import report as search_report
    from sweeps.tuning.study import open_study
    from sweeps.tuning.track import SearchTrack

    order, root = request.order, request.order.root
    study = open_study(root, request.space, request.base, request.base.train.seed)
    study.describe(SEG_MIOU, request.rungs.steps)
    print_line(f"outputs: {root}")
    print_line(f"the study as it grows: optuna-dashboard {root / 'study.journal'}")
    data_tags = _check_data(request)
    study.enqueue(first_rows(request)[0])
    if order.retry_failed:
        print_line(f"trying {study.repeat_failed()} failed trials again")
    track = SearchTrack.open(order, request.base, study, request.space.momenta)
    try:
        earlier = _earlier(request, study, data_tags)
        outcome = _train(request, study, track, earlier, data_tags, train)
        track.mend(outcome)
        findings = search_report.find(request, study, outcome, data_tags)
        files = search_report.write(findings, root)
        track.close(findings, files)
    except BaseException as error:
        track.stop("KILLED" if isinstance(error, KeyboardInterrupt) else "FAILED")
        raise
    print_line(search_report.text(findings))
    print_line(f"report: {root / 'search.html'}")
    print_line(f"MLflow: {report.ui_command(order.uri)}")
    if findings.failures:
        print_error(f"{len(findings.failures)} failed; --retry-failed tries the search's again:")
    for label, reason in findings.failures.items():
        print_error(f"  {label}  {reason}")
    return FAILED if findings.failures else 0


def _check_data(request: Request) -> Mapping[str, str]:
    """Open the data before anything is started; `shapes` is written here, once. Returns its fingerprints."""
    from cosa.data.open import (
        fingerprints,  # imports torch
        open_dataset,
    )

    data = request.base.data
    training = open_dataset(data, data.train_split)
    found = fingerprints(training, open_dataset(data, data.val_split, needs="masks"))
    if request.base.evaluation.train_split:
        open_dataset(data, request.base.evaluation.train_split, needs="masks")
    return found


def _earlier(request: Request, study: SearchStudy, data_tags: Mapping[str, str]) -> Mapping[str, float]:
    """The metric of the paper's rows that finished in earlier runs, by the trials' names."""
    from sweeps.tuning.track import find_earlier

    begun = {record.origin for record in study.records()}
    rows = [trial for origin, trial in first_trials(request).items() if origin not in begun]
    reused = find_earlier(request.order, [] if request.order.fresh else rows, data_tags)
    if reused.values:
        print_line(
            f"{len(reused.values)} of the paper's rows are taken from earlier runs (--fresh runs them again)"
        )
    if reused.refused:
        print_line(reused.refused)
    return reused.values


def _train(
    request: Request,
    study: SearchStudy,
    track: SearchTrack,
    earlier: Mapping[str, float],
    data_tags: Mapping[str, str],
    train: Train | None,
) -> Outcome:
    """Search until the budget is spent, then confirm; without Ray where both are done already."""
    done = _done(request, study)
    if done:
        return done
    from cosa.distributed.session import connected

    order = request.order
    with connected(order.request) as allotment:
        if request.budget.gpu_hours is not None and not allotment.gpus:
            raise ValueError(
                "--gpu-hours must have GPUs to count, got trials without; take --hours or --trials"
            )
        from sweeps.running.launch import launch
        from sweeps.tuning.flow import Flow
        from sweeps.tuning.launch import seek

        gpus = allotment.gpus * max(1, order.request.workers)
        ledger = Ledger(order.root / SPENT, gpus, time.monotonic)
        flow = Flow(
            study,
            request.base,
            order.root,
            rungs=request.rungs.steps,
            momenta=request.space.momenta,
            budget=request.budget,
            ledger=ledger,
            slots=allotment.slots,
            earlier=earlier,
            waiting_only=order.retry_failed,
        )
        line = LiveLine()
        if not flow.exhausted:
            print_line(f"{allotment.slots} at a time, {ledger.text()} spent before")
            seek(
                flow,
                order.root,
                track.spec,
                allotment,
                rungs=request.rungs.steps,
                workers=order.request.workers,
                data_tags=data_tags,
                retries=order.retries,
                budget=request.budget.text(),
                line=line,
                train=train,
            )
            ledger.note(0)
        best, plan, remaining = _confirmation(request, study)
        failures: Mapping[str, str] = {}
        if plan and remaining:
            print_line(f"confirming the best {len(best)} and the preset: {len(remaining)} runs")
            failures = launch(
                remaining,
                order.root,
                track.spec,
                allotment,
                workers=order.request.workers,
                data_tags=data_tags,
                retries=order.retries,
                done_before=len(plan.trials) - len(remaining),
                line=line,
                train=train,
            ).failures
        return Outcome(best, plan, dict(failures), ledger.text())


def _done(request: Request, study: SearchStudy) -> Outcome | None:
    """What was run, where nothing is left to run."""
    path = request.order.root / SPENT
    records, (seconds, gpu_seconds) = study.records(), read_spent(path)
    begun = sum(record.repeats is None for record in records)
    unfinished = any(record.state == "running" for record in records) or request.order.retry_failed
    if unfinished or request.budget.left(Spent(begun, seconds, gpu_seconds)):
        return None
    best, plan, remaining = _confirmation(request, study)
    if remaining:
        return None
    return Outcome(best, plan, {}, Ledger(path, gpu_seconds and 1.0, time.monotonic).text())


def _confirmation(
    request: Request, study: SearchStudy
) -> tuple[tuple[Record, ...], Plan | None, Sequence[Trial]]:
    """The best trials, their confirmation, and what of it is still to run."""
    best = tuple(best_of(study.records(), request.confirm))
    if not best:
        return (), None, ()
    plan = plan_confirmation(best, request.base, request.seeds)
    finished = [t.name for t in plan.trials if folders.read_result(request.order.root, t)]
    return best, plan, plan.remaining(finished)
