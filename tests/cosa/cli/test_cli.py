"""The commands as a user meets them: what they print, what they refuse, and with which exit code."""

from __future__ import annotations

import errno
import json
import logging
import re
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from mlflow import MlflowClient

import cosa.training.trainer
from cosa import cli
from cosa.cli import common, console, training
from cosa.config import Config, fields, flatten, override
from cosa.config.presets import PRESETS, get_preset
from cosa.networks.published import pinned
from cosa.tracking import initialise_store
from cosa.training.trainer import NonFiniteLossError, RunSpec
from sweeps import report
from sweeps.running.arguments import read_args


@pytest.fixture(autouse=True)
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Commands write below the working folder and read these variables."""
    monkeypatch.setenv("COLUMNS", "1000")
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)


@pytest.fixture
def tiny_flags(tiny_config: Config) -> list[str]:
    """A run of a second or so, as flags on the `shapes` preset."""
    preset = flatten(get_preset("shapes"))
    changes = {name: value for name, value in flatten(tiny_config).items() if value != preset[name]}
    return [f"--{name}={common.as_text(value)}" for name, value in changes.items()]


def _help(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """What `--help` prints, with its line breaks undone."""
    with pytest.raises(SystemExit) as ended:
        cli.train([*arguments, "--help"])
    assert ended.value.code == 0
    return " ".join(capsys.readouterr().out.split())


def test_help_explains_every_setting(capsys: pytest.CaptureFixture[str]) -> None:
    text = _help(capsys)

    for name, setting in fields().items():
        assert f"--{name} " in text
        assert " ".join((setting.description or "").split()) in text


def test_help_shows_the_defaults_of_the_chosen_preset(capsys: pytest.CaptureFixture[str]) -> None:
    size = get_preset("shapes").data.crop_size
    assert size != Config().data.crop_size

    assert f"the patch size. [whole number; default {size}]" in _help(capsys, "shapes")


def test_help_lists_the_presets(capsys: pytest.CaptureFixture[str]) -> None:
    text = _help(capsys)

    for name in PRESETS:
        assert f" {name} " in text


def test_the_experiment_is_that_of_mlflows_variable(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "mine")
    shown = training._training_parser("cosa-train", None, PRESETS)
    assert shown.parse_known(["shapes"]).experiment == "mine"
    assert shown.parse_known(["shapes", "--experiment", "other"]).experiment == "other"
    assert read_args("ablation", "", (), ["--tables", "3b"]).experiment == "mine"

    initialise_store("sqlite:///mlflow.db", "cosa")
    assert report.main(["--tracking-uri", "sqlite:///mlflow.db"]) == cli.MISTAKE
    client = MlflowClient("sqlite:///mlflow.db")
    assert {experiment.name for experiment in client.search_experiments()} >= {"cosa", "mine"}


def _refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The one line that a mistake ends in."""
    assert cli.train(arguments) == cli.MISTAKE
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 1
    assert captured.err.startswith("cosa-train: error: ")
    return captured.err


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([], "PRESET is missing"),
        (["shape"], "did you mean 'shapes'?"),
        (["shapes", "--csc.weigth", "0.2"], "got '--csc.weigth'; did you mean '--csc.weight'?"),
        (["shapes", "--csc.weigth=0.2"], "did you mean '--csc.weight'?"),
        (["shapes", "--worker", "2"], "did you mean '--workers'?"),
        (["shapes", "more"], "got 'more'"),
        (["shapes", "--csc.weight", "much"], "csc.weight must be a number, got 'much'"),
        (["shapes", "--csc.weight", "-1"], "csc.weight must be finite and >= 0, got -1"),
        (["shapes", "--raw.enabled", "maybe"], "raw.enabled must be true or false, got 'maybe'"),
        (["shapes", "--workers", "-1"], "must be a whole number >= 0, got '-1'"),
        (["shapes", "--out"], "argument --out: expected one argument"),
        (["shapes", "--tracking-uri", "mlruns"], "tracking URI must start with"),
        (["voc", "--data.root", "nowhere"], "'nowhere'"),
        (["shapes", "--tracking-uri", "none", "--out", "file/run"], "file/run"),
        (["shapes", "--tracking-uri", "none", "--evaluation.crf", "true"], 'pip install "cosa-wsss[crf]"'),
    ],
)
def test_a_mistake_ends_in_one_line_that_says_what_to_do(
    arguments: list[str],
    says: str,
    capsys: pytest.CaptureFixture[str],
    tiny_flags: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "pydensecrf", None)
    Path("file").touch()
    flags = tiny_flags if arguments[-1:] == ["file/run"] else []

    assert says in _refused(capsys, *arguments, *flags)


