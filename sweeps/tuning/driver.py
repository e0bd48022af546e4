"""A search as a straight line: plan, search, confirmation, MLflow, report; the same command line goes on.

The paper's own rows come first, then TPE suggests. A trial is stopped at half of co-training where its
label-free mIoU is in the worst third of those that were there so far. In the end the best trials and the
preset are trained again with fresh seeds. Exit codes are those of all sweeps.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from cosa.cli.common import FAILED
from cosa.cli.console import print_error, print_line
from cosa.config import override
from cosa.config.presets import short_name
from cosa.storage.files import lock
from cosa.tracking import TrackingError, read_run_id, ui_steps
from sweeps.planning.cost import Speed, price
from sweeps.planning.folder import LOCK, Result, SweepState, read_state, trial_folder
from sweeps.planning.plan import Plan, Trial, shared_warmup, trial_of
from sweeps.running.driver import (
    check_data,
    look_at_data,
    measured,
    measuring,
    run_script,
    slots_for,
    with_earlier,
)
from sweeps.running.store import Sweep, open_sweep
from sweeps.runs import client_of, explained
from sweeps.tables.metrics import SEG_MIOU
from sweeps.tuning.arguments import SearchArgs, read_arguments

if TYPE_CHECKING:
    from sweeps.tuning.study import SearchStudy


def main(arguments: Sequence[str] | None = None) -> int:
    """The script, from its command line, by default the process's own, to its exit code."""
    given = sys.argv[1:] if arguments is None else arguments
    return run_script("search", lambda: run(read_arguments(given)))


def run(args: SearchArgs) -> int:
    """Show what `args` ask for and, unless that is all, search, confirm and report."""
    show_plan(args)
    if args.sweep.dry_run:
        show_costs(args)
        return 0
    from sweeps.tuning import report
    from sweeps.tuning.study import JOURNAL, open_study

    with lock(args.out / LOCK):
        study = open_study(args.out, args.space, args.base)
        study.describe(args.steps)
        print_line(f"outputs: {args.out}")
        print_line(f"the study as it grows: optuna-dashboard {args.out / JOURNAL}")
        data_tags = check_data(args.base, masks=True)
        study.enqueue(args.rows)
        if args.sweep.retry_failed:
            print_line(f"trying {study.repeat_failed()} failed trials again")
        with open_sweep(args.sweep, _plan(args, ())) as parent:
            parent.tag("cosa.kind", "search")
            confirmation, failures = _train(args, study, parent, data_tags)
            _sync(args, study, parent, confirmation, failures)
            findings = report.Findings(args, study, confirmation, failures, data_tags)
            files = report.write(findings)
            parent.close(report.markdown(findings)[:8000], files, failed=bool(findings.failures))
    print_line(report.text(findings))
    print_line(f"report: {files[0]}")
    print_line(f"MLflow: {ui_steps(args.sweep.uri)}")
    if findings.failures:
        print_error(f"{len(findings.failures)} failed; --retry-failed tries the search's again:")
    for label, why in findings.failures.items():
        print_error(f"  {label}  {why}")
    return FAILED if findings.failures else 0


def _plan(args: SearchArgs, trials: Iterable[Trial]) -> Plan:
    """Trials that fill no table's rows."""
    return Plan(args.base, (), (args.base.train.seed,), tuple(trials))


def _train(
    args: SearchArgs, study: SearchStudy, parent: Sweep, data_tags: Mapping[str, str]
) -> tuple[Plan, Mapping[str, str]]:
    """Search until the budget is spent, then confirm; without Ray where both are done already.

    Returns:
        The plan of the confirmation, and why those of its runs failed that did, by name.
    """
    from sweeps.tuning.confirm import best_of, plan_confirmation
    from sweeps.tuning.study import begun, origin

    def confirmation() -> SweepState:
        plan = plan_confirmation(study, best_of(study, args.confirm), args.base, args.seeds)
        return read_state(args.out, plan)

    known = {origin(trial) for trial in study.trials}
    earlier = _earlier(args, {name: row for name, row in args.rows.items() if name not in known}, data_tags)
    unfinished = args.sweep.retry_failed or any(not trial.state.is_finished() for trial in study.trials)
    searching = unfinished or args.budget().left(begun(study.trials))
    if not searching and not (state := confirmation()).remaining:
        return state.plan, {}
    with slots_for(args.sweep, [args.base]) as slots:
        if args.limits.gpu_hours is not None and not slots.gpus:
            raise ValueError(
                "--gpu-hours must have GPUs to count, got trials without; take --hours or --trials"
            )
        from sweeps.running.launch import launch
        from sweeps.running.trial import make_spec
        from sweeps.tuning.launch import StudySearcher, search

        budget = args.budget(slots.gpus * max(1, args.sweep.resources.workers))
        make = lambda trial: make_spec(trial, args.out, parent.spec(trial), data_tags)  # noqa: E731
        searcher = StudySearcher(args, study, budget, slots.count, make, earlier)
        if not searcher.exhausted:
            print_line(f"{slots.count} at a time, {budget} spent before")
            search(searcher, args, slots, parent.tell)
            budget.note(0)
        state = confirmation()
        if not (left := state.remaining):
            return state.plan, {}
        best = len(state.plan.tables[0].arms) - 1
        print_line(f"confirming the best {best} and the preset: {len(left)} runs")
        _, failures = launch(state, left, args.sweep, slots, parent.spec, data_tags, parent.tell)
        return state.plan, failures


