"""A search from its command line to its report: what it refuses, and one on a real Ray that is killed."""

from __future__ import annotations

import csv
import os
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from cosa.config import from_json
from sweeps.planning.cost import Speed
from sweeps.tables.metrics import SEG_MIOU
from sweeps.tuning import driver
from sweeps.tuning.arguments import read_arguments
from sweeps.tuning.driver import main
from sweeps.tuning.study import JOURNAL, open_study

STUB = Path(__file__).with_name("stub_search.py")
NO_STORE = ("--tracking-uri", "sqlite:///nowhere/mlflow.db")
PATIENCE = 240  # seconds; a busy machine starts Ray slowly


def refused(capsys, *arguments):
    assert main(["--preset", "shapes", *arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("search: ")
    assert error.count("\n") == 1
    return error


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--trials", "0"), "--trials must be > 0, got 0; a search needs a budget"),
        (("--hours", "0"), "--hours must be > 0, got 0"),
        (("--gpu-hours", "-1"), "--gpu-hours must be > 0, got -1"),
        (("--trials", "many"), "argument --trials: invalid int value: 'many'"),
        (("--seeds", "3"), "--seeds must be 1 in a search, got 3; --confirm-seeds are those"),
        (("--confirm", "-1"), "--confirm must be >= 0, got -1"),
        (("--space", "nowhere.py"), "--space must name a file that exists, got 'nowhere.py'"),
        (("--preset", "shape"), "did you mean 'shapes'"),
        (("--set", "train.warmup=700"), "train.warmup must end before train.iterations = 700"),
        (("--set", "data.val_split="), "data.val_split must name a split with masks"),
        (("--tirals", "3"), "--tirals"),
    ],
)
def test_a_mistake_is_one_line(capsys, arguments, message):
    assert message in refused(capsys, *arguments)


def test_a_dry_run_shows_the_plan_and_makes_nothing(capsys, tmp_path):
    assert main(["--preset", "shapes", "--out", str(tmp_path / "new"), *NO_STORE, "--dry-run"]) == 0
    text = capsys.readouterr().out
    assert "csc.weight      [0.0125, 0.8] log" in text
    assert "stopped at 600 of 700 iterations" in text
    assert "at most 9,400 iterations" in text  # 400 + 30 x 300
    assert "4,800 iterations beyond the budget" in text  # 3 x (400 + 4 x 300)
    assert "first come 15 rows of the paper: full, no-DT" in text
    assert "hours: not known" in text
    assert "cosa-train shapes --" in text, "the command that measures them"
    assert not (tmp_path / "new").exists()


def test_a_dry_run_shows_the_plan_before_it_says_that_there_are_no_data(capsys, tmp_path):
    data = f"data.root={tmp_path}/none"
    assert main(["--preset", "voc", "--out", str(tmp_path), *NO_STORE, "--dry-run", "--set", data]) == 0
    printed = capsys.readouterr()
    assert "hours: not known" in printed.out
    assert printed.err == f"before training: data.root must be a folder that exists, got '{tmp_path}/none'\n"


@pytest.fixture
def begun(tmp_path):
    """The command line of a search that has finished one trial and runs another."""
    arguments = ["--preset", "shapes", "--out", str(tmp_path), *NO_STORE]
    args = read_arguments(arguments)
    study = open_study(tmp_path, args.space, args.base)
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


def test_hours_are_told_for_what_is_left_and_for_the_confirmation():
    speed = Speed(3.6, 3.6, 36.0, 1, "a machine", on_gpu=False)
    search, confirmation, _ = driver.costs(read_arguments(["--preset", "shapes"]), speed, done=10)
    # 400 + (30 - 10) 300 iterations of 0.001 h; 2 + 20 x 2 evaluations of 0.01 h
    assert "about 6.8 core-hours, evaluations 0.42 of them" in search
    # 3 x (400 + 4 x 300) iterations; 3 x (2 + 4 x 2) evaluations
    assert "about 5.1 core-hours, evaluations 0.3 of them" in confirmation


def test_a_budget_of_hours_is_told_what_one_trial_costs():
    speed = Speed(3.6, 3.6, 36.0, 1, "a machine", on_gpu=False)
    trial, *_ = driver.costs(read_arguments(["--preset", "shapes", "--hours", "2"]), speed, done=0)
    assert trial == "a trial that is not stopped: about 0.32 core-hours, evaluations 0.02 of them"


