"""A sweep as a straight line: plan, state, training, MLflow, report; the same command line again goes on.

Every start makes the same plan from the same arguments and runs what neither the trials' folders nor, of
earlier sweeps, MLflow says is finished. Exit codes: 0 all that was asked for is finished, or `--dry-run` has
shown the plan, whatever it says is missing; 1 a trial failed; 2 the user's mistake; 130 interrupted.
"""

from __future__ import annotations

import contextlib
import dataclasses
import shlex
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Literal

from cosa.cli.common import FAILED, INTERRUPTED, MISTAKE
from cosa.cli.console import print_error, print_line
from cosa.config import Config, DataConfig, difference, override
from cosa.config.presets import get_preset
from cosa.distributed.session import (
    SPARE,
    Slots,
    TrialResources,
    in_memory,
    require_cluster,
    trial_slots,
)
from cosa.networks.published import require_weights
from cosa.storage.files import lock, mask, write_atomically
from cosa.storage.run_folder import TRAINING_TAG, VALIDATION_TAG
from cosa.tracking import TrackingError, costs, ui_steps
from cosa.tracking.provenance import source_tags
from sweeps.planning import cost
from sweeps.planning.folder import (
    LOCK,
    Result,
    SweepState,
    planned,
    read_state,
    require_same_sweep,
    taken_before,
)
from sweeps.planning.plan import Plan, Trial, draw_tree, make_plan, to_json
from sweeps.planning.reuse import COMMIT_TAG, find_reusable
from sweeps.running.arguments import SweepArgs, read_args
from sweeps.running.store import Sweep, open_sweep
from sweeps.runs import PLAN, explained


def main(name: str, description: str, tables: Sequence[str], arguments: Sequence[str] | None = None) -> int:
    """A sweep script, from its command line to its exit code.

    Args:
        name: The script's name.
        description: What its `--help` says of it.
        tables: Tables that it fills where the command line names no others.
        arguments: The command line; by default the process's own.
    """
    given = sys.argv[1:] if arguments is None else arguments
    return run_script(name, lambda: run(read_args(name, description, tables, given)))


def run_script(name: str, script: Callable[[], int]) -> int:
    """The exit code of `script`; what the user can put right is one line."""
    try:
        return script()
    except (ValueError, TypeError, OSError, TrackingError) as error:
        if "--traceback" in sys.argv:
            raise
        print_error(f"{name}: {' '.join(str(error).split())}")
        return MISTAKE
    except KeyboardInterrupt:
        print_error(f"interrupted; this goes on from here:\n  {shlex.join(['python', *sys.argv])}")
        return INTERRUPTED


def run(args: SweepArgs) -> int:
    """Show what `args` ask for and, unless that is all, train what remains of it and report."""
    plan = make_plan(args.base, args.tables, args.seeds)
    require_same_sweep(args.out, plan)
    if args.dry_run:
        preview(args, plan)
        return 0
    with lock(args.out / LOCK):
        state = read_state(args.out, plan)
        for trial in state.remaining:
            require_weights(trial.config.network)
        if state.remaining:
            require_cluster()
        data_tags = check_data(args.base)
        _require_same_data(args, state, data_tags)
        state, refused = with_earlier(args, state, data_tags)
        show_plan(args, state, refused)
        print_line(f"outputs: {args.out}")
        with open_sweep(args, state.plan, state.reused) as sweep:
            write_atomically(args.out / PLAN, to_json(state.plan, state.reused))
            results, failures = _train(args, sweep, state, data_tags)
            state = state.after(results)
            if (written := planned(args.out, state.plan)) != state.plan:  # the report finds runs by identity
                state = dataclasses.replace(state, plan=written)
                write_atomically(args.out / PLAN, to_json(written, state.reused))
                sweep.tracker.log_text(to_json(written, state.reused), PLAN)
            sweep.sync(state, failures)
            _report(args, sweep, failed=bool(failures))
    return _exit_code(plan, failures)


def check_data(base: Config, *, masks: bool = False) -> Mapping[str, str]:
    """Open the data before anything is started; `shapes` is written here, once, and not by every trial.

    Args:
        base: Settings of every trial.
        masks: Whether every image of the validation split must have one.

    Returns:
        Its fingerprints by tag.

    Raises:
        ValueError, OSError: Data that cannot be trained on.
    """
    from cosa.data.open import fingerprints, open_dataset  # imports torch

    data = base.data
    training = open_dataset(data, data.train_split)
    needs: Literal["labels", "masks"] = "masks" if masks else "labels"
    seen = fingerprints(training, open_dataset(data, data.val_split, needs=needs) if data.val_split else None)
    if base.evaluation.train_split:
        open_dataset(data, base.evaluation.train_split, needs="masks")
    return seen


