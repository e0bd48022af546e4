"""`cosa-train PRESET`, `cosa-segment PRESET`: train a preset or a file of settings, any of them changed."""

from __future__ import annotations

import argparse
import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from cosa.cli.common import Parser, changed_settings, first_line, whole_number
from cosa.cli.console import NETWORKS, Display, duration, metrics_table
from cosa.config import Config, identity, override
from cosa.config.presets import PRESETS, Presets, get_preset, is_file, short_name
from cosa.config.recipes import STANDALONE
from cosa.networks.published import pinned
from cosa.storage.files import mask, require_folder
from cosa.tracking import (
    TrackingError,
    TrackingSpec,
    costs,
    initialise_store,
    resolve_uri,
    sqlite_uri,
    ui_steps,
)
from cosa.training.stop import until_terminated

if TYPE_CHECKING:
    from cosa.training.trainer import Result, RunSpec, TrainProgress


def main(prog: str, arguments: Sequence[str], *, standalone: bool = False) -> int:
    """What `cosa-train` does, or `cosa-segment` where `standalone`; returns the exit code."""
    presets = STANDALONE if standalone else PRESETS
    preset = next((name for name in arguments if name in presets or is_file(name)), None)
    parser = _training_parser(prog, preset, presets)
    if not arguments:
        parser.error("PRESET is missing")
    given = parser.parse_known(arguments)
    config = pinned(override(get_preset(given.preset, presets), changed_settings(given)))
    if config.standalone != standalone:
        of, other = ("a standalone network", "train") if standalone else ("cosa", "segment")
        architecture = config.network.architecture
        raise ValueError(
            f"network.architecture must be {of}, got {architecture!r}; cosa-{other} trains that one"
        )
    name = f"{short_name(given.preset)}-{identity(config)[:8]}"
    out = given.out or Path("runs") / name
    if "://" not in str(out):
        require_folder("--out", Path(out).expanduser())
    if given.dry_run:
        from cosa.storage.mirror import open_storage  # imports torch

        tracking = _tracking(prog, given, open_storage(out).folder)
        print(_plan(config, max(1, given.workers), str(out), tracking))
        return 0
    from cosa.training.trainer import RunSpec  # imports torch

    spec = RunSpec(config=config, out=out)
    storage = spec.storage
    spec = replace(spec, tracking=_tracking(prog, given, storage.folder))
    display = Display()
    logger = logging.getLogger("cosa")
    logger.addHandler(display)
    propagates, logger.propagate, level = logger.propagate, False, logger.level
    logger.setLevel(logging.INFO)
    where = "one process" if given.workers == 0 else f"{given.workers} Ray workers"
    place = storage.url or storage.folder
    display.line(f"training {given.preset} in {place}: {config.train.iterations} steps, {where}")
    try:
        result = _run(spec, given.workers, display)
    finally:
        display.live.keep()
        logger.removeHandler(display)
        logger.propagate = propagates
        logger.setLevel(level)
    _print_result(result, config, spec.tracking)
    if storage.url:
        print(f"kept in     {storage.url}")
    return 0


def _plan(config: Config, workers: int, out: str, tracking: TrackingSpec) -> str:
    """What a run would do and take, in lines for people; `config` is pinned.

    Raises:
        ValueError: The batch does not divide among the workers and their micro-batches.
    """
    train, network, data = config.train, config.network, config.data
    each, steps = train.at_a_time(workers), train.iterations
    lines = {
        "run": f"{mask(out)}, identity {identity(config)}",
        "data": f"{data.train_split} of {data.layout} in {data.root}",
        "weights": network.weights or f"{'none: ' * network.from_scratch}{network.encoder}",
        "schedule": f"{steps:,} steps of {train.batch_size} images, {steps * train.batch_size:,} seen"
        + ("" if config.standalone else f"; warm-up {train.warmup:,}, co-training {steps - train.warmup:,}"),
        "at a time": f"{each} images of {data.crop_size} pixels, workers {workers}, "
        f"train.accumulate {train.accumulate}",
    }
    if config.standalone:
        labels = config.segmentation.labels or "none yet: --labels names a folder of pseudo-labels"
        lines["labels"] = "masks: the upper bound, an oracle" if config.oracle else labels
    lines |= _costs(config, workers, tracking)
    return "\n".join(f"{what:12}{text}" for what, text in lines.items())


