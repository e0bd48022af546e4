"""What SECURITY.md promises and no other file checks: harmless names, no secrets, tests for each promise."""

from __future__ import annotations

import re
import shlex
import subprocess
from pathlib import Path

import pytest

from cosa.config import Config
from cosa.distributed.session import TrialResources
from cosa.tracking import MlflowTracker, TrackingSpec, ui_hint
from sweeps.planning.plan import make_plan
from sweeps.reporting.forms import trial_filter
from sweeps.running.arguments import read_args
from sweeps.running.driver import main
from sweeps.tables import Arm, Table
from tests.cluster.reading import CLUSTER
from tests.reading import ROOT

HARMLESS = [
    "../../x",
    "a;touch pwned",
    "$(touch pwned)",
    "`touch pwned`",
    "it's",
    'a"b',
    "/abs/x",
    "-rf",
    "<b>",
]
UNSEEN = ["two\nlines", "red\x1b[31m", "nul\x00", "turned\u202eround"]


def test_every_promise_names_tests_that_exist() -> None:
    named = re.findall(r"`(tests/[\w/]+\.py)`", (ROOT / "SECURITY.md").read_text())

    assert len(named) >= 10
    assert [name for name in named if not (ROOT / name).is_file()] == []


@pytest.mark.parametrize("name", [*HARMLESS, *UNSEEN, "", "a b", "."])
def test_a_table_or_arm_has_no_name_that_means_something_elsewhere(name: str) -> None:
    full = Arm("full")
    with pytest.raises(ValueError, match="must have a name of letters, digits and") as table:
        Table(name=name, title="t", arms=(full,))
    with pytest.raises(ValueError, match="must have a name of letters, digits and") as arm:
        Table(name="t", title="t", arms=(full, Arm(name)))

    assert all(str(error.value).isprintable() for error in (table, arm))


@pytest.mark.parametrize("name", UNSEEN)
def test_a_name_that_cannot_be_shown_in_one_line_is_refused(
    name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    for flag in ("--experiment", "--out"):
        assert main("ablation", "", ("3a",), [flag, name, "--dry-run"]) == 2
        said = capsys.readouterr().err
        assert f"{flag} must be one line of visible characters" in said
        assert said.rstrip("\n").isprintable()
    with pytest.raises(ValueError, match="run name must be one line of visible characters"):
        TrackingSpec(uri="sqlite:///x.db", run_name=name)


@pytest.mark.parametrize("name", HARMLESS)
def test_a_sweep_called_so_stays_in_its_folder(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = tmp_path / "a" / "b" / "c"
    here.mkdir(parents=True)
    monkeypatch.chdir(here)
    args = read_args("ablation", "", ("3a",), [f"--out=runs/{name}", f"--experiment={name}"])

    assert args.out == Path(f"{here}/runs/{name}")
    assert args.experiment == name
    assert all(
        re.fullmatch(r"[\w.+=-]+", trial.name)
        for trial in make_plan(args.base, args.tables, args.seeds).trials
    )


def test_a_run_and_an_experiment_called_so_leave_nothing_outside(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = tmp_path / "a" / "b"
    place.mkdir(parents=True)
    monkeypatch.chdir(place)
    for number, name in enumerate(HARMLESS):
        out = place / f"run-{number}"
        out.mkdir()
        tracker = MlflowTracker(
            TrackingSpec(uri=f"sqlite:///{place / 'mlflow.db'}", experiment=name, run_name=name)
        )
        tracker.start(Config(), out=out)
        tracker.log_metrics({"train/loss/c2s": 1.0}, 1)
        tracker.finish()

    assert [path.name for path in tmp_path.iterdir()] == ["a"]
    assert [path.name for path in place.parent.iterdir()] == ["b"]
    left = {path.name for path in place.iterdir()} - {f"run-{n}" for n in range(len(HARMLESS))}
    assert {re.sub(r"^mlflow\.db.*", "mlflow.db", name) for name in left} <= {"mlflow.db", "mlartifacts"}


@pytest.mark.parametrize("name", HARMLESS)
def test_a_command_that_is_shown_can_be_pasted(name: str) -> None:
    command = ui_hint(f"sqlite:////tmp/{name.strip('/')}/mlflow.db")

    assert shlex.split(command)[-1].endswith("/mlflow.db")
    assert len(shlex.split(command)) == 4
    done = subprocess.run(
        ["bash", "-c", f"printf '%s\\n' {command}"], capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines() == shlex.split(command)


def test_a_folder_with_a_quote_in_its_name_is_still_found() -> None:
    assert trial_filter("it's").startswith('tags.cosa.sweep = "it\'s" and')
    assert trial_filter("plain").startswith("tags.cosa.sweep = 'plain' and")


def test_the_login_does_not_travel_with_what_everybody_on_a_cluster_can_see(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "somebody")
    for name in ("MLFLOW_TRACKING_PASSWORD", "MLFLOW_TRACKING_TOKEN"):
        monkeypatch.setenv(name, "hidden")
    sent = TrialResources().environment

    assert sent["MLFLOW_TRACKING_USERNAME"] == "somebody"
    assert "hidden" not in sent.values()


SECRET = re.compile(
    r"(?i)(password|secret_access_key|auth_token|api_key|token)[ \t]*[:=][ \t]*['\"]?[\w+/]{12,}"
)


def test_no_recipe_holds_a_secret() -> None:
    texts = {
        path: path.read_text() for path in CLUSTER.rglob("*") if path.is_file() and "my-" not in path.name
    }
    texts = {path: text for path, text in texts.items() if path.name != ".env"}
    found = [f"{path.name}: {hit[0]}" for path, text in texts.items() for hit in SECRET.finditer(text)]

    assert len(texts) >= 15
    assert found == []


def test_the_search_for_secrets_would_find_one() -> None:
    assert SECRET.search("  MLFLOW_TRACKING_PASSWORD: correcthorsebattery")
