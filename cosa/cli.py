"""The commands: `cosa-train PRESET` trains, `cosa-evaluate RUN` judges again what a run left.

Every setting of a Config is a flag, described by the string under its field. Nothing heavy is imported
before the command line is understood, so that `--help` and a mistyped flag answer at once.
"""

from __future__ import annotations

import argparse
import inspect
import logging
import math
import os
import shutil
import signal
import sys
import typing
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NoReturn

from cosa.config import Config, fields, from_json, identity, nearest, override
from cosa.presets import PRESETS, get_preset
from cosa.tracking import TrackingError, TrackingSpec, mask, resolve_uri, ui_hint

if TYPE_CHECKING:
    from cosa.trainer import Progress, Result
else:
    Progress = Result = Any  # the trainer imports torch; tests check annotations as the program runs

MISTAKE, FAILED, INTERRUPTED = 2, 1, 130
"""Exit codes: what the user can put right, a run that broke, Ctrl-C."""


def train(arguments: Sequence[str] | None = None) -> int:
    """`cosa-train`: train one preset, with any of its settings changed; the same command line resumes."""
    return _command("cosa-train", _train, sys.argv[1:] if arguments is None else arguments)


def evaluate(arguments: Sequence[str] | None = None) -> int:
    """`cosa-evaluate`: evaluate a run's assignment network again, perhaps on other data or scales."""
    return _command("cosa-evaluate", _evaluate, sys.argv[1:] if arguments is None else arguments)


def _command(name: str, command: Callable[[str, Sequence[str]], None], arguments: Sequence[str]) -> int:
    """Run a command; what the user can put right becomes one line, and an exit code that is not 0."""
    signal.signal(signal.SIGTERM, _terminate)
    try:
        command(name, arguments)
    except KeyboardInterrupt:
        _complain(f"{name}: interrupted; the same command goes on from the last checkpoint")
        return INTERRUPTED
    except (ValueError, TypeError, OSError, RuntimeError) as error:
        if "--traceback" in arguments:
            raise
        text = " ".join(str(error).split()) or type(error).__name__
        _complain(f"{name}: error: {text}")
        return FAILED if isinstance(error, RuntimeError) and not isinstance(error, TrackingError) else MISTAKE
    return 0


def _terminate(number: int, frame: object) -> NoReturn:  # noqa: ARG001 (the signal's own signature)
    """End in order when told to: a job that is stopped closes its tracked run."""
    raise SystemExit(128 + number)


def _complain(line: str) -> None:
    print(line, file=sys.stderr)


class _Parser(argparse.ArgumentParser):
    """Reports a bad command line as every other mistake is reported, without the usage of 80 flags."""

    def error(self, message: str) -> NoReturn:
        """Called by argparse."""
        raise ValueError(f"{message}; see {self.prog} --help")

    def parse_known(self, arguments: Sequence[str]) -> argparse.Namespace:
        """Parse all arguments; an unknown flag is answered with the nearest known one."""
        parsed, unknown = self.parse_known_args(arguments)
        if unknown:
            known = [flag for action in self._actions for flag in action.option_strings]
            name = unknown[0].partition("=")[0]
            hint = nearest(name, known) if name.startswith("-") else ""
            raise ValueError(
                f"argument must be one that exists, got {name!r}{hint or f'; see {self.prog} --help'}"
            )
        return parsed


def _train(prog: str, arguments: Sequence[str]) -> None:
    preset = next((name for name in arguments if name in PRESETS), None)
    parser = _training_parser(prog, preset)
    if not arguments:
        parser.error("PRESET is missing")
    given = parser.parse_known(arguments)
    config = override(get_preset(given.preset), _changes(given))
    out = (given.out or Path("runs") / f"{given.preset}-{identity(config)[:8]}").expanduser().absolute()
    tracking = _tracking(given, out)
    display = _Display()
    logger = logging.getLogger("cosa")
    logger.addHandler(display)
    logger.propagate = False
    where = "one process" if given.workers == 0 else f"{given.workers} Ray workers"
    display.line(f"training {given.preset} in {out}: {config.train.iterations} steps, {where}")
    try:
        result = _run(config, out, tracking, given.workers, display)
    finally:
        display.rest()
        logger.removeHandler(display)
    _print_result(result, config, tracking)


