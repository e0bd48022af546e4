"""What a search would do: its space, its rungs, what comes first, what it costs. Changes nothing."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from cosa.cli.console import print_error, print_line
from cosa.config import Config, override
from cosa.config.presets import short_name
from cosa.tracking import TrackingError, mask
from sweeps import runs
from sweeps.planning import cost
from sweeps.planning.plan import Trial
from sweeps.running.driver import data_tags_if_there, may_answer, measuring
from sweeps.tables.metrics import SEG_MIOU
from sweeps.tuning.space import rows_inside

if TYPE_CHECKING:
    from sweeps.tuning.driver import Request


def first_rows(request: Request) -> tuple[dict[str, Mapping[str, Any]], list[str]]:
    """Rows to try first, as parameters by origin, and the names of those outside the space.

    Half of the trials at most, so that there is a search beyond them; a row of all components is the preset.
    """
    most = max(1, (request.budget.trials or len(request.rows) * 2) // 2)
    return rows_inside(request.rows, request.space, request.base, most)


def first_trials(request: Request) -> dict[str, Trial]:
    """The trials of these rows, by origin, as earlier runs may have trained them."""
    from sweeps.tuning.flow import alone  # optuna and all that comes with it

    inside, _ = first_rows(request)
    changes = {origin: request.space.changes(parameters) for origin, parameters in inside.items()}
    return {origin: alone(override(request.base, own), origin) for origin, own in changes.items()}


def show_plan(request: Request) -> None:
    """Space, rungs, rows, and iterations at most."""
    order, train = request.order, request.base.train
    print_line(f"search around {short_name(order.preset)}: {request.budget.text()}, by {SEG_MIOU}")
    width = max(map(len, request.space.texts()))
    for name, text in request.space.texts().items():
        print_line(f"  {name:<{width}}  {text}")
    if request.rungs.steps:
        steps = " and ".join(f"{step:,}" for step in request.rungs.steps)
        print_line(f"stopped at {steps} of {train.iterations:,} iterations: the worst third of those so far")
    else:
        print_line("stopped nowhere: co-training is too short to be judged on its way")
    if request.rungs.every != order.base.evaluation.every:
        print_line(
            f"evaluation.every is {request.rungs.every} instead of {order.base.evaluation.every}: trials are "
            f"evaluated where they may be stopped"
        )
    inside, outside = first_rows(request)
    print_line(f"first come {len(inside)} rows of the paper: {_names(inside)}")
    if outside:
        print_line(f"outside of the space: {_names(outside)}")
    cotraining = train.iterations - train.warmup
    if request.budget.trials:
        most = train.warmup + request.budget.trials * cotraining
        print_line(
            f"at most {most:,} iterations, of which {train.warmup:,} are the one warm-up of all trials"
        )
    if request.confirm:
        more = request.seeds * (train.warmup + (request.confirm + 1) * cotraining)
        print_line(
            f"then the best {request.confirm} and the preset with {request.seeds} fresh seeds: "
            f"{more:,} iterations beyond the budget"
        )


def _names(origins: Mapping[str, Any] | Sequence[str]) -> str:
    return ", ".join(origin.rpartition("/")[2] for origin in origins)


def show_costs(request: Request) -> None:
    """What was begun before, what earlier runs spare, and hours, as far as finished runs tell them."""
    begun = _show_begun(request)
    spared, speed = 0, None
    try:
        if may_answer(request.order.uri):
            spared = 0 if begun else _show_earlier(request)
            speed = _speed(request)
    except TrackingError as error:
        print_error(str(error))
    if speed is None:
        where = mask(request.order.uri)
        print_line(
            f"hours: not known, no finished run of this network, crop and batch is in {where}; one measures "
            f"them, a short one will do:\n  {measuring(request.order)}"
        )
        return
    _show_hours(request, speed, begun + spared)


def _show_begun(request: Request) -> int:
    """Trials that the study in the search's folder has begun."""
    from sweeps.tuning.study import JOURNAL, peek

    states = peek(request.order.root, request.space, request.base)
    if not states:
        return 0
    counts = Counter(states)
    parts = ", ".join(f"{count} {state}" for state, count in counts.items())
    print_line(f"begun before: {len(states)} trials ({parts}), in {request.order.root / JOURNAL}")
    return len(states)


def _show_earlier(request: Request) -> int:
    """Rows of the paper that need not be run; their number."""
    from sweeps.tuning.track import find_earlier  # mlflow and all that comes with it

    if request.order.fresh:
        print_line("nothing is taken from earlier runs: --fresh")
        return 0
    rows = first_trials(request)
    reused = find_earlier(request.order, list(rows.values()), data_tags_if_there(request.order))
    taken = [origin for origin, trial in rows.items() if trial.name in reused.values]
    print_line(f"taken from earlier runs: {_names(taken) if taken else 'no row'}")
    if reused.refused:
        print_line(reused.refused)
    return len(taken)


def _speed(request: Request) -> cost.Speed | None:
    found = runs.find_experiment(request.order.uri, request.order.experiment)
    if found is None:
        return None
    with runs.explained(request.order.uri):
        return cost.measured(*found, request.base)


def _show_hours(request: Request, speed: cost.Speed, spared: int) -> None:
    """Hours at most, since nobody knows which trials will be stopped."""
    resources = request.order.request
    whole = request.budget.trials
    if whole is None:
        one = cost.price(_trials(request.base, 1)[-1:], speed, resources)
        print_line(f"a trial that is not stopped: {one}")
    else:
        search = cost.price(_trials(request.base, max(0, whole - spared)), speed, resources)
        print_line(f"the search, if no trial is stopped: {search}")
    if request.confirm:
        again = _trials(request.base, request.confirm + 1) * request.seeds
        print_line(f"the confirmation: {cost.price(again, speed, resources)}")
    print_line(cost.basis(speed))


def _trials(base: Config, count: int) -> list[Trial]:
    """So many trials after their one warm-up; none without any."""
    if not count:
        return []
    seed = base.train.seed
    if not base.train.warmup:
        return [Trial("trial", "trial", base, seed, (), None)] * count
    warmup = Trial("warmup", "warmup", base, seed, (), None)
    return [warmup, *[Trial("trial", "trial", base, seed, (), warmup.name)] * count]