class Story:
    """One search, killed while its first trial is held, and started again."""

    def __init__(self, base, shapes_root):
        self.root = base / "search"
        self.control = base / "control"
        self.control.mkdir()
        self.uri = f"sqlite:///{base}/mlflow.db"
        self.arguments = [
            *("--out", str(self.root), "--tracking-uri", self.uri, "--retries", "0"),
            *("--max-concurrent", "2", "--cpus-per-trial", "0.5"),
            *("--trials", "8", "--confirm", "1", "--confirm-seeds", "2"),
            *("--set", f"data.root={shapes_root}", "train.iterations=12", "train.warmup=4"),
        ]
        self.output = ""

    def begin(self):
        environment = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
        with (self.control / "output.txt").open("w") as output:
            return subprocess.Popen(
                [sys.executable, str(STUB), str(self.control), *self.arguments],
                stdout=output,
                stderr=subprocess.STDOUT,
                env=environment | {"OMP_NUM_THREADS": "1"},
                start_new_session=True,
            )

    def run(self):
        (self.control / "hold").write_text("7")
        process = self.begin()
        deadline = time.monotonic() + PATIENCE
        try:
            while not list(self.root.glob("trials/*/held.txt")):
                assert process.poll() is None, (self.control / "output.txt").read_text()
                assert time.monotonic() < deadline, "no trial came to step 7"
                time.sleep(0.2)
            children = psutil.Process(process.pid).children(recursive=True)
            trainers = [p for p in children if "Agent" not in p.name()]
            process.kill()
            psutil.wait_procs(trainers, timeout=60)
            (self.control / "hold").unlink()
            process = self.begin()
            self.code = process.wait(PATIENCE)
        finally:
            if process.poll() is None:
                for child in psutil.Process(process.pid).children(recursive=True):
                    child.kill()
                process.kill()
        self.output = (self.control / "output.txt").read_text()
        with (self.root / "trials.csv").open() as file:
            self.rows = list(csv.DictReader(file))


@pytest.fixture(scope="module")
def story(tmp_path_factory, shapes_root):
    story = Story(tmp_path_factory.mktemp("search"), shapes_root)
    story.run()
    return story


@pytest.mark.slow
@pytest.mark.timeout(600)
class TestOnRay:
    """One story, looked at from all sides."""

    def test_it_ends_well_after_it_was_killed(self, story):
        assert story.code == 0, story.output

    def test_the_budget_is_kept_over_both_starts(self, story):
        assert [int(row["trial"]) for row in story.rows] == list(range(8))
        assert {row["state"] for row in story.rows} <= {"complete", "pruned"}

    def test_the_papers_rows_came_first(self, story):
        origins = [row["origin"] for row in story.rows]
        assert origins[:2] == ["full", "3b/no-DT"]
        assert set(origins[4:]) == {"TPE"}

    def test_a_trial_that_was_cut_went_on_from_its_checkpoint_and_no_other_started_twice(self, story):
        held = {path.parent for path in story.root.glob("trials/*/held.txt")}
        for path in story.root.glob("trials/*/starts.txt"):
            starts = [int(line) for line in path.read_text().split()]
            assert starts == ([4, 7] if path.parent in held else starts[:1]), path.parent.name

    def test_trials_far_from_the_optimum_were_stopped_and_good_ones_not(self, story):
        pruned = [float(row["at_8"]) for row in story.rows if row["state"] == "pruned"]
        finished = [float(row["at_8"]) for row in story.rows if row["state"] == "complete"]
        assert max(finished) > max(pruned, default=0.0)

    def test_every_trial_has_one_run_that_says_what_became_of_it(self, story):
        from mlflow import MlflowClient

        client = MlflowClient(story.uri)
        runs = client.search_runs(["1"], max_results=200)
        parent = next(run for run in runs if run.data.tags["cosa.kind"] == "search")
        assert parent.info.status == "FINISHED"
        children = [run for run in runs if "cosa.search.trial" in run.data.tags]
        assert sorted(int(run.data.tags["cosa.search.trial"]) for run in children) == list(range(8))
        for run in children:
            tags, row = run.data.tags, story.rows[int(run.data.tags["cosa.search.trial"])]
            assert tags["mlflow.parentRunId"] == parent.info.run_id
            assert tags["cosa.search.state"] == row["state"]
            assert ("cosa.search.pruned_at" in tags) is (row["state"] == "pruned")
            assert float(run.data.params["csc.weight"]) == pytest.approx(float(row["csc.weight"]))
            assert run.info.status == {"complete": "FINISHED", "pruned": "KILLED"}[row["state"]]
        kept = [item.path for item in client.list_artifacts(parent.info.run_id, "report")]
        assert {"report/search.html", "report/best.json", "report/trials.csv"} <= set(kept)

    def test_the_best_were_confirmed_with_fresh_seeds(self, story):
        folders = story.root.glob("trials/trial-seed[12]-*/result.json")
        confirmed = [int(path.parent.name.removeprefix("trial-seed").partition("-")[0]) for path in folders]
        assert sorted(confirmed) == [1, 1, 2, 2]
        assert "with 2 fresh seeds" in story.output

    def test_the_best_settings_are_a_config_that_can_be_read(self, story):
        best = from_json((story.root / "best.json").read_text())
        finished = [row for row in story.rows if row["state"] == "complete"]
        top = max(finished, key=lambda row: float(row["value"]))
        assert best.csc.weight == pytest.approx(float(top["csc.weight"]))
        assert best.evaluation.every == 200, "the preset's own"

    def test_the_page_stands_alone(self, story):
        page = (story.root / "search.html").read_text()
        assert "Trained again with fresh seeds" in page
        assert "http://" not in page.replace("http://www.w3.org", "")
        assert "<script" not in page

    def test_the_study_can_be_opened_by_others_and_names_its_metric(self, story):
        import optuna
        from optuna.storages import JournalStorage
        from optuna.storages.journal import JournalFileBackend

        storage = JournalStorage(JournalFileBackend(str(story.root / "study.journal")))
        study = optuna.load_study(study_name="search", storage=storage)
        assert study.metric_names == [SEG_MIOU]
        assert study.best_value == max(float(row["value"]) for row in story.rows if row["value"])