def with_earlier(args: SweepArgs, state: SweepState, data_tags: Mapping[str, str]) -> tuple[SweepState, str]:
    """`state` with the earlier runs that this sweep takes, and why it takes no others.

    Those that it took before stay, whatever the code is now.

    Raises:
        TrackingError: The store does not answer.
    """
    found = None if args.fresh else costs.find_experiment(args.uri, args.experiment)
    if found is None:
        return state, ""
    client, experiment_id = found
    code = {COMMIT_TAG: args.commit} if args.commit else source_tags()
    with explained(args.uri):
        reused, refused = find_reusable(
            client, experiment_id, state.remaining, code, data_tags, taken_before(args.out)
        )
    return dataclasses.replace(state, reused=reused), refused


def show_plan(args: SweepArgs, state: SweepState, refused: str) -> None:
    """The plan as a tree, and what in it may surprise."""
    print_line(draw_tree(state.plan, state.results, state.reused))
    if refused:
        print_line(refused)
    asking = [t.name for t in state.plan.tables if any(m.startswith("train/") for m in t.metrics)]
    if asking and not args.base.evaluation.train_split:
        print_line(
            f"table {', '.join(asking)} shows CPL of training images: its cells stay empty without "
            f"--set evaluation.train_split={args.base.data.train_split}"
        )


def preview(args: SweepArgs, plan: Plan) -> None:
    """Show the plan, what it will cost, and what it lacks; nothing is made, neither data nor a store."""
    state, refused = read_state(args.out, plan), ""
    data_tags, problem = look_at_data(args.base.data)
    speeds: dict[str, cost.Speed | None] = {}  # by the network's architecture
    try:
        state, refused = with_earlier(args, state, data_tags)
        for trial in state.remaining:
            if (own := trial.config.network.architecture) not in speeds:
                speeds[own] = measured(args, trial.config if trial.config.standalone else args.base)
    except TrackingError as error:
        print_error(str(error))
    show_plan(args, state, refused)
    for architecture in dict.fromkeys(trial.config.network.architecture for trial in state.remaining):
        trials = [trial for trial in state.remaining if trial.config.network.architecture == architecture]
        speed, name = speeds.get(architecture), "" if architecture == "cosa" else f" {architecture}"
        if speed:
            print_line(f"to train{name}: {cost.price(trials, speed, args.resources)}; {speed.basis}")
        elif name:
            print_line(f"hours of{name}: not known, no finished run like it is in {mask(args.uri)}")
        else:
            print_line(measuring(args))
    if problem:
        print_error(problem)
    try:
        for trial in state.remaining:
            require_weights(trial.config.network)
    except (OSError, ValueError) as error:
        print_error(f"before training: {error}")


def look_at_data(data: DataConfig) -> tuple[Mapping[str, str], str]:
    """Fingerprints of the data by tag, and in one line what a plan can do without and training cannot."""
    root = Path(data.root)
    if data.layout == "shapes" and not (root / "ImageSets").exists():
        return {}, ""  # the sweep writes them
    if not root.exists():
        missing = "" if data.archive else f"data.root must be a folder that exists, got {data.root!r}"
        return {}, missing and f"before training: {missing}"
    from cosa.data.open import read_fingerprints  # imports torch

    try:
        return read_fingerprints(data), ""
    except (OSError, ValueError) as error:
        return {}, f"before training: {' '.join(str(error).split())}"


def measured(args: SweepArgs, base: Config) -> cost.Speed | None:
    """How fast finished runs like `base` were; None where nobody knows.

    Raises:
        TrackingError: The store does not answer.
    """
    found = costs.find_experiment(args.uri, args.experiment)
    if found is None:
        return None
    with explained(args.uri):
        return cost.measured(*found, base)


def measuring(args: SweepArgs) -> str:
    """What to say where nobody knows how fast: the command of a short run like the sweep's own."""
    short = override(
        args.base, {"train.iterations": 40, "train.warmup": 20, "train.log_every": 10, "optim.lr_warmup": 0}
    )
    changes = [
        part
        for name, _, value in difference(get_preset(args.preset), short)
        for part in (f"--{name}", ",".join(map(str, value)) if isinstance(value, tuple) else str(value))
    ]
    store = mask(args.uri)
    command = shlex.join(["cosa-train", args.preset, *changes, "--tracking-uri", store])
    return (
        f"hours: not known, no finished run of this network, crop and batch is in {store}; "
        f"one measures them, a short one will do:\n  {command}"
    )


def _require_same_data(args: SweepArgs, state: SweepState, data_tags: Mapping[str, str]) -> None:
    """Refuse other data than the finished trials saw."""

    for name, result in state.results.items():
        for key, tag in (("data_fingerprint", TRAINING_TAG), ("val_fingerprint", VALIDATION_TAG)):
            before = result.get(key, data_tags[tag])
            if before != data_tags[tag]:
                raise ValueError(
                    f"data in {args.base.data.root!r} must be what the sweep began with, got fingerprint "
                    f"{data_tags[tag]} instead of {before} ({state.plan.named(name).label}); bring it back, "
                    "or choose another --out"
                )