def _costs(config: Config, workers: int, tracking: TrackingSpec) -> dict[str, str]:
    """What a run would take, as finished runs like it did or by a formula; nothing is made."""
    like, unknown = [], f"not known: none like it has finished in {mask(tracking.uri) or 'a store'}"
    try:
        if found := costs.find_experiment(tracking.uri, tracking.experiment):
            like = costs.runs_like(*found, config)
    except TrackingError as error:
        unknown = f"not known: {error}"
    parameters, each = costs.size_of(config)
    gib, why = costs.expected_gib(config, workers, like)
    lines = {
        "parameters": f"{parameters / 1e6:.1f} million",
        "GPU memory": why if gib is None else f"{gib:.1f} GiB, {why}",
    }
    if each is not None:
        batch, images = config.train.batch_size, config.train.at_a_time(workers)
        most = costs.images_on(costs.GPU_GIB, parameters, each)
        fitting = [n for n in range(1, min(most, images) + 1) if batch % (workers * n) == 0]
        advice = "too small"
        if fitting:
            needed = batch // (workers * fitting[-1])
            advice = (
                "enough" if images <= most else f"needs --train.accumulate {needed}, for the same batches"
            )
        lines["GPU, 24 GB"] = advice
    return {**lines, "speed": costs.speed_text(like) or unknown}


def _run(spec: RunSpec, workers: int, display: Callable[[TrainProgress], None]) -> Result:
    """Train in this process, or on workers of Ray; SIGTERM saves a checkpoint and stops."""
    with until_terminated() as should_stop:
        if workers:
            from cosa.distributed.session import require_cluster

            require_cluster()
            from cosa.distributed.train import fit

            return fit(spec, workers=workers, report=display, should_stop=should_stop)
        from cosa.training.trainer import train

        if spec.tracking.uri:
            initialise_store(spec.tracking.uri, spec.tracking.experiment)  # one that is away now is told now
        return train(spec, report=display, should_stop=should_stop)


def _training_parser(prog: str, preset: str | None, presets: Presets) -> Parser:
    width = max(map(len, presets))
    listed = "\n".join(f"  {name:{width}} {first_line(make)}" for name, make in presets.items())
    shown = f"`{preset}`" if preset else "the paper's setting; name a preset to see its own"
    standalone = presets is STANDALONE
    what = (
        "a standalone segmentation network on a CoSA run's pseudo-labels (CoSA-MS)" if standalone else "CoSA"
    )
    parser = Parser(
        prog=prog,
        usage=f"{prog} PRESET [options] [--SECTION.SETTING VALUE ...]",
        description=f"Train {what}. The same command line resumes a run, and repeats nothing of a finished "
        f"one.\n\npresets:\n{listed}\n  FILE.json  Settings as a run or a search leaves them (config.json, "
        f"best.json)\n\nDefaults of settings are those of {shown}.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.flag("preset", "PRESET", "settings to start from")
    if standalone:
        parser.flag("--labels", "DIR", "the same as --segmentation.labels", dest="segmentation.labels")
    parser.flag(
        "--workers",
        "N",
        "data-parallel processes through Ray Train, on a GPU each where there are GPUs (NCCL), else on CPUs "
        "(gloo); 0 trains in one process without Ray. RAY_ADDRESS names a cluster to join (default 0)",
        type=whole_number,
        default=0,
    )
    parser.flag(
        "--out",
        "DIR|URL",
        "folder of the run, for several machines on storage that all reach; or a URL such as "
        "s3://BUCKET/RUN, which gets a copy of it at every checkpoint, and from which any machine goes on "
        "(default runs/PRESET-IDENTITY, the identity being that of the settings)",
    )
    parser.flag(
        "--tracking-uri",
        "URI",
        "MLflow store: sqlite:///FILE, http://HOST:PORT, or none "
        "(default MLFLOW_TRACKING_URI, else mlflow.db beside the run's folder)",
    )
    parser.experiment()
    parser.flag("--run-name", "NAME", "name of the MLflow run (default that of the folder)", default="")
    parser.system_metrics()
    parser.switch(
        "--dry-run",
        "show schedule, weights, parameters, memory, and the speed of finished runs like it; train nothing",
    )
    parser.traceback()
    parser.settings(get_preset(preset, presets) if preset else Config())
    return parser


def _tracking(prog: str, given: argparse.Namespace, out: Path) -> TrackingSpec:
    uri = given.tracking_uri or os.environ.get("MLFLOW_TRACKING_URI") or sqlite_uri(out.parent / "mlflow.db")
    return TrackingSpec(
        uri="" if uri == "none" else resolve_uri(uri),
        experiment=given.experiment,
        run_name=given.run_name,
        tags={"mlflow.source.name": prog},
        system_metrics=not given.no_system_metrics,
    )


def _print_result(result: Result, config: Config, tracking: TrackingSpec) -> None:
    columns = {
        short: {name.removeprefix(f"val/{network}/"): value for name, value in result.metrics.items()}
        for network, short in NETWORKS.items()
        if (network == "standalone") == config.standalone
    }
    print(f"\n{result.step} of {config.train.iterations} steps in {duration(result.seconds)}\n")
    print(metrics_table(columns))
    print(f"\ncheckpoint  {result.checkpoint}")
    if result.run_id and tracking.uri:
        print(f"MLflow run  {result.run_id} in {mask(tracking.uri)}")
        print(f"to see it   {ui_steps(tracking.uri)}")
