"""The shell scripts: sound to bash and shellcheck, and the cloud ones right about which calls they make."""

from __future__ import annotations

import os
import re
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config

from tests.cluster.reading import CLUSTER, SCRIPTS
from tests.reading import ROOT


def _ids(path: Path) -> str:
    return path.name


@pytest.mark.parametrize("path", SCRIPTS, ids=_ids)
def test_bash_reads_it(path: Path) -> None:
    done = subprocess.run(["bash", "-n", str(path)], capture_output=True, text=True, check=False)

    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("path", SCRIPTS, ids=_ids)
def test_shellcheck_finds_nothing(path: Path) -> None:
    shellcheck = Path(sys.executable).parent / "shellcheck"  # of requirements.lock
    done = subprocess.run([shellcheck, str(path)], capture_output=True, text=True, check=False)

    assert (done.returncode, done.stdout) == (0, "")


@pytest.mark.parametrize("path", SCRIPTS, ids=_ids)
def test_it_stops_at_the_first_failure(path: Path) -> None:
    assert "\nset -euo pipefail\n" in path.read_text()


AWS = """#!/usr/bin/env bash
echo "$*" >> "$CALLS"
case "$*" in
    "configure get region") echo eu-central-1 ;;
    *describe-vpcs*) echo vpc-1 ;;
    *describe-security-groups*) [[ -n ${THERE:-} ]] && echo sg-1 || echo None ;;
    *create-security-group*) echo sg-1 ;;
    *"describe-file-systems --creation-token"*) [[ -n ${THERE:-} ]] && echo fs-1 || echo None ;;
    *create-file-system*) echo fs-1 ;;
    *LifeCycleState*) echo available ;;
    *describe-subnets*) printf 'subnet-1\\tsubnet-2\\n' ;;
    *"describe-mount-targets"*SubnetId*) [[ -n ${THERE:-} ]] && printf 'subnet-1\\tsubnet-2\\n' || true ;;
    *"describe-mount-targets"*MountTargetId*)
        grep -q delete-mount-target "$CALLS" || echo fsmt-1 ;;
    *ssm*) echo ami-0123 ;;
esac
"""
GCLOUD = """#!/usr/bin/env bash
echo "$*" >> "$CALLS"
case "$*" in
    "config get-value compute/zone") echo us-central1-a ;;
    "filestore instances describe"*)
        [[ -n ${THERE:-} ]] || grep -q "instances create" "$CALLS" || exit 1
        echo 10.0.0.2 ;;
    *"images list"*) echo common-cu129-ubuntu-2204-v1 ;;
esac
"""


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A copy of `cluster/` beside stand-ins for the clouds' commands, which write down their calls."""
    shutil.copytree(CLUSTER, tmp_path / "cluster", ignore=shutil.ignore_patterns("my-*.yaml"))
    (tmp_path / "bin").mkdir()
    for name, text in {"aws": AWS, "gcloud": GCLOUD}.items():
        (tmp_path / "bin" / name).write_text(text)
        (tmp_path / "bin" / name).chmod(0o755)
    return tmp_path