def test_the_traceback_is_there_for_the_asking() -> None:
    with pytest.raises(ValueError, match=r"csc\.weight"):
        cli.train(["shapes", "--csc.weight", "-1", "--traceback"])


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (NonFiniteLossError("loss term 'csc' must stay finite"), cli.FAILED),
        (RuntimeError("CUDA out of memory\nof a card"), cli.FAILED),
        (OSError(errno.ENOSPC, "cannot write 'x': No space left on device"), cli.MISTAKE),
        (PermissionError(errno.EACCES, "cannot write 'x'"), cli.MISTAKE),
        (KeyboardInterrupt(), cli.INTERRUPTED),
    ],
)
def test_the_exit_code_tells_mistakes_failures_and_interruptions_apart(
    error: BaseException, code: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: object, **kwargs: object) -> None:
        raise error

    monkeypatch.setattr(cosa.training.trainer, "train", fail)

    assert cli.train(["shapes", "--tracking-uri", "none"]) == code
    assert capsys.readouterr().err.count("\n") == 1


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> Callable[..., RunSpec]:
    """Run the command up to the trainer and return what it asked the trainer for."""

    def ask(*arguments: str) -> RunSpec:
        found = []

        def note(spec: RunSpec, **_: object) -> None:
            found.append(spec)
            raise KeyboardInterrupt

        monkeypatch.setattr(cosa.training.trainer, "train", note)
        monkeypatch.setattr(training, "initialise_store", lambda *_: "0")
        assert cli.train(arguments) == cli.INTERRUPTED
        return found[0]

    return ask


def test_flags_change_settings_of_the_preset(asked: Callable[..., RunSpec]) -> None:
    config = asked("shapes", "--csc.weight", "0.2", "--cam.scales", "1,0.5", "--raw.enabled", "no").config

    expected = {"csc.weight": 0.2, "cam.scales": (1.0, 0.5), "raw.enabled": False}
    assert config == pinned(override(get_preset("shapes"), expected))


def test_another_experiment_gets_another_folder(asked: Callable[..., RunSpec]) -> None:
    folders = {asked("shapes", *flags).storage.folder.name for flags in ([], ["--csc.weight", "0.2"])}

    assert len(folders) == 2
    assert all(re.fullmatch("shapes-[0-9a-f]{8}", name) for name in folders)


