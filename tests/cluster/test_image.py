"""The image: hadolint finds nothing, all it copies is there, no root, versions as in the lock."""

from __future__ import annotations

import fnmatch
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.cluster.reading import CLUSTER, KUBERNETES, documents, locked, strings
from tests.reading import ROOT

DOCKERFILE = CLUSTER / "Dockerfile"
TEXT = re.sub(r"\\\n\s*", " ", DOCKERFILE.read_text())
STEPS = [line.split(None, 1) for line in TEXT.splitlines() if line and not line.startswith("#")]


def test_hadolint_finds_nothing() -> None:
    hadolint = Path(sys.executable).parent / "hadolint"  # of requirements.lock
    done = subprocess.run([hadolint, str(DOCKERFILE)], capture_output=True, text=True, check=False)

    assert (done.returncode, done.stdout) == (0, "")


def _sent(name: str) -> bool:
    """Whether .dockerignore lets a file reach the build: the last rule that fits it decides."""
    sent = True
    for rule in (ROOT / ".dockerignore").read_text().splitlines():
        if rule and not rule.startswith("#"):
            pattern = rule.removeprefix("!")
            places = [name, *(name[:i] for i, letter in enumerate(name) if letter == "/")]
            if any(_fits(place, pattern) for place in places):
                sent = rule.startswith("!")
    return sent


def _fits(name: str, pattern: str) -> bool:
    if pattern.startswith("**/"):
        return fnmatch.fnmatch(name.rpartition("/")[2], pattern[3:])
    return name == pattern or (pattern == "*" and "/" not in name)


def test_everything_that_is_copied_exists_and_is_sent_to_the_build() -> None:
    copied = [
        source
        for step, rest in STEPS
        if step == "COPY"
        for source in [word for word in rest.split() if not word.startswith("--")][:-1]
    ]

    assert {"requirements.lock", "cluster/requirements.txt", "."} <= set(copied)
    for source in {*copied} - {"."}:
        files = [path for path in (ROOT / source).rglob("*") if path.is_file()] or [ROOT / source]
        assert any(_sent(str(path.relative_to(ROOT))) for path in files), source


@pytest.mark.parametrize(
    "name", ["cosa/training/trainer.py", "sweeps/ablation.py", "pyproject.toml", "cluster/tracking/serve.sh"]
)
def test_the_code_is_sent_to_the_build(name: str) -> None:
    assert (ROOT / name).is_file()
    assert _sent(name)


@pytest.mark.parametrize(
    "name",
    [".venv/bin/python", "data/x.jpg", "runs/mlflow.db", ".git/config", "cluster/tracking/.env", "my.pem"],
)
def test_data_results_and_secrets_are_not_sent_to_the_build(name: str) -> None:
    assert not _sent(name)


def test_it_runs_without_root() -> None:
    users = [rest for step, rest in STEPS if step == "USER"]

    assert users == ["1000:1000"]


def test_every_argument_is_used() -> None:
    arguments = {rest.partition("=")[0] for step, rest in STEPS if step == "ARG"}

    assert arguments == {"PYTHON", "DEVICE", "COMMIT"}
    for name in arguments:
        assert f"${{{name}}}" in TEXT


def test_the_pip_configuration_is_a_secret_of_the_build_and_no_layer() -> None:
    installs = [rest for step, rest in STEPS if step == "RUN" and "pip install" in rest and "lock" in rest]

    assert len(installs) == 2
    assert all(
        "--mount=type=secret,id=pip,target=/home/ray/.config/pip/pip.conf" in line for line in installs
    )


def test_its_python_is_the_one_that_the_project_asks_for() -> None:
    [version] = [rest.partition("=")[2] for step, rest in STEPS if rest.startswith("PYTHON=")]

    assert version == "3.11"
    assert 'python_version = "3.11"' in (ROOT / "pyproject.toml").read_text()


def test_further_requirements_are_exact_and_agree_with_the_lock() -> None:
    pins = re.findall(r"^([\w.-]+)==(\S+)", (CLUSTER / "requirements.txt").read_text(), re.MULTILINE)

    assert {name for name, _ in pins} == {"Flask-WTF", "boto3", "google-api-python-client", "psycopg2-binary"}
    for name, version in pins:
        assert locked().get(name.lower(), version) == version


def test_rays_version_is_the_locks_wherever_it_stands() -> None:
    versions = [
        line
        for path in KUBERNETES
        for content in documents(path)
        for line in re.findall(r'rayVersion: "(\S+)"', path.read_text())
        if strings(content)
    ]

    assert versions
    assert set(versions) == {locked()["ray"]}