def _sync(
    args: SearchArgs, study: SearchStudy, parent: Sweep, confirmation: Plan, failures: Mapping[str, str]
) -> None:
    """Bring MLflow to what study and folders say; each run says its number and what became of it."""
    from sweeps.tuning.study import origin, reason, state

    runs = {found.number: study.runs(found) for found in study.trials}
    trials = {trial.name: trial for own in (*runs.values(), confirmation.trials) for trial in own}
    own = {runs[t.number][-1].name: reason(t) for t in study.trials if state(t) == "failed"}
    parent.sync(read_state(args.out, _plan(args, trials.values())), {**own, **failures})
    with explained(parent.uri):
        for found in study.trials:
            tags = {"trial": str(found.number), "state": state(found), "origin": origin(found) or "TPE"}
            if state(found) == "pruned" and found.last_step is not None:
                tags["pruned_at"] = str(found.last_step)
            run_id = read_run_id(trial_folder(args.out, runs[found.number][-1].name))
            for key, value in tags.items() if run_id else ():
                client_of(parent.uri).set_tag(run_id, f"cosa.search.{key}", value)
    parent.tag("cosa.search.spent", str(args.budget()))


def _earlier(
    args: SearchArgs, rows: Mapping[str, Mapping[str, Any]], data_tags: Mapping[str, str]
) -> Mapping[str, Result]:
    """Results of those of the paper's `rows` that finished in earlier runs, by their trials' names."""
    from sweeps.tuning.study import objective

    configs = {row: override(args.base, args.space.changes(own)) for row, own in rows.items()}
    plan = _plan(args, (trial_of(config, config.train.seed, (row,)) for row, config in configs.items()))
    if not plan.trials:
        return {}
    state, refused = with_earlier(args.sweep, SweepState(plan, {}, {}), data_tags)
    with explained(args.sweep.uri):
        runs = {name: client_of(args.sweep.uri).get_run(run_id) for name, run_id in state.reused.items()}
    taken = {
        name: {"metrics": run.data.metrics}
        for name, run in runs.items()
        if objective(plan.named(name).config) in run.data.metrics
    }
    if taken:
        names = _names(trial.arms[0] for trial in plan.trials if trial.name in taken)
        print_line(f"taken from earlier runs: {names} (--fresh runs them again)")
    if refused:
        print_line(refused)
    return taken


def show_plan(args: SearchArgs) -> None:
    """Space, pruning steps, rows, and iterations at most."""
    train, every, own = args.base.train, args.base.evaluation.every, args.sweep.base.evaluation.every
    print_line(f"search around {short_name(args.sweep.preset)}: {args.limits}, by {SEG_MIOU}")
    width = max(map(len, args.space.texts()))
    for name, text in args.space.texts().items():
        print_line(f"  {name:<{width}}  {text}")
    steps = " and ".join(f"{step:,}" for step in args.steps)
    print_line(
        f"stopped at {steps} of {train.iterations:,} iterations: the worst third of those so far"
        if steps
        else "stopped nowhere: co-training is too short to be judged on its way"
    )
    if every != own:
        print_line(
            f"evaluation.every is {every} instead of {own}: trials are evaluated where they may be stopped"
        )
    print_line(f"first come {len(args.rows)} rows of the paper: {_names(args.rows)}")
    if args.outside:
        print_line(f"outside of the space: {_names(args.outside)}")
    cotraining = train.iterations - train.warmup
    if args.limits.trials:
        most = train.warmup + args.limits.trials * cotraining
        print_line(
            f"at most {most:,} iterations, of which {train.warmup:,} are the one warm-up of all trials"
        )
    if args.confirm:
        more = args.seeds * (train.warmup + (args.confirm + 1) * cotraining)
        print_line(
            f"then the best {args.confirm} and the preset with {args.seeds} fresh seeds: "
            f"{more:,} iterations beyond the budget"
        )


def _names(origins: Iterable[str]) -> str:
    return ", ".join(origin.rpartition("/")[2] for origin in origins)


def show_costs(args: SearchArgs) -> None:
    """What was begun before, what earlier runs spare, hours as far as finished runs tell, what is missing."""
    from sweeps.tuning.study import JOURNAL, peek

    states, speed = peek(args.out, args.space, args.base), None
    done, (data_tags, problem) = states.total(), look_at_data(args.base.data)
    if states:
        parts = ", ".join(f"{count} {state}" for state, count in states.items())
        print_line(f"begun before: {done} trials ({parts}), in {args.out / JOURNAL}")
    try:
        done = done or len(_earlier(args, args.rows, data_tags))
        speed = measured(args.sweep, args.base)
    except TrackingError as error:
        print_error(str(error))
    print_line("\n".join(costs(args, speed, done)) if speed else measuring(args.sweep))
    if problem:
        print_error(problem)


def costs(args: SearchArgs, speed: Speed, done: int) -> list[str]:
    """Hours at most, since nobody knows which trials will be stopped; `done` trials need not be run."""
    base, left = args.base, max(0, (args.limits.trials or 0) - done)
    warmup = [shared_warmup(base, base, (), ())] if base.train.warmup else []
    trial = trial_of(base, base.train.seed, (), *warmup)
    parts = {"the search, if no trial is stopped": [*warmup, *[trial] * left] if left else []}
    if args.limits.trials is None:
        parts = {"a trial that is not stopped": [trial]}
    if args.confirm:
        parts["the confirmation"] = [*warmup, *[trial] * (args.confirm + 1)] * args.seeds
    lines = [f"{name}: {price(trials, speed, args.sweep.resources)}" for name, trials in parts.items()]
    return [*lines, speed.basis]
