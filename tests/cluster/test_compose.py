"""The tracking server's compose file: references resolve, secrets come from outside, one port is open."""

from __future__ import annotations

import re
from typing import Any

import jsonschema
import pytest

from tests.cluster.reading import CLUSTER, documents, locked, strings
from tests.reading import ROOT

PATH = CLUSTER / "tracking" / "compose.yaml"
[COMPOSE] = documents(PATH)
SERVICES: dict[str, Any] = COMPOSE["services"]
EXAMPLE = (CLUSTER / "tracking" / ".env.example").read_text()
SECRETS = re.findall(r"^(\w+)=(.*)$", EXAMPLE, re.MULTILINE)

# The part of the compose specification that the file uses.
SCHEMA = {
    "type": "object",
    "required": ["services"],
    "additionalProperties": False,
    "properties": {
        "name": {"type": "string", "pattern": "^[a-z0-9][a-z0-9_-]*$"},
        "volumes": {"type": "object"},
        "services": {
            "type": "object",
            "additionalProperties": {
                "type": "object",
                "additionalProperties": False,
                "required": ["image"],
                "properties": {
                    "image": {"type": "string"},
                    "build": {
                        "type": "object",
                        "additionalProperties": False,
                        "properties": {
                            key: {"type": "string"} for key in ("context", "dockerfile", "target")
                        },
                    },
                    "command": {"type": "array", "items": {"type": "string"}},
                    "environment": {"type": "object", "additionalProperties": {"type": "string"}},
                    "ports": {"type": "array", "items": {"type": "string"}},
                    "volumes": {"type": "array", "items": {"type": "string"}},
                    "depends_on": {
                        "type": "object",
                        "additionalProperties": {
                            "type": "object",
                            "required": ["condition"],
                            "properties": {
                                "condition": {
                                    "enum": [
                                        "service_started",
                                        "service_healthy",
                                        "service_completed_successfully",
                                    ]
                                }
                            },
                        },
                    },
                    "healthcheck": {
                        "type": "object",
                        "additionalProperties": False,
                        "required": ["test"],
                        "properties": {
                            "test": {"type": "array", "items": {"type": "string"}},
                            "interval": {"type": "string", "pattern": "^[0-9]+s$"},
                            "timeout": {"type": "string", "pattern": "^[0-9]+s$"},
                            "start_period": {"type": "string", "pattern": "^[0-9]+s$"},
                            "retries": {"type": "integer"},
                        },
                    },
                    "restart": {"enum": ["no", "always", "on-failure", "unless-stopped"]},
                },
            },
        },
    },
}


def test_the_file_has_only_keys_that_compose_knows() -> None:
    jsonschema.validate(COMPOSE, SCHEMA)


def test_every_service_and_volume_that_is_named_exists() -> None:
    for service in SERVICES.values():
        assert service.get("depends_on", {}).keys() <= SERVICES.keys()
        assert {volume.partition(":")[0] for volume in service.get("volumes", [])} <= COMPOSE[
            "volumes"
        ].keys()
    hosts = re.findall(r"(?:@|//)(\w+):\d+", "\n".join(strings(SERVICES)))
    assert {host for host in hosts if not host.isdigit()} == {"database", "files"}


def test_what_is_waited_for_as_healthy_has_a_health_check() -> None:
    for service in SERVICES.values():
        for name, wanted in service.get("depends_on", {}).items():
            assert wanted["condition"] != "service_healthy" or "healthcheck" in SERVICES[name]
    assert "healthcheck" in SERVICES["mlflow"]


def test_one_port_is_open_and_only_to_this_machine() -> None:
    assert [port for service in SERVICES.values() for port in service.get("ports", [])] == [
        "127.0.0.1:5000:5000"
    ]


def test_secrets_come_from_the_environment_and_their_lack_is_an_error() -> None:
    asked = re.findall(r"\$\{(\w+):\?", PATH.read_text())

    assert set(asked) == {name for name, _ in SECRETS}
    for service in SERVICES.values():
        for name, value in service.get("environment", {}).items():
            if re.search("PASSWORD|SECRET|KEY$", name):
                assert re.fullmatch(r"\$\{\w+:\?.*\}", value), name


def test_the_example_of_secrets_has_none() -> None:
    assert SECRETS
    assert all(value == "" for _, value in SECRETS)


def test_a_filled_in_file_of_secrets_goes_neither_into_git_nor_into_an_image() -> None:
    assert ".env" in (ROOT / ".gitignore").read_text().splitlines()
    assert "**/.env" in (ROOT / ".dockerignore").read_text().splitlines()


def test_the_server_has_a_login_and_the_locked_version() -> None:
    assert "cluster/tracking/serve.sh" in " ".join(SERVICES["mlflow"]["command"])
    assert "--app-name basic-auth" in (CLUSTER / "tracking" / "serve.sh").read_text()
    assert SERVICES["mlflow"]["image"] == f"cosa-tracking:mlflow-{locked()['mlflow']}"


@pytest.mark.parametrize("name", ["database", "files", "bucket"])
def test_an_image_of_others_has_a_fixed_version(name: str) -> None:
    assert re.search(r":[\w.-]*\d", SERVICES[name]["image"])
