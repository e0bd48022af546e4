"""The command line of a sweep: what it plans, where it writes, and one line for each mistake."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from cosa.config import identity, warmup_identity
from cosa.config.presets import PRESETS
from cosa.distributed.session import Slots
from cosa.storage.files import lock
from cosa.tracking import costs
from sweeps.planning import folder as folders
from sweeps.planning.plan import make_plan, to_json
from sweeps.running import driver
from sweeps.running.arguments import read_args
from sweeps.running.driver import main
from sweeps.tables import tables

ROOT = Path(__file__).parents[3]
TABLES = ("3a", "3b")


def given(*arguments):
    return read_args("ablation", "", TABLES, arguments)


def planned(*arguments):
    args = given(*arguments)
    return make_plan(args.base, args.tables, args.seeds)


def run(*arguments):
    return main("ablation", "", TABLES, arguments)


@pytest.fixture(autouse=True)
def no_store_of_the_users(monkeypatch, tmp_path):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (
            ["--preset", "shpaes"],
            f"preset must be one of {', '.join(PRESETS)}, got 'shpaes'; did you mean 'shapes'?",
        ),
        (
            ["--tables", "3a", "3aa"],
            f"table must be one of {', '.join(tables())}, all, or a file of your own such as my_table.py",
        ),
        (
            ["--set", "csc.wieght=1"],
            "setting must be one that exists, got 'csc.wieght'; did you mean 'csc.weight'?",
        ),
        (["--tables", "3a", "mine.py"], "table file must exist, got 'mine.py'"),
        (
            ["--tables", "fig9", "--set", "threshold.xi=0.1"],
            "arm fig9/xi-0.15: threshold.xi must lie in (0, 1), got -0.05",
        ),
        (["--set", "csc.weight=-1"], "csc.weight must be finite and >= 0, got -1.0"),
        (["--set", "csc.weight=much"], "csc.weight must be a number, got 'much'"),
        (["--set", "csc.weight"], "--set must be NAME=VALUE, got 'csc.weight'"),
        (["--seeds", "0"], "--seeds must be >= 1, got 0"),
        (["--seeds", "two"], "argument --seeds: invalid int value: 'two'; see sweeps/ablation.py --help"),
        (["--retries", "-1"], "--retries must be >= 0, got -1"),
        (["--max-concurrent", "0"], "--max-concurrent must be >= 1, got 0"),
        (["--tabels", "3a"], "unrecognized arguments: --tabels 3a; see sweeps/ablation.py --help"),
        (["--tracking-uri", "runs"], "tracking URI must start with sqlite:///"),
        (["--out", "s3://bucket/sweep"], "--out of a sweep must be a folder that all of its machines reach"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(arguments, line, capsys):
    assert run(*arguments) == 2
    printed = capsys.readouterr()
    assert printed.err.startswith(f"ablation: {line}")
    assert printed.err.count("\n") == 1
    assert printed.out == ""


def test_a_dry_run_shows_the_plan_and_writes_nothing(capsys, tmp_path):
    assert run("--dry-run", "--seeds", "3", "--out", "sweep") == 0
    assert "39 rows, 33 distinct trials, 3 shared warm-ups" in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("preset", PRESETS)
def test_all_tables_of_every_preset_cost_at_most_60_percent_of_their_rows(preset):
    plan = planned("--preset", preset, "--tables", "all")
    assert len(plan.tables) == len(tables())
    assert plan.iterations <= 0.6 * plan.row_iterations


def test_a_table_that_asks_for_training_images_says_what_it_needs(capsys):
    arguments = ["--preset", "voc", "--dry-run", "--set", "evaluation.train_split="]
    assert run(*arguments, "--tables", "3a", "4a") == 0
    assert "table 4a shows CPL of training images: its cells stay empty" in capsys.readouterr().out
    assert run(*arguments[:-1], "evaluation.train_split=train", "--tables", "4a") == 0
    assert "stay empty" not in capsys.readouterr().out


def test_the_plan_names_its_oracles(capsys):
    assert run("--dry-run", "--tables", "4a") == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if "(oracle" in line]
    assert [line.partition(",")[0].split()[-1] for line in lines] == ["GT"]


def test_a_dry_run_marks_what_is_finished(capsys, tmp_path):
    trial = planned().trials[1]
    folder = folders.trial_folder(tmp_path / "sweep", trial.name)
    folder.mkdir(parents=True)
    result = {"identity": identity(trial.config), "step": trial.last_step}
    (folder / "result.json").write_text(json.dumps(result))
    assert run("--dry-run", "--out", "sweep") == 0
    assert "3a/Base  finished" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("slots", "gib", "line"),
    [
        (Slots(1.0, 0.25, 8, 80.0), 15.0, "8 at a time, 4 on a GPU: 4 of 15.0 GiB (so)"),
        (Slots(1.0, 1.0, 2), None, "2 at a time, a GPU each: memory of a trial so"),
        (Slots(1.0, 1.0, 2), 15.0, "2 at a time, a GPU each: the GPUs' memory is not known"),
        (Slots(1.0, 0.0, 2), 15.0, "2 at a time, on CPUs as many as fit"),
    ],
)
def test_auto_says_what_it_chose_and_why(slots, gib, line, monkeypatch, capsys):
    given = []

    @contextlib.contextmanager
    def trial_slots(resources, gib=None):
        given.append(gib)
        yield slots

    monkeypatch.setattr(driver, "trial_slots", trial_slots)
    monkeypatch.setattr(costs, "expected_gib", lambda *_: (gib, "so"))
    args = read_args("ablation", "", ("3a",), ["--preset", "shapes", "--max-concurrent", "auto"])
    with driver.slots_for(args, [args.base, args.base]) as found:
        assert found is slots
    assert given == [gib]
    assert capsys.readouterr().out.startswith(f"--max-concurrent auto: {line}")


@pytest.mark.parametrize(("gpus", "said"), [(0.0, 1), (1.0, 0)])
def test_a_sweep_on_cpus_says_once_that_its_bf16_is_emulated(gpus, said, monkeypatch, capsys):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    monkeypatch.setattr(driver, "trial_slots", lambda *_: contextlib.nullcontext(Slots(1.0, gpus, 2)))
    args = read_args("ablation", "", ("3a",), ["--preset", "shapes", "--set", "train.precision=bf16"])
    with driver.slots_for(args, [args.base, args.base]):
        pass
    assert capsys.readouterr().out.count("bf16 is emulated on this cpu, many times slower") == said


def test_a_dry_run_says_how_to_measure_what_nobody_has(capsys):
    assert run("--dry-run") == 0
    assert "hours: not known, no finished run of this network, crop and batch" in capsys.readouterr().out


@pytest.mark.parametrize("preset", PRESETS)
def test_the_measuring_run_is_a_valid_one_that_trains_the_same_network(preset, capsys):
    from cosa.cli.common import changed_settings
    from cosa.cli.training import _training_parser
    from cosa.config import override
    from cosa.config.presets import get_preset

    assert run("--dry-run", "--preset", preset, "--set", "data.crop_size=48", "cam.scales=1,0.5") == 0
    command = capsys.readouterr().out.splitlines()[-1].split()
    assert command[:2] == ["cosa-train", preset]
    given = _training_parser("cosa-train", preset, PRESETS).parse_known(command[1:])
    config = override(get_preset(preset), changed_settings(given))
    assert (config.data.crop_size, config.cam.scales, config.train.iterations) == (48, (1.0, 0.5), 40)
    assert config.network == get_preset(preset).network


def test_a_dry_run_goes_on_without_a_store_that_answers(capsys, monkeypatch):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    assert run("--dry-run", "--tracking-uri", "http://127.0.0.1:9") == 0
    printed = capsys.readouterr()
    assert "tracking store must answer, got none from http://127.0.0.1:9" in printed.err
    assert "hours: not known" in printed.out


def test_a_dry_run_shows_the_plan_before_it_says_what_the_data_lack(capsys, tmp_path):
    for folder in ("JPEGImages", "ImageSets/Segmentation"):
        (tmp_path / "voc" / folder).mkdir(parents=True)
    (tmp_path / "voc/JPEGImages/2007_000032.jpg").touch()
    arguments = ["--preset", "voc", "--dry-run", "--set", f"data.root={tmp_path}/voc"]
    assert run(*arguments) == 0
    printed = capsys.readouterr()
    assert "13 rows, 11 distinct trials, 1 shared warm-up" in printed.out
    assert "hours: not known" in printed.out
    assert printed.err.startswith("before training: ")
    assert "train_aug" in printed.err
    assert printed.err.count("\n") == 1
    assert run(*(a for a in arguments if a != "--dry-run")) == 2


def test_a_dry_run_says_that_there_are_no_data_unless_the_sweep_writes_them(capsys, tmp_path):
    assert run("--preset", "voc", "--dry-run", "--set", f"data.root={tmp_path}/none") == 0
    printed = capsys.readouterr()
    assert printed.err == (
        f"before training: data.root must be a folder that exists, got '{tmp_path}/none'\n"
    )
    assert run("--dry-run", "--set", f"data.root={tmp_path}/none") == 0
    assert capsys.readouterr().err == ""
    assert not (tmp_path / "none").exists()


def test_a_dry_run_waits_for_no_heavy_import():
    program = (
        "import sys; from sweeps.running.driver import main; "
        "main('ablation', '', ('3a',), ['--dry-run', '--tracking-uri', 'sqlite:////none/mlflow.db']); "
        "print(*sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    assert not {"torch", "ray", "mlflow", "numpy"} & set(done.stdout.split())


@pytest.mark.parametrize("script", ["ablation.py", "hyperparameters.py", "report.py"])
def test_the_scripts_run_from_anywhere(script, tmp_path):
    command = [sys.executable, str(ROOT / "sweeps" / script), "--help"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert f"usage: sweeps/{script}" in done.stdout


def test_settings_change_every_arm_but_an_arms_own_changes_win():
    plan = planned("--set", "csc.weight=0.2", "c2s.weight=0.3")
    trials = {trial.arm: trial.config for trial in plan.trials}
    assert (trials["full"].csc.weight, trials["no-CSC"].csc.weight) == (0.2, 0.0)
    assert {config.c2s.weight for arm, config in trials.items() if arm != "warm-up"} == {0.3}


def test_seeds_count_up_from_the_presets_own():
    assert given("--seeds", "2", "--set", "train.seed=5").seeds == range(5, 7)


def test_every_path_is_absolute(tmp_path):
    found = given("--preset", "voc", "--set", "network.weights=vit.pth", "network.pretrained=false")
    assert found.out == tmp_path / "runs" / "ablation-voc"
    assert found.uri == f"sqlite:///{tmp_path}/runs/mlflow.db"
    assert found.base.network.weights == str(tmp_path / "vit.pth")
    assert Path(found.base.data.root).is_absolute()


def test_a_ray_jobs_outputs_outlive_its_folder(tmp_path, monkeypatch):
    copied = tmp_path / "runtime_resources" / "working_dir_files" / "_ray_pkg_1"
    copied.mkdir(parents=True)
    monkeypatch.chdir(copied)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    found = given("--out", "sweep")
    assert found.out == tmp_path / "home" / "cosa" / "sweep"
    assert found.base.data.root == str(tmp_path / "home" / "cosa" / "data" / "shapes")


def test_the_users_store_is_taken_from_the_environment(monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:5000")
    assert given().uri == "http://127.0.0.1:5000"


def test_other_settings_in_the_same_folder_are_refused_with_the_difference(tmp_path, capsys):
    plan = planned("--out", "sweep")
    (tmp_path / "sweep").mkdir()
    (tmp_path / "sweep" / "plan.json").write_text(to_json(plan))
    assert run("--out", "sweep", "--dry-run", "--set", "csc.tau=0.2") == 2
    error = capsys.readouterr().err
    assert "got csc.tau 0.5 -> 0.2; go on with the old ones, or begin another sweep" in error
    assert error.count("\n") == 1
    assert run("--out", "sweep", "--dry-run", "--seeds", "2", "--tables", "3a", "5a") == 0


def test_two_drivers_never_run_the_same_sweep(tmp_path, capsys):
    with lock(tmp_path / "sweep" / ".lock"):
        assert run("--out", "sweep") == 2
    error = capsys.readouterr().err
    assert error.startswith("ablation: folder must not be in use, got")
    assert error.count("\n") == 1


def test_a_missing_data_folder_is_one_line_before_anything_is_started(tmp_path, capsys):
    assert run("--preset", "voc", "--set", f"data.root={tmp_path}/none") == 2
    error = capsys.readouterr().err
    assert str(tmp_path / "none") in error
    assert error.count("\n") == 1
    assert not (tmp_path / "runs" / "mlflow.db").exists()


@pytest.mark.parametrize("name", ["data_fingerprint", "val_fingerprint"])
def test_other_data_than_the_finished_trials_saw_is_refused(name, tmp_path, capsys, shapes_root):
    arguments = ["--out", "sweep", "--set", f"data.root={shapes_root}"]
    trial = planned(*arguments).trials[1]
    folder = folders.trial_folder(tmp_path / "sweep", trial.name)
    folder.mkdir(parents=True)
    result = {
        "identity": identity(trial.config),
        "warmup_identity": warmup_identity(trial.config),
        "step": trial.last_step,
        name: "other",
    }
    (folder / "result.json").write_text(json.dumps(result))
    assert run(*arguments) == 2
    assert "instead of other (Base, seed 0)" in capsys.readouterr().err
