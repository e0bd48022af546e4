"""`cosa-evaluate RUN`: judge again what a run left."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from cosa.cli.common import Parser, add_settings, add_traceback, changed_settings, complain
from cosa.cli.display import metrics_table
from cosa.config import Config, from_json, override


def main(prog: str, arguments: Sequence[str]) -> int:
    """What `cosa-evaluate` does; returns the exit code."""
    parser = Parser(
        prog=prog,
        usage=f"{prog} RUN [--evaluation.SETTING VALUE ...] [--data.SETTING VALUE ...]",
        description="Evaluate the assignment network of a run. Settings default to those of the run.",
        allow_abbrev=False,
    )
    parser.add_argument("run", type=Path, metavar="RUN", help="a run's folder, or one of its checkpoints")
    add_traceback(parser)
    add_settings(parser, Config(), frozenset({"data", "evaluation"}))
    given = parser.parse_known(arguments)
    run = given.run.absolute()
    folder = run if run.is_dir() else run.parent.parent
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(
            f"RUN must be a run's folder or a checkpoint in it, got {str(given.run)!r}; "
            f"{str(folder)!r} holds no config.json"
        )
    config = override(from_json((folder / "config.json").read_text()), changed_settings(given))
    print(metrics_table({"AN": _evaluated(config, run)}))
    return 0


def _evaluated(config: Config, run: Path) -> dict[str, float]:
    """Metrics of the assignment network that a run's folder or a checkpoint holds."""
    from cosa import checkpoint, evaluation
    from cosa.data.dataset import open_dataset
    from cosa.data.loader import evaluation_batches
    from cosa.ranks import Ranks
    from cosa.step import build_state

    device = Ranks.current().device
    dataset = open_dataset(config.data, config.data.val_split)
    saved = checkpoint.newest(run / "checkpoints", complain) if run.is_dir() else checkpoint.load(run)
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