def _run(
    config: Config, out: Path, tracking: TrackingSpec, workers: int, display: Callable[[Progress], None]
) -> Result:
    """Train in this process, or on workers of Ray."""
    if workers == 0:
        from cosa import trainer

        return trainer.train(config, out=out, tracker=tracking.tracker(), report=display)
    from cosa import distributed

    address = os.environ.get("RAY_ADDRESS", "local")
    return distributed.fit(config, out=out, workers=workers, tracking=tracking, show=display, address=address)


def _training_parser(prog: str, preset: str | None) -> _Parser:
    presets = "\n".join(f"  {name:10} {_first_line(make)}" for name, make in PRESETS.items())
    shown = f"`{preset}`" if preset else "the paper's setting; name a preset to see its own"
    parser = _Parser(
        prog=prog,
        usage=f"{prog} PRESET [options] [--SECTION.SETTING VALUE ...]",
        description=f"Train CoSA. The same command line resumes a run, and repeats nothing of a finished "
        f"one.\n\npresets:\n{presets}\n\nDefaults of settings are those of {shown}.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("preset", metavar="PRESET", help="settings to start from")
    parser.add_argument(
        "--workers",
        type=_whole,
        default=0,
        metavar="N",
        help="data-parallel processes through Ray Train, on a GPU each where there are GPUs (NCCL), else on "
        "CPUs (gloo); 0 trains in one process without Ray. RAY_ADDRESS names a cluster to join (default 0)",
    )
    parser.add_argument(
        "--out",
        type=Path,
        metavar="DIR",
        help="folder of the run, for several machines on storage that all reach "
        "(default runs/PRESET-IDENTITY, the identity being that of the settings)",
    )
    parser.add_argument(
        "--tracking-uri",
        metavar="URI",
        help="MLflow store: sqlite:///FILE, http://HOST:PORT, or none "
        "(default MLFLOW_TRACKING_URI, else mlflow.db beside the run's folder)",
    )
    parser.add_argument(
        "--experiment", default="cosa", metavar="NAME", help="MLflow experiment (default cosa)"
    )
    parser.add_argument(
        "--run-name", default="", metavar="NAME", help="name of the MLflow run (default that of the folder)"
    )
    _add_traceback(parser)
    _add_settings(parser, get_preset(preset) if preset else Config())
    return parser


def _add_traceback(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--traceback", action="store_true", help="show where in the code an error arose")


def _whole(text: str) -> int:
    value = int(text) if text.isdigit() else -1
    if value < 0:
        raise argparse.ArgumentTypeError(f"must be a whole number >= 0, got {text!r}")
    return value


def _add_settings(
    parser: argparse.ArgumentParser, base: Config, sections: frozenset[str] | None = None
) -> None:
    """A flag per setting, grouped by section, with the defaults of `base`."""
    groups: dict[str, argparse._ArgumentGroup] = {}
    for name, known in fields().items():
        section, _, item = name.partition(".")
        if sections is not None and section not in sections:
            continue
        settings = getattr(base, section)
        if section not in groups:
            groups[section] = parser.add_argument_group(f"{section}: {_first_line(type(settings))}")
        kind = _kind(known.kind)
        text = f"{known.doc} [{kind}; default {_text(getattr(settings, item)) or 'empty'}]"
        groups[section].add_argument(
            f"--{name}", dest=name, metavar=kind if "|" in kind else "VALUE", help=text.replace("%", "%%")
        )


def _first_line(documented: object) -> str:
    return (inspect.getdoc(documented) or "").partition("\n")[0].rstrip(".")


_KINDS = {bool: "true|false", int: "whole number", float: "number", str: "text"}


def _kind(kind: Any) -> str:
    """How `--help` calls the type of a setting."""
    if typing.get_origin(kind) is Literal:
        return "|".join(typing.get_args(kind))
    if typing.get_origin(kind) is tuple:
        return f"{_KINDS[typing.get_args(kind)[0]]}s with commas between"
    return _KINDS[kind]


def _text(value: object) -> str:
    """A setting's value as it is typed on the command line."""
    if isinstance(value, tuple):
        return ",".join(map(str, value))
    return str(value).lower() if isinstance(value, bool) else str(value)


def _changes(given: argparse.Namespace) -> dict[str, str]:
    """The settings that were given as flags."""
    return {name: value for name, value in vars(given).items() if name in fields() and value is not None}


def _tracking(given: argparse.Namespace, out: Path) -> TrackingSpec:
    uri = given.tracking_uri or os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{out.parent}/mlflow.db"
    return TrackingSpec(
        uri="" if uri == "none" else resolve_uri(uri),
        experiment=given.experiment,
        run_name=given.run_name,
        tags={"mlflow.source.name": "cosa-train"},
    )


class _Display(logging.Handler):
    """Progress of a run: a line that is rewritten in place on a terminal, plain lines elsewhere."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self._stream = sys.stdout
        self._terminal = sys.stdout.isatty()
        self._open = False

    def __call__(self, progress: Progress) -> None:
        """Show where the run stands; an evaluation stays on the screen."""
        if "train/loss/total" in progress.metrics:
            self._rewrite(_progress_line(progress))
        evaluated = _evaluation_line(progress)
        if evaluated:
            self.line(evaluated)

    def emit(self, record: logging.LogRecord) -> None:
        """Show a warning on a line of its own."""
        self.line(f"{record.levelname.lower()}: {record.getMessage()}")

    def line(self, text: str) -> None:
        """A line that stays."""
        self.rest()
        self._stream.write(text + "\n")
        self._stream.flush()

    def _rewrite(self, text: str) -> None:
        if not self._terminal:
            self.line(text)
            return
        self._stream.write("\r\x1b[2K" + text[: shutil.get_terminal_size().columns - 1])
        self._stream.flush()
        self._open = True

    def rest(self) -> None:
        """Leave the line that was being rewritten."""
        if self._open:
            self._stream.write("\n")
            self._stream.flush()
        self._open = False


def _progress_line(progress: Progress) -> str:
    """`step 40/800 | 4 min left | 52 images/s | xi 0.44 0.39 | loss 1.78: cls 0.70 c2s 1.84`.

    What a narrow terminal cuts off comes last.
    """
    metrics = progress.metrics
    prefix = "train/loss/"
    terms = {name.removeprefix(prefix): v for name, v in metrics.items() if name.startswith(prefix)}
    total = terms.pop("total")
    thresholds = [metrics[name] for name in ("train/threshold", "train/aux_threshold") if name in metrics]
    parts = [
        f"step {progress.step}/{progress.iterations}",
        f"{_duration(progress.seconds_left)} left",
        f"{progress.images_per_second:.3g} images/s",
        *(["xi " + " ".join(f"{xi:.2f}" for xi in thresholds)] if thresholds else []),
        f"loss {total:.3f}: " + " ".join(f"{name} {value:.3f}" for name, value in terms.items()),
    ]
    return " | ".join(parts)


def _evaluation_line(progress: Progress) -> str:
    """The figures of an evaluation that matter most, in percent; empty where there was none."""
    found = []
    for network, short in _NETWORKS.items():
        names = ("seg_miou", "seg_miou_labelled", "cpl_miou")
        values = [progress.metrics.get(f"val/{network}/{name}", math.nan) for name in names]
        if not all(map(math.isnan, values)):
            seg, labelled, cpl = (f"{100 * value:.1f}" for value in values)
            found.append(f"{short} seg {seg}, with image labels {labelled}, CPL {cpl}")
    return f"step {progress.step}: {' | '.join(found)}" if found else ""


def _duration(seconds: float) -> str:
    """`45 s`, `12 min`, `3 h 05 min`; `?` where nobody knows yet."""
    if not math.isfinite(seconds):
        return "?"
    minutes = round(seconds / 60)
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60:02} min"


_NETWORKS = {"assignment": "AN", "online": "ON"}

_CAPTIONS = {
    "seg_miou": "segmentation mIoU, label-free protocol",
    "seg_miou_labelled": "segmentation mIoU, labelled protocol (as in the paper on val)",
    "seg_cmiou": "segmentation C-mIoU, label-free protocol",
    "seg_cmiou_labelled": "segmentation C-mIoU, labelled protocol",
    "cpl_miou": "CPL mIoU at evaluation.xi",
    "cpl_cmiou": "CPL C-mIoU at evaluation.xi",
    "cpl_miou_own": "CPL mIoU at the training's own threshold",
    "cpl_best_miou": "CPL mIoU at its best threshold",
    "aux_cpl_miou": "CPL mIoU of M-dagger at evaluation.xi",
    "ensemble_cpl_miou": "CPL mIoU of both CAMs at evaluation.xi",
    "cls_map": "classification mAP",
}


def _metrics_table(columns: Mapping[str, Mapping[str, float]]) -> str:
    """Metrics by name, one column per network, in percent."""
    rows = [(name, text) for name, text in _CAPTIONS.items() if any(name in c for c in columns.values())]
    width = max((len(text) for _, text in rows), default=0)
    lines = [" " * width + "".join(f"{title:>8}" for title in columns) + "   percent"]
    for name, text in rows:
        values = "".join(f"{100 * column.get(name, math.nan):8.2f}" for column in columns.values())
        lines.append(f"{text:{width}}{values}   {name}")
    return "\n".join(lines)


def _print_result(result: Result, config: Config, tracking: TrackingSpec) -> None:
    columns = {
        short: {
            name.removeprefix(f"val/{network}/"): value
            for name, value in result.metrics.items()
            if name.startswith(f"val/{network}/")
        }
        for network, short in _NETWORKS.items()
    }
    print(f"\n{result.step} of {config.train.iterations} steps in {_duration(result.seconds)}\n")
    print(_metrics_table(columns))
    print(f"\ncheckpoint  {result.checkpoint}")
    if result.run_id and tracking.uri:
        print(f"MLflow run  {result.run_id} in {mask(tracking.uri)}")
        print(f"to see it   {ui_hint(tracking.uri)}")


def _evaluate(prog: str, arguments: Sequence[str]) -> None:
    parser = _Parser(
        prog=prog,
        usage=f"{prog} RUN [--evaluation.SETTING VALUE ...] [--data.SETTING VALUE ...]",
        description="Evaluate the assignment network of a run. Settings default to those of the run.",
        allow_abbrev=False,
    )
    parser.add_argument("run", type=Path, metavar="RUN", help="a run's folder, or one of its checkpoints")
    _add_traceback(parser)
    _add_settings(parser, Config(), frozenset({"data", "evaluation"}))
    given = parser.parse_known(arguments)
    run = given.run.absolute()
    folder = run if run.is_dir() else run.parent.parent
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(
            f"RUN must be a run's folder or a checkpoint in it, got {str(given.run)!r}; "
            f"{str(folder)!r} holds no config.json"
        )
    config = override(from_json((folder / "config.json").read_text()), _changes(given))
    print(_metrics_table({"AN": _evaluated(config, run)}))


def _evaluated(config: Config, run: Path) -> dict[str, float]:
    """Metrics of the assignment network that a run's folder or a checkpoint holds."""
    from cosa import checkpoint, evaluation
    from cosa.data.dataset import open_dataset
    from cosa.data.loader import evaluation_batches
    from cosa.ranks import Ranks
    from cosa.step import build_state

    device = Ranks.current().device
    dataset = open_dataset(config.data, config.data.val_split)
    saved = checkpoint.newest(run / "checkpoints", _complain) if run.is_dir() else checkpoint.load(run)
    if saved is None:
        raise FileNotFoundError(f"{str(run)!r} must hold a readable checkpoint, got none")
    bare = override(config, {"network.pretrained": False, "network.weights": ""})  # all comes from `saved`
    state = build_state(bare, len(dataset.classes), device)
    state.resume(saved)
    return evaluation.evaluate(
        state.assignment.eval(),
        evaluation_batches(dataset, config),
        config=config.evaluation,
        classes=dataset.classes,
        xi=float(state.thresholds.cam.value),
        aux_xi=float(state.thresholds.aux_cam.value),
        device=device,
    ).metrics
