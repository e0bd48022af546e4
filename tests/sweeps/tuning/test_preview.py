"""What a dry run of a search says, and that it leaves a study alone that another process may hold."""

from __future__ import annotations

import subprocess
import sys

import pytest

from sweeps.planning.cost import Sample, Speed
from sweeps.tuning import preview as search_preview
from sweeps.tuning.driver import main, read_request
from sweeps.tuning.study import JOURNAL, open_study

NO_STORE = ("--tracking-uri", "sqlite:///nowhere/mlflow.db")


@pytest.fixture
def begun(tmp_path):
    """The command line of a search that has finished one trial and runs another."""
    arguments = ["--preset", "shapes", "--out", str(tmp_path), *NO_STORE]
    request = read_request(arguments)
    study = open_study(tmp_path, request.space, request.base, seed=0)
    study.finish(study.ask().number, 0.5)
    study.ask()
    return arguments


def test_a_dry_run_says_what_was_begun_and_changes_nothing(begun, tmp_path, capsys):
    with (tmp_path / JOURNAL).open("a") as file:
        file.write('{"half a li')  # as the process that holds the study may just be writing
    before = (tmp_path / JOURNAL).read_bytes()
    assert main([*begun, "--dry-run"]) == 0
    assert "begun before: 2 trials (1 complete, 1 running)" in capsys.readouterr().out
    assert (tmp_path / JOURNAL).read_bytes() == before


@pytest.mark.parametrize("dry_run", [(), ("--dry-run",)])
def test_another_space_or_other_settings_are_refused_in_one_line_that_names_them(
    begun, tmp_path, capsys, dry_run
):
    space = tmp_path / "my_space.py"
    space.write_text(
        "from sweeps.tuning.space import Range, Space\nSPACE = Space(Range('csc.weight', 0.1, 0.2))\n"
    )
    assert main([*begun, *dry_run, "--space", str(space), "--set", "train.batch_size=6"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "csc.weight: [0.0125, 0.8] log -> [0.1, 0.2]" in error
    assert "csc.tau: [0.1, 2] log -> not varied" in error
    assert "train.batch_size: 12 -> 6" in error
    assert "choose another --out" in error


def test_another_process_reads_the_study_while_this_one_holds_it(begun, tmp_path):
    program = (
        "import sys, optuna\n"
        "from optuna.storages import JournalStorage\n"
        "from optuna.storages.journal import JournalFileBackend\n"
        "storage = JournalStorage(JournalFileBackend(sys.argv[1]))\n"
        "study = optuna.load_study(study_name='search', storage=storage)\n"
        "print([trial.state.name for trial in study.trials], study.best_value)\n"
    )
    output = subprocess.check_output(
        [sys.executable, "-W", "ignore", "-c", program, str(tmp_path / JOURNAL)], text=True
    )
    assert output.strip() == "['COMPLETE', 'RUNNING'] 0.5"


def test_hours_are_told_for_what_is_left_and_for_the_confirmation(monkeypatch, capsys, tmp_path):
    speed = Speed((Sample("both", 3.6, 36.0),), "a machine", on_gpu=False)
    monkeypatch.setattr(search_preview, "may_answer", lambda _: True)
    monkeypatch.setattr(search_preview, "_show_earlier", lambda _: 10)
    monkeypatch.setattr(search_preview, "_speed", lambda _: speed)
    assert main(["--preset", "shapes", "--out", str(tmp_path), *NO_STORE, "--dry-run"]) == 0
    text = capsys.readouterr().out
    # 400 + (30 - 10) 300 iterations of 0.001 h; 2 + 20 x 2 evaluations of 0.01 h
    assert "the search, if no trial is stopped: about 6.8 core-hours, evaluations 0.42 of them" in text
    # 3 x (400 + 4 x 300) iterations; 3 x (2 + 4 x 2) evaluations
    assert "the confirmation: about 5.1 core-hours, evaluations 0.3 of them" in text


def test_a_budget_of_hours_is_told_what_one_trial_costs(monkeypatch, capsys, tmp_path):
    speed = Speed((Sample("both", 3.6, 36.0),), "a machine", on_gpu=False)
    monkeypatch.setattr(search_preview, "may_answer", lambda _: True)
    monkeypatch.setattr(search_preview, "_show_earlier", lambda _: 0)
    monkeypatch.setattr(search_preview, "_speed", lambda _: speed)
    assert main(["--preset", "shapes", "--out", str(tmp_path), *NO_STORE, "--hours", "2", "--dry-run"]) == 0
    assert "a trial that is not stopped: about 0.32 core-hours" in capsys.readouterr().out
