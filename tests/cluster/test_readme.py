"""The page of `cluster/` is true: what it names exists, its commands are accepted by their parsers."""

from __future__ import annotations

import re
import shlex
import sys
from pathlib import Path

import click
import pytest
from ray.dashboard.modules.job.cli import job_cli_group
from ray.scripts.scripts import cli

from sweeps.running.arguments import read_args
from tests.cluster.reading import CLUSTER, KUBERNETES, commands, documents, strings
from tests.reading import ROOT

PAGE = CLUSTER / "README.md"
TEXT = PAGE.read_text()
LINES = commands(PAGE)
MADE = {"cluster/my-aws.yaml", "cluster/my-gcp.yaml", "cluster/tracking/.env"}
"""Files that a command of the page makes."""


def parts() -> list[list[str]]:
    """Each simple command of the page, as words."""
    found = []
    for line in LINES:
        for part in re.split(r"\s(?:&&|\||&|2>&1)(?:\s|$)", line):
            words = shlex.split(part.split(" > ")[0].replace("$(", "").replace(")", ""))
            while words and (re.fullmatch(r"[A-Z_]+=\S*", words[0]) or words[0] in {"export", "nohup", "."}):
                words = words[1:]
            if words:
                found.append(words)
    return found


PARTS = parts()


def sweeps() -> list[list[str]]:
    """Arguments of every sweep on the page and in the recipes."""
    texts = [" ".join(words) for words in PARTS]
    texts += [text for path in KUBERNETES for content in documents(path) for text in strings(content)]
    return [
        shlex.split(text.partition("sweeps/ablation.py")[2].replace("git rev-parse HEAD", "0123abc"))
        for text in texts
        if "sweeps/ablation.py" in text
    ]


def test_the_page_shows_sweeps_on_every_kind_of_cluster() -> None:
    assert len(sweeps()) >= 6


@pytest.mark.parametrize("arguments", sweeps(), ids=lambda arguments: " ".join(arguments)[:60])
def test_a_sweep_is_what_the_script_accepts(
    arguments: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    args = read_args("ablation", "", ("3a", "3b"), [a for a in arguments if a != "--dry-run"])

    assert {table.name for table in args.tables} == {"3a", "3b"}


def options(command: click.Command, words: list[str]) -> set[str]:
    """Flags among `words` that the command does not have."""
    known = {name for item in command.params for name in (*item.opts, *item.secondary_opts)}
    return {word.partition("=")[0] for word in words if word.startswith("-")} - known


def ray_commands() -> list[list[str]]:
    return [words for words in PARTS if words[0] == "ray"]


def test_the_page_names_every_ray_command_that_it_needs() -> None:
    used = {" ".join(words[1:3]) if words[1] == "job" else words[1] for words in ray_commands()}

    assert {"up", "down", "dashboard", "start", "rsync-down"} <= used
    assert {"job submit", "job logs", "job status", "job stop"} <= used


@pytest.mark.parametrize("words", ray_commands(), ids=" ".join)
def test_a_ray_command_has_only_flags_that_ray_knows(words: list[str]) -> None:
    name, rest = words[1], words[2:]
    group: click.Group = cli
    if name == "job":
        group, name, rest = job_cli_group, rest[0], rest[1:]
    if "--" in rest:
        rest = rest[: rest.index("--")]

    assert name in group.commands
    assert options(group.commands[name], rest) == set()


def test_every_file_that_a_command_names_exists() -> None:
    words = {word for words in PARTS for word in words}
    named = {word for word in words if re.match(r"(cluster|sweeps)/", word)} - MADE

    assert {"cluster/aws-setup.sh", "cluster/slurm.sh", "cluster/kubernetes/rayjob.yaml"} <= named
    assert [name for name in sorted(named) if not (ROOT / name).is_file()] == []


def test_every_file_that_the_text_names_exists() -> None:
    named = set(re.findall(r"`((?:kubernetes/|tracking/)?[\w-]+\.(?:sh|yaml|py))`", TEXT))

    assert {"slurm.sh", "aws.yaml", "gcp.yaml", "rayjob.yaml"} <= named
    there = {path.name for path in CLUSTER.rglob("*")} | {"my_table.py"}
    assert {name.rpartition("/")[2] for name in named} <= there


def test_every_recipe_is_on_the_page() -> None:
    recipes = [
        path for path in CLUSTER.rglob("*") if path.suffix in {".sh", ".yaml"} and "my-" not in path.name
    ]

    assert [path.name for path in recipes if path.name not in TEXT] == []


def test_every_link_leads_somewhere() -> None:
    headings = {
        re.sub(r"[^\w -]", "", line.lstrip("# ")).lower().replace(" ", "-")
        for line in TEXT.splitlines()
        if line.startswith("#")
    }
    for target in re.findall(r"\]\(([^)]+)\)", TEXT):
        if target.startswith("#"):
            assert target[1:] in headings
        else:
            assert (CLUSTER / target).exists()


@pytest.mark.parametrize("cloud", ["aws", "gcp"])
def test_what_costs_money_has_its_end_on_the_page(cloud: str) -> None:
    assert f"ray down --yes cluster/my-{cloud}.yaml" in LINES
    assert any(line.startswith(f"bash cluster/{cloud}-setup.sh") and "--delete" in line for line in LINES)


@pytest.mark.parametrize(
    "name", ["secrets.sh", "slurm.sh", "aws-setup.sh", "gcp-setup.sh", "tracking/serve.sh"]
)
def test_a_script_says_at_its_head_how_it_is_called(name: str) -> None:
    head = (CLUSTER / name).read_text().split("set -euo")[0]

    assert name == "secrets.sh" or Path(name).name in head
    assert len([line for line in head.splitlines() if line.startswith("# ")]) >= 3


def test_python_itself_is_new_enough_for_the_page() -> None:
    assert re.search(r"Python 3\.11 or newer", TEXT)
    assert sys.version_info >= (3, 11)
