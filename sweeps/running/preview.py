"""What a sweep would do: its plan, what earlier runs spare it, what it will cost, and what is missing."""

from __future__ import annotations

import dataclasses
import shlex
from collections.abc import Mapping
from pathlib import Path

from cosa.cli.console import print_error, print_line
from cosa.config import Config, DataConfig, difference, override
from cosa.config.presets import get_preset
from cosa.storage.files import mask
from cosa.tracking import TrackingError
from cosa.tracking.provenance import source_tags
from sweeps.planning import cost
from sweeps.planning.cost import Speed, price
from sweeps.planning.folder import SweepState, read_state, taken_before
from sweeps.planning.plan import Plan, draw_tree
from sweeps.planning.reuse import COMMIT_TAG, find_reusable, still_there
from sweeps.running.arguments import SweepArgs
from sweeps.runs import explained, find_experiment


def preview(args: SweepArgs, plan: Plan) -> None:
    """Show the plan, what it will cost, and what it lacks; nothing is made, neither data nor a store."""
    state, refused, speed = read_state(args.out, plan), "", None
    data_tags, problem = look_at_data(args.base.data)
    try:
        state, refused = with_earlier(args, state, data_tags)
        speed = measured(args, args.base)
    except TrackingError as error:
        print_error(str(error))
    show_plan(args, state, refused)
    if state.remaining:
        print_line(
            f"to train: {price(state.remaining, speed, args.resources)}; {speed.basis}"
            if speed
            else measuring(args)
        )
    if problem:
        print_error(problem)


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


def with_earlier(args: SweepArgs, state: SweepState, data_tags: Mapping[str, str]) -> tuple[SweepState, str]:
    """`state` with the earlier runs that this sweep takes, and why it takes no others.

    Those that it took before stay, whatever the code is now.

    Raises:
        TrackingError: The store does not answer.
    """
    found = None if args.fresh else find_experiment(args.uri, args.experiment)
    if found is None:
        return state, ""
    client, experiment_id = found
    code = {COMMIT_TAG: args.commit} if args.commit else source_tags()
    with explained(args.uri):
        taken = still_there(client, state.plan.trials, taken_before(args.out))
        missing = state.plan.remaining({*state.results, *taken})
        new, refused = find_reusable(client, experiment_id, missing, code, data_tags)
    return dataclasses.replace(state, reused={**taken, **new}), refused


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


def measured(args: SweepArgs, base: Config) -> Speed | None:
    """How fast finished runs like `base` were; None where nobody knows.

    Raises:
        TrackingError: The store does not answer.
    """
    found = find_experiment(args.uri, args.experiment)
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