def run(place: Path, script: str, *arguments: str, **environment: str) -> list[str]:
    """Run a script against the stand-ins; returns their calls."""
    calls = place / "calls"
    calls.unlink(missing_ok=True)
    path = f"{place / 'bin'}:{os.environ['PATH']}"
    kept = {name: value for name, value in os.environ.items() if not name.startswith("AWS_")}
    done = subprocess.run(
        ["bash", str(place / "cluster" / script), *arguments],
        env={**kept, "PATH": path, "CALLS": str(calls), "HOME": str(place), **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return calls.read_text().splitlines() if calls.exists() else []


CLOUDS = {"aws": ("aws-setup.sh", ("you/cosa:1",)), "gcp": ("gcp-setup.sh", ("my-project", "you/cosa:1"))}


@pytest.mark.parametrize("cloud", CLOUDS)
def test_a_set_up_cloud_gives_a_file_that_ray_accepts_with_every_word_filled_in(
    place: Path, cloud: str
) -> None:
    script, arguments = CLOUDS[cloud]
    run(place, script, *arguments)

    text = (place / "cluster" / f"my-{cloud}.yaml").read_text()
    assert "@" not in text.replace("between @", "")
    content = yaml.safe_load(text)
    validate_config(prepare_config(content))
    assert content["docker"]["image"] == "you/cosa:1"


@pytest.mark.parametrize("cloud", CLOUDS)
def test_what_is_there_already_is_not_made_again(place: Path, cloud: str) -> None:
    script, arguments = CLOUDS[cloud]
    made = [call for call in run(place, script, *arguments) if "create" in call and "describe" not in call]
    again = [
        call
        for call in run(place, script, *arguments, THERE="1")
        if "create" in call and "describe" not in call
    ]

    assert made
    assert again == []


def test_aws_opens_ssh_alone_to_the_outside(place: Path) -> None:
    rules = [call for call in run(place, "aws-setup.sh", "you/cosa:1") if "authorize" in call]

    assert len(rules) == 2
    assert "--source-group sg-1" in rules[0]
    assert "--protocol tcp --port 22 --cidr 0.0.0.0/0" in rules[1]


def test_aws_opens_ssh_to_one_address_where_one_is_named(place: Path) -> None:
    calls = run(place, "aws-setup.sh", "you/cosa:1", COSA_SSH_FROM="203.0.113.7/32")

    assert next(call for call in calls if "--cidr" in call).endswith("--cidr 203.0.113.7/32")


def test_deleting_leaves_nothing_that_costs(place: Path) -> None:
    aws = run(place, "aws-setup.sh", "--delete", THERE="1")
    google = run(place, "gcp-setup.sh", "my-project", "--delete", THERE="1")

    deleted = [call.split()[1] for call in aws if " delete-" in call]
    assert deleted == ["delete-mount-target", "delete-file-system", "delete-security-group"]
    assert any(call.startswith("filestore instances delete cosa") for call in google)


def test_a_slurm_job_hears_of_its_end_in_time_and_may_be_queued_again() -> None:
    asked = re.findall(r"^#SBATCH (.+)$", (CLUSTER / "slurm.sh").read_text(), re.MULTILINE)

    assert {"--requeue", "--signal=B:TERM@60", "--open-mode=append"} <= set(asked)


def test_secrets_are_made_once_for_their_owner_alone_and_never_shown(tmp_path: Path) -> None:
    def make() -> str:
        done = subprocess.run(
            ["bash", str(CLUSTER / "secrets.sh")],
            env={**os.environ, "HOME": str(tmp_path)},
            capture_output=True,
            text=True,
            check=True,
        )
        return done.stdout + done.stderr

    files = [tmp_path / ".ray" / "auth_token", tmp_path / ".mlflow" / "credentials"]
    said = make()
    first = [path.read_text() for path in files]
    said += make()

    assert [path.read_text() for path in files] == first
    assert [stat.S_IMODE(path.stat().st_mode) for path in files] == [0o600, 0o600]
    secrets = [first[0], first[1].rpartition("= ")[2].strip()]
    assert all(len(secret) == 64 and secret not in said for secret in secrets)


def test_the_tracking_server_refuses_to_listen_everywhere(tmp_path: Path) -> None:
    done = subprocess.run(
        ["bash", "cluster/tracking/serve.sh", str(tmp_path), "0.0.0.0"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )

    assert done.returncode == 2
    assert "ADDRESS must be one of this machine's own, got 0.0.0.0" in done.stderr


def test_the_tracking_server_refuses_to_start_without_a_login(tmp_path: Path) -> None:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("MLFLOW_")}
    done = subprocess.run(
        ["bash", "cluster/tracking/serve.sh", str(tmp_path)],
        cwd=ROOT,
        env={**kept, "HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )

    assert done.returncode == 2
    assert "the server must have a login, got none; run: bash cluster/secrets.sh" in done.stderr
