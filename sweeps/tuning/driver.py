"""A search from its command line to its exit code: plan, search, confirmation, report.

The same command line again goes on where the last one ended, however it ended. The paper's own rows come
first, then TPE suggests. A trial is stopped at half of co-training where its label-free mIoU is in the worst
third of those that were there so far. In the end the best trials and the preset are trained again with fresh
seeds. Exit codes are those of all sweeps.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from cosa.cli.common import FAILED
from cosa.cli.console import print_error, print_line
from cosa.config import Config, override
from cosa.config.presets import short_name
from cosa.storage.files import lock
from cosa.tracking import TrackingError, read_run_id
from cosa.tracking.provenance import source_tags
from sweeps.planning import cost
from sweeps.planning import folder as folders
from sweeps.planning.plan import Plan, Trial
from sweeps.planning.reuse import COMMIT_TAG, Reuse, find_reusable
from sweeps.running.driver import check_data, run_script
from sweeps.running.preview import look_at_data, measured, measuring
from sweeps.running.store import Sweep, open_sweep
from sweeps.runs import client_of, explained, find_experiment
from sweeps.tables.metrics import SEG_MIOU
from sweeps.tuning.arguments import SearchArgs, read_arguments
from sweeps.tuning.space import rows_inside

if TYPE_CHECKING:
    from optuna.trial import FrozenTrial

    from sweeps.planning.folder import SweepState
    from sweeps.tuning.confirm import ConfirmResult
    from sweeps.tuning.study import SearchStudy

KIND = "search"
"""Under `cosa.kind` on the parent run."""


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
    with lock(args.root / folders.LOCK):
        return _run(args)


def _run(args: SearchArgs) -> int:
    """Search, confirm, mend what a killed process left behind, report."""
    from sweeps.reporting import render
    from sweeps.tuning import report
    from sweeps.tuning.study import JOURNAL, open_study

    study = open_study(args.root, args.space, args.base)
    study.describe(SEG_MIOU, args.steps)
    print_line(f"outputs: {args.root}")
    print_line(f"the study as it grows: optuna-dashboard {args.root / JOURNAL}")
    data_tags = check_data(args.base, masks=True)
    study.enqueue(first_rows(args)[0])
    if args.sweep.retry_failed:
        print_line(f"trying {study.repeat_failed()} failed trials again")
    with _open_run(args) as parent:
        result = _train(args, study, parent, data_tags)
        _mend(args, study, parent, result)
        findings = report.find(args, study, result, data_tags)
        files = report.write(findings)
        parent.close(report.markdown(findings)[:8000], files, failed=bool(findings.failures))
    print_line(report.text(findings))
    print_line(f"report: {args.root / report.PAGE}")
    print_line(f"MLflow: {render.ui_command(args.sweep.uri)}")
    if findings.failures:
        print_error(f"{len(findings.failures)} failed; --retry-failed tries the search's again:")
    for label, why in findings.failures.items():
        print_error(f"  {label}  {why}")
    return FAILED if findings.failures else 0


def _train(
    args: SearchArgs, study: SearchStudy, parent: Sweep, data_tags: Mapping[str, str]
) -> ConfirmResult:
    """Search until the budget is spent, then confirm; without Ray where both are done already."""
    from sweeps.tuning.confirm import ConfirmResult
    from sweeps.tuning.study import begun, origin

    rows = set(first_rows(args)[0]) - {origin(trial) for trial in study.trials}
    earlier = {} if args.sweep.fresh else _earlier(args, rows, data_tags)
    unfinished = args.sweep.retry_failed or any(not trial.state.is_finished() for trial in study.trials)
    if not unfinished and not args.budget().left(begun(study.trials)):
        result, state = _confirmation(args, study)
        if state is None or not state.remaining:
            return result
    from cosa.distributed.session import connected

    with connected(args.sweep.resources) as slots:
        if args.limits.gpu_hours is not None and not slots.gpus:
            raise ValueError(
                "--gpu-hours must have GPUs to count, got trials without; take --hours or --trials"
            )
        from sweeps.running.launch import launch
        from sweeps.tuning.launch import SearchLoop, search

        budget = args.budget(slots.gpus * max(1, args.sweep.resources.workers))
        loop = SearchLoop(args, study, budget, slots.slots, earlier)
        if not loop.exhausted:
            print_line(f"{slots.slots} at a time, {budget} spent before")
            search(loop, args, parent.spec, slots, data_tags)
            budget.note(0)
        result, state = _confirmation(args, study)
        if state is None or not (trials := state.remaining):
            return result
        print_line(f"confirming the best {len(result.best)} and the preset: {len(trials)} runs")
        done = launch(state, trials, args.sweep, slots, parent.spec, data_tags)
    return ConfirmResult(result.best, result.plan, done.failures)


def _confirmation(args: SearchArgs, study: SearchStudy) -> tuple[ConfirmResult, SweepState | None]:
    """The confirmation of the best trials, and how far it is."""
    from sweeps.tuning.confirm import ConfirmResult, best_of, plan_confirmation

    best = best_of(study, args.confirm)
    if not best:
        return ConfirmResult(), None
    plan = plan_confirmation(study, best, args.base, args.seeds)
    return ConfirmResult(best, plan), folders.read_state(args.root, plan)


# The rows that come first, and what earlier runs spare of them.


def first_rows(args: SearchArgs) -> tuple[dict[str, Mapping[str, Any]], list[str]]:
    """Rows to try first, as parameters by origin, and the names of those outside the space.

    Half of the trials at most, so that there is a search beyond them; a row of all components is the preset.
    """
    most = max(1, (args.limits.trials or len(args.rows) * 2) // 2)
    return rows_inside(args.rows, args.space, args.base, most)


def _earlier(args: SearchArgs, rows: set[str], data_tags: Mapping[str, str]) -> Mapping[str, float]:
    """The metric of those of the paper's `rows` that finished in earlier runs, by their trials' names."""
    from sweeps.tuning.study import alone

    inside = {name: own for name, own in first_rows(args)[0].items() if name in rows}
    trials = [alone(override(args.base, args.space.changes(own)), row) for row, own in inside.items()]
    found = find_experiment(args.sweep.uri, args.sweep.experiment) if trials else None
    if found is None:
        return {}
    code = {COMMIT_TAG: args.sweep.commit} if args.sweep.commit else source_tags()
    with explained(args.sweep.uri):
        reuse: Reuse = find_reusable(*found, trials, code, data_tags)
        metrics = {name: found[0].get_run(run_id).data.metrics for name, run_id in reuse.runs.items()}
    taken = {name: own[SEG_MIOU] for name, own in metrics.items() if SEG_MIOU in own}
    if taken:
        names = _names([trial.arms[0] for trial in trials if trial.name in taken])
        print_line(f"taken from earlier runs: {names} (--fresh runs them again)")
    if reuse.refused:
        print_line(reuse.refused)
    return taken


# The search in MLflow: its parent run, a run nested in it for each trial, what became of each as tags.


def _open_run(args: SearchArgs) -> Sweep:
    """Make the parent run, or open it again.

    Raises:
        TrackingError: The store does not answer or refuses the run.
        ValueError: The search was tracked elsewhere before.
    """
    nothing = Plan(args.base, (), (args.base.train.seed,), (), 0, 0)
    parent = open_sweep(args.sweep, nothing)
    parent.tag("cosa.kind", KIND)
    return parent


def _mend(args: SearchArgs, study: SearchStudy, parent: Sweep, result: ConfirmResult) -> None:
    """Bring the runs to what study and folders say; each says its number and what became of it."""
    from sweeps.tuning.study import reason, state

    parent.collect(args.root)
    client = client_of(parent.uri)
    failures = dict(result.failures or {})
    for found in study.trials:
        trial = study.runs(found)[-1]
        content = folders.read_result(args.root, trial)
        if state(found) == "complete" and content is not None:
            parent.mend(args.root, trial, content)
        if state(found) == "failed":
            failures[trial.name] = reason(found)
        run_id = read_run_id(folders.trial_folder(args.root, trial.name))
        for key, value in _tags(found).items() if run_id else ():
            client.set_tag(run_id, key, value)
    for trial in result.plan.trials if result.plan else ():
        content = folders.read_result(args.root, trial)
        if content is not None:
            parent.mend(args.root, trial, content)
    parent.fail(args.root, failures)
    parent.tag("cosa.search.spent", str(args.budget()))


def _tags(found: FrozenTrial) -> dict[str, str]:
    from sweeps.tuning.study import origin, state

    tags = {
        "cosa.search.trial": str(found.number),
        "cosa.search.state": state(found),
        "cosa.search.origin": origin(found) or "TPE",
    }
    if state(found) == "pruned" and found.last_step is not None:
        tags["cosa.search.pruned_at"] = str(found.last_step)
    return tags


# What a search would do and what that costs; changes nothing.


def show_plan(args: SearchArgs) -> None:
    """Space, pruning steps, rows, and iterations at most."""
    train, every = args.base.train, args.base.evaluation.every
    print_line(f"search around {short_name(args.sweep.preset)}: {args.limits}, by {SEG_MIOU}")
    width = max(map(len, args.space.texts()))
    for name, text in args.space.texts().items():
        print_line(f"  {name:<{width}}  {text}")
    if args.steps:
        steps = " and ".join(f"{step:,}" for step in args.steps)
        print_line(f"stopped at {steps} of {train.iterations:,} iterations: the worst third of those so far")
    else:
        print_line("stopped nowhere: co-training is too short to be judged on its way")
    if every != args.sweep.base.evaluation.every:
        print_line(
            f"evaluation.every is {every} instead of {args.sweep.base.evaluation.every}: trials are "
            f"evaluated where they may be stopped"
        )
    inside, outside = first_rows(args)
    print_line(f"first come {len(inside)} rows of the paper: {_names(inside)}")
    if outside:
        print_line(f"outside of the space: {_names(outside)}")
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


def _names(origins: Mapping[str, Any] | Sequence[str]) -> str:
    return ", ".join(origin.rpartition("/")[2] for origin in origins)


def show_costs(args: SearchArgs) -> None:
    """What was begun before, what earlier runs spare, and hours, as far as finished runs tell them."""
    done, speed = _show_begun(args), None
    data_tags, problem = look_at_data(args.base.data)
    try:
        if not done and args.sweep.fresh:
            print_line("nothing is taken from earlier runs: --fresh")
        elif not done:
            taken = _earlier(args, set(first_rows(args)[0]), data_tags)
            done = len(taken)
            if not taken:
                print_line("taken from earlier runs: no row")
        speed = measured(args.sweep, args.base)
    except TrackingError as error:
        print_error(str(error))
    for line in costs(args, speed, done) if speed else [measuring(args.sweep)]:
        print_line(line)
    if problem:
        print_error(problem)


def _show_begun(args: SearchArgs) -> int:
    """Trials that the study in the search's folder has begun."""
    from sweeps.tuning.study import JOURNAL, peek

    states = peek(args.root, args.space, args.base)
    if states:
        parts = ", ".join(f"{count} {state}" for state, count in states.items())
        print_line(f"begun before: {states.total()} trials ({parts}), in {args.root / JOURNAL}")
    return states.total()


def costs(args: SearchArgs, speed: cost.Speed, done: int) -> list[str]:
    """Hours at most, since nobody knows which trials will be stopped; `done` trials need not be run."""
    resources, whole, lines = args.sweep.resources, args.limits.trials, []
    if whole is None:
        one = cost.price(_trials(args.base, 1)[-1:], speed, resources)
        lines.append(f"a trial that is not stopped: {one}")
    else:
        search = cost.price(_trials(args.base, max(0, whole - done)), speed, resources)
        lines.append(f"the search, if no trial is stopped: {search}")
    if args.confirm:
        again = _trials(args.base, args.confirm + 1) * args.seeds
        lines.append(f"the confirmation: {cost.price(again, speed, resources)}")
    return [*lines, speed.basis]


def _trials(base: Config, count: int) -> list[Trial]:
    """So many trials after their one warm-up; none without any."""
    if not count:
        return []
    seed = base.train.seed
    if not base.train.warmup:
        return [Trial("trial", "trial", base, seed, (), None)] * count
    warmup = Trial("warmup", "warmup", base, seed, (), None)
    return [warmup, *[Trial("trial", "trial", base, seed, (), warmup.name)] * count]
