"""A sweep that commit 25ac2bd left in its second trial goes on, and ends as if nobody had stopped it."""

from __future__ import annotations

import csv
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.frozen import recipe

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


@dataclass(frozen=True)
class Story:
    """The sweep's folder and store, and what stood in its trials' folders before it went on."""

    folder: Path
    before: Path
    """A copy of the trials' folders as the old code left them."""
    printed: str

    def states(self) -> Mapping[str, str]:
        """What each trial was when the sweep stopped: finished, begun or missing."""
        found = {}
        for now in sorted((self.folder / "sweep/trials").iterdir()):
            then = self.before / now.name
            done = (then / "result.json").is_file()
            found[now.name] = "finished" if done else "begun" if then.is_dir() else "missing"
        return found

    def of(self, state: str) -> list[str]:
        """Names of the trials of a state."""
        return [name for name, found in self.states().items() if found == state]


@pytest.fixture(scope="module")
def story(tmp_path_factory: pytest.TempPathFactory) -> Story:
    """The kept sweep, copied and run to its end by its own command."""
    folder = recipe.roomy(tmp_path_factory.mktemp("f"))
    recipe.unpack(recipe.DATA / "interrupted_sweep.tar.gz", folder)
    before = tmp_path_factory.mktemp("before") / "trials"
    shutil.copytree(folder / "sweep/trials", before)
    recipe.write_data(folder)
    command = recipe.sweep_command(
        folder, "sweep", recipe.SWEEP_TABLES, recipe.SWEEP_SETTINGS, "--max-concurrent", "1"
    )
    return Story(folder, before, recipe.finish(command, folder))


def test_it_was_stopped_between_finished_begun_and_missing_trials(story: Story) -> None:
    assert [name.partition("-")[0] for name in story.of("finished")] == ["trial", "warmup"]
    assert len(story.of("begun")) == 1
    assert len(story.of("missing")) == 3
    assert "4 trials to run" in story.printed


def test_what_was_finished_is_not_touched(story: Story) -> None:
    for name in story.of("finished"):
        for file in ("journal.jsonl", "result.json", "log.txt"):
            then, now = story.before / name / file, story.folder / "sweep/trials" / name / file
            assert then.is_file() == now.is_file(), f"{name}/{file}"
            assert not now.is_file() or now.read_bytes() == then.read_bytes(), f"{name}/{file}"


def test_what_was_begun_goes_on_from_its_own_checkpoint(story: Story) -> None:
    (name,) = story.of("begun")
    then = (story.before / name / "journal.jsonl").read_text().splitlines()
    now = (story.folder / "sweep/trials" / name / "journal.jsonl").read_text().splitlines()

    assert now[: len(then)] == then  # times included: none of these steps was trained again
    assert len(now) > len(then)


def test_every_step_is_in_the_store_once(story: Story) -> None:
    for name, steps in recipe.steps_in_store(story.folder).items():
        assert steps == sorted(set(steps)), name


def test_its_tables_are_those_of_the_sweep_that_nobody_stopped(story: Story) -> None:
    then, now = _rows(recipe.DATA / "sweep_tables.csv"), _rows(story.folder / "sweep/tables.csv")

    assert len(then) == 6
    assert [(row["arm"], row["missing"]) for row in now] == [(row["arm"], row["missing"]) for row in then]
    if recipe.made_on() != recipe.read("training.json")["made on"]:
        pytest.skip("all rows are there; no cells compared: the fixture's platform is another")
    assert now == then


def _rows(path: Path) -> list[dict[str, str]]:
    """A table but for the ids of the runs, which two sweeps never share."""
    with path.open() as file:
        return [{key: value for key, value in row.items() if key != "runs"} for row in csv.DictReader(file)]


def test_its_runs_have_the_names_that_they_had(story: Story) -> None:
    found = recipe.without_newer(recipe.names_in_store(story.folder), tag="mlflow.source.name")
    assert found == recipe.read("names_sweep.json")