def _chosen(args: SweepArgs, sweep: Sweep, state: SweepState) -> list[Trial]:
    """Trials to run now: all that are not finished, or of them those that failed."""
    if not args.retry_failed:
        return state.remaining
    failed = {*state.failures, *sweep.failures()}
    others = {trial.name for trial in state.plan.trials if trial.kind == "trial"} - failed
    chosen = state.plan.remaining(state.finished | others)
    waiting = _trials(state.remaining) - _trials(chosen)
    if not chosen:
        print_line("nothing has failed")
    if waiting:
        print_line(
            f"not run yet and left alone: {waiting}; the same command without --retry-failed runs them"
        )
    return chosen


def _trials(trials: Sequence[Trial]) -> int:
    return sum(trial.kind == "trial" for trial in trials)


def _train(
    args: SweepArgs, sweep: Sweep, state: SweepState, data_tags: Mapping[str, str]
) -> tuple[Mapping[str, Result], Mapping[str, str]]:
    """Train what is to be trained now; returns results and, of what failed, reasons, by name."""
    trials = _chosen(args, sweep, state)
    if not trials:
        return {}, {}
    with slots_for(args, [trial.config for trial in trials]) as slots:
        from sweeps.running.launch import launch  # ray and torch

        share = f", {slots.gpus:g} GPU" if slots.gpus else ""
        print_line(
            f"{len(trials)} trials to run, {slots.count} at a time, each with {slots.cpus:g} CPU{share}"
        )
        if args.resources.most and slots.count < args.resources.most:
            print_line(
                f"--max-concurrent {args.resources.most} does not fit: give each trial less than a CPU"
            )
        return launch(state, trials, args, slots, sweep.spec, data_tags, sweep.tell)


@contextlib.contextmanager
def slots_for(args: SweepArgs, configs: Sequence[Config]) -> Iterator[Slots]:
    """Ray, divided among trials of `configs`; with `--max-concurrent auto` it says how it packs GPUs and why.

    Where there is no GPU it warns of settings that make no sense on this machine's CPU.

    Raises:
        TrackingError: The store does not answer.
    """
    auto = args.resources.concurrent == "auto"
    gib, why = _most_gib(args, configs) if auto else (None, "")
    with trial_slots(args.resources, gib) as slots:
        if auto:
            print_line(f"--max-concurrent auto: {packing(slots, args.resources, gib, why)}")
        if not slots.gpus:
            import torch

            from cosa.networks.network import warning_of

            warnings = (warning_of(config.train, torch.device("cpu")) for config in configs)
            for warning in dict.fromkeys(filter(None, warnings)):
                print_line(warning)
        yield slots


def packing(slots: Slots, resources: TrialResources, gib: float | None, why: str) -> str:
    """How many trials share a GPU, and why, in a line."""
    if not slots.gpus:
        return f"{slots.count} at a time, on CPUs as many as fit"
    if resources.gpus is not None:
        return f"{slots.count} at a time, as --gpus-per-trial says"
    if resources.processes > 1:
        return f"{slots.count} at a time, a GPU for each of --workers-per-trial"
    if gib is None:
        return f"{slots.count} at a time, a GPU each: memory of a trial {why}"
    if not slots.gpu_gib:
        return f"{slots.count} at a time, a GPU each: the GPUs' memory is not known"
    return (
        f"{slots.count} at a time, {round(1 / slots.gpus)} on a GPU: {in_memory(slots.gpu_gib, gib)} of "
        f"{gib:.1f} GiB ({why}) and CUDA's own fit into {slots.gpu_gib:.0f} GiB, {SPARE:.0%} left over"
    )


def _most_gib(args: SweepArgs, configs: Sequence[Config]) -> tuple[float | None, str]:
    """GiB of a GPU that the largest of `configs` takes, and how that is known; None where one's is not."""
    found = None if args.resources.gpus == 0 else costs.find_experiment(args.uri, args.experiment)
    needs: list[tuple[float | None, str]] = []
    with explained(args.uri):
        for config in {costs.kind_of(config): config for config in configs}.values():
            like = costs.runs_like(*found, config) if found else []
            needs.append(costs.expected_gib(config, args.resources.workers, like))
    unknown = [need for need in needs if need[0] is None]
    return unknown[0] if unknown else max(needs, key=lambda need: need[0] or 0.0)


def _report(args: SweepArgs, sweep: Sweep, *, failed: bool) -> None:
    """Make the report of what MLflow has now, keep it there, and show it."""
    from sweeps.reporting import render, results  # all that draws

    with explained(args.uri):
        found = results.read_results(args.uri, sweep.run_id, status="FAILED" if failed else "FINISHED")
    files = render.write(found, args.out, args.uri)
    sweep.close(render.headline(found), files, failed=failed)
    print_line(render.terminal(found))
    print_line(f"report: {files[0]}")
    print_line(f"MLflow: {ui_steps(args.uri)}")


def _exit_code(plan: Plan, failures: Mapping[str, str]) -> int:
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