def test_a_dry_run_tells_schedule_weights_and_what_a_gpu_needs_and_writes_nothing(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert cli.train(["voc", "--dry-run"]) == 0
    one = capsys.readouterr().out
    assert cli.train(["voc", "--dry-run", "--workers", "2", "--out", "s3://bucket/run"]) == 0
    two = capsys.readouterr().out

    assert "weights     vit_base_patch16_224.orig_in21k_ft_in1k\n" in one
    assert "20,000 steps of 4 images, 80,000 seen; warm-up 6,000, co-training 14,000\n" in one
    assert "parameters  92.2 million\n" in one
    assert "GPU memory  46.3 GiB, at most: the paper" in one
    assert "GPU memory  24.0 GiB, at most: the paper" in two
    assert "GPU, 24 GB  needs --train.accumulate 2, for the same batches" in one
    assert "speed       not known: none like it has finished in sqlite:///" in one
    assert "s3://bucket/run" in two
    assert "GPU, 24 GB  enough" in two
    assert not [*tmp_path.iterdir()]


def test_a_dry_run_refuses_a_batch_that_does_not_divide(capsys: pytest.CaptureFixture[str]) -> None:
    law = "train.batch_size must be a multiple of workers x train.accumulate = 3, got 4"

    assert law in _refused(capsys, "voc", "--dry-run", "--workers", "3")


def test_the_same_experiment_keeps_its_folder(asked: Callable[..., RunSpec], tmp_path: Path) -> None:
    first, second = asked("shapes"), asked("shapes", "--train.log_every", "7")

    assert first.storage.folder == second.storage.folder
    assert first.storage.folder.parent == tmp_path / "runs"


def test_runs_are_tracked_beside_their_folders_by_default(
    asked: Callable[..., RunSpec], tmp_path: Path
) -> None:
    assert asked("shapes").tracking.uri == f"sqlite:///{tmp_path}/runs/mlflow.db"


def test_the_tracking_uri_of_the_environment_counts_unless_a_flag_says_otherwise(
    asked: Callable[..., RunSpec], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://there:5000")

    assert asked("shapes").tracking.uri == "http://there:5000"
    assert asked("shapes", "--tracking-uri", "http://here:1").tracking.uri == "http://here:1"


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A store for all runs of this file: its first migration takes seconds."""
    found = f"sqlite:///{tmp_path_factory.mktemp('store')}/mlflow.db"
    initialise_store(found, "cosa")
    return found


@pytest.fixture
def command(tiny_flags: list[str], store: str) -> list[str]:
    """A run of two steps in the folder `run`."""
    return ["shapes", "--out", "run", "--tracking-uri", store, *tiny_flags]


@pytest.fixture
def finished(command: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """What `command` printed of its whole run."""
    assert cli.train(command) == 0
    return capsys.readouterr().out


def test_a_run_ends_with_its_metrics_its_checkpoint_and_its_tracked_run(
    finished: str, store: str, tmp_path: Path
) -> None:
    run_id = json.loads((tmp_path / "run" / "run.json").read_text())["run_id"]

    assert "label-free protocol" in finished
    assert "labelled protocol" in finished
    assert f"checkpoint  {tmp_path}/run/checkpoints/step_00000002.pt" in finished
    assert f"MLflow run  {run_id}" in finished
    assert f"mlflow ui --backend-store-uri {store}" in finished


def test_a_command_leaves_the_logger_of_its_process_as_it_was(finished: str) -> None:
    logger = logging.getLogger("cosa")

    assert logger.propagate
    assert not any(isinstance(handler, console.Display) for handler in logger.handlers)


def test_a_run_shows_its_progress_on_plain_lines(finished: str) -> None:
    steps = [line for line in finished.splitlines() if line.startswith("step ")]

    assert steps[0].startswith("step 1/2 | ")
    assert re.search(r"loss \d\.\d+: cls \d\.\d+ aux_cls \d\.\d+$", steps[0])
    assert "\x1b" not in finished


def test_the_same_command_again_repeats_nothing(
    finished: str, command: list[str], store: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    run_id = json.loads((tmp_path / "run" / "run.json").read_text())["run_id"]

    assert cli.train(command) == 0

    again = capsys.readouterr().out
    assert again[again.index("percent") :] == finished[finished.index("percent") :]
    losses = MlflowClient(store).get_metric_history(run_id, "train/loss/total")
    assert [point.step for point in losses] == [1, 2]


def test_a_folder_of_another_run_is_refused_with_the_difference(
    finished: str, command: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    refused = _refused(capsys, *command, "--csc.weight", "0.7")

    assert "csc.weight 0.1 -> 0.7" in refused


def test_evaluating_a_run_again_gives_its_metrics(
    finished: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert cli.evaluate(["run"]) == 0

    table = capsys.readouterr().out
    metrics = json.loads((tmp_path / "run" / "result.json").read_text())["metrics"]
    for name in ("seg_miou", "seg_miou_labelled", "cpl_miou", "cpl_miou_own"):
        assert re.search(rf" {100 * metrics[f'val/assignment/{name}']:.2f}   {name}$", table, re.MULTILINE)


def test_evaluation_takes_a_checkpoint_and_other_settings(
    finished: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.evaluate(["run/checkpoints/step_00000001.pt", "--evaluation.xi", "0.4"]) == 0
    assert "seg_miou_labelled" in capsys.readouterr().out


def test_evaluating_what_is_no_run_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.evaluate(["nowhere"]) == cli.MISTAKE
    assert "got 'nowhere'; there is no such file or folder" in capsys.readouterr().err
