"""The files for Kubernetes: fields that exist, a cluster as Ray's autoscaler reads it, no privileges."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from ray.autoscaler._private.kuberay import autoscaling_config
from ray.autoscaler._private.util import validate_config

from cosa.distributed.session import growth
from tests.cluster.reading import CLUSTER, KUBERNETES, documents

FOLDER = CLUSTER / "kubernetes"
OBJECT: dict[str, Any] = {"type": "object"}
TEXTS: dict[str, Any] = {"type": "object", "additionalProperties": {"type": "string"}}
WHOLE: dict[str, Any] = {"type": "integer", "minimum": 0}


def closed(required: tuple[str, ...], **properties: dict[str, Any]) -> dict[str, Any]:
    """A schema of an object with these fields and no others."""
    return {
        "type": "object",
        "required": list(required),
        "properties": properties,
        "additionalProperties": False,
    }


POD = closed(
    ("spec",),
    metadata=OBJECT,
    spec=closed(
        ("containers",),
        containers={
            "type": "array",
            "minItems": 1,
            "items": closed(
                ("name", "image", "resources"),
                name={"type": "string"},
                image={"type": "string"},
                command={"type": "array", "items": {"type": "string"}},
                env={
                    "type": "array",
                    "items": closed(("name",), name={}, value={"type": "string"}, valueFrom={}),
                },
                ports={"type": "array", "items": closed(("containerPort",), name={}, containerPort=WHOLE)},
                resources=closed(("requests", "limits"), requests=OBJECT, limits=OBJECT),
                securityContext=OBJECT,
                readinessProbe=OBJECT,
                livenessProbe=OBJECT,
                volumeMounts={
                    "type": "array",
                    "items": closed(
                        ("name", "mountPath"), name={}, mountPath={}, readOnly={"type": "boolean"}
                    ),
                },
            ),
        },
        volumes={
            "type": "array",
            "items": closed(("name",), name={}, persistentVolumeClaim={}, emptyDir={}, secret={}),
        },
        securityContext=OBJECT,
        tolerations={"type": "array"},
        terminationGracePeriodSeconds=WHOLE,
        automountServiceAccountToken={"type": "boolean"},
    ),
)
# The part of KubeRay's ray.io/v1 that the recipes use.
RAY_CLUSTER = closed(
    ("rayVersion", "headGroupSpec", "workerGroupSpecs"),
    rayVersion={"type": "string"},
    authOptions=closed(("mode",), mode={"enum": ["token", "disabled"]}),
    enableInTreeAutoscaling={"type": "boolean"},
    autoscalerOptions=closed(
        (), version={"enum": ["v1", "v2"]}, idleTimeoutSeconds=WHOLE, resources=OBJECT, upscalingMode={}
    ),
    headGroupSpec=closed(
        ("rayStartParams", "template"),
        serviceType={"enum": ["ClusterIP", "NodePort", "LoadBalancer"]},
        rayStartParams=TEXTS,
        template=POD,
    ),
    workerGroupSpecs={
        "type": "array",
        "minItems": 1,
        "items": closed(
            ("groupName", "minReplicas", "maxReplicas", "rayStartParams", "template"),
            groupName={"type": "string"},
            replicas=WHOLE,
            minReplicas=WHOLE,
            maxReplicas=WHOLE,
            rayStartParams=TEXTS,
            template=POD,
        ),
    },
)
RAY_JOB = closed(
    ("entrypoint", "rayClusterSpec"),
    entrypoint={"type": "string"},
    runtimeEnvYAML={"type": "string"},
    submissionMode={"enum": ["K8sJobMode", "HTTPMode", "InteractiveMode", "SidecarMode"]},
    backoffLimit=WHOLE,
    shutdownAfterJobFinishes={"type": "boolean"},
    ttlSecondsAfterFinished=WHOLE,
    suspend={"type": "boolean"},
    rayClusterSpec=RAY_CLUSTER,
)
SPECS = {
    ("ray.io/v1", "RayCluster"): RAY_CLUSTER,
    ("ray.io/v1", "RayJob"): RAY_JOB,
    ("v1", "PersistentVolumeClaim"): closed(
        ("accessModes", "resources"), accessModes={}, resources={}, storageClassName={}
    ),
    ("v1", "Service"): closed(("selector", "ports"), type={"const": "ClusterIP"}, selector=TEXTS, ports={}),
    ("apps/v1", "Deployment"): closed(
        ("selector", "template"), replicas={"const": 1}, strategy=OBJECT, selector=OBJECT, template=POD
    ),
}
OBJECTS = [(path.name, content) for path in KUBERNETES for content in documents(path)]
NAMES = [f"{name}-{content['kind']}" for name, content in OBJECTS]


def ray_spec(name: str) -> dict[str, Any]:
    """The Ray cluster inside a file."""
    [content] = documents(FOLDER / name)
    return content["spec"].get("rayClusterSpec", content["spec"])


def pods(content: dict[str, Any]) -> list[dict[str, Any]]:
    """Every pod's spec inside an object."""
    spec = content["spec"].get("rayClusterSpec", content["spec"])
    groups = [spec.get("headGroupSpec"), *spec.get("workerGroupSpecs", []), spec]
    return [group["template"]["spec"] for group in groups if group and "template" in group]


@pytest.mark.parametrize("content", [content for _, content in OBJECTS], ids=NAMES)
def test_an_object_has_only_fields_that_exist(content: dict[str, Any]) -> None:
    assert content.keys() == {"apiVersion", "kind", "metadata", "spec"}
    jsonschema.validate(content["spec"], SPECS[content["apiVersion"], content["kind"]])


def test_the_check_of_fields_would_object_to_a_misspelt_one() -> None:
    wrong = copy.deepcopy(ray_spec("raycluster.yaml"))
    wrong["headGroupSpecs"] = wrong.pop("headGroupSpec")

    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(wrong, RAY_CLUSTER)


@pytest.mark.parametrize("name", ["raycluster.yaml", "rayjob.yaml"])
def test_rays_autoscaler_reads_a_head_without_trials_and_gpu_workers_from_zero(name: str) -> None:
    found = autoscaling_config._derive_autoscaling_config_from_ray_cr(
        {"spec": ray_spec(name), "metadata": {"name": "cosa", "namespace": "default"}}
    )
    validate_config(found)

    types = found["available_node_types"]
    assert types["headgroup"]["resources"]["CPU"] == 0
    assert types["gpu"]["min_workers"] == 0
    assert types["gpu"]["resources"]["GPU"] == 1
    assert found["max_workers"] == types["gpu"]["max_workers"] == 8


@pytest.mark.parametrize("name", ["raycluster.yaml", "rayjob.yaml"])
def test_ray_asks_for_a_token_and_is_reached_inside_alone(name: str) -> None:
    spec = ray_spec(name)

    assert spec["authOptions"] == {"mode": "token"}
    assert spec["headGroupSpec"]["serviceType"] == "ClusterIP"


def test_a_sweep_is_told_what_the_cluster_may_grow_to() -> None:
    spec = ray_spec("raycluster.yaml")
    [group] = spec["workerGroupSpecs"]
    [container] = group["template"]["spec"]["containers"]
    head = spec["headGroupSpec"]["template"]["spec"]["containers"][0]
    [said] = [item["value"] for item in head["env"] if item["name"] == "COSA_GROWS_TO"]

    limits = container["resources"]["limits"]
    per_pod = {"CPU": int(limits["cpu"]), "GPU": int(limits["nvidia.com/gpu"])}
    assert growth(said) == {name: group["maxReplicas"] * number for name, number in per_pod.items()}


def test_both_files_describe_the_same_cluster() -> None:
    assert ray_spec("raycluster.yaml") == ray_spec("rayjob.yaml")


PODS = [(name, pod) for name, content in OBJECTS for pod in pods(content)]


@pytest.mark.parametrize("pod", [pod for _, pod in PODS], ids=[name for name, _ in PODS])
def test_a_pod_has_no_privileges(pod: dict[str, Any]) -> None:
    assert pod["securityContext"]["runAsNonRoot"] is True
    assert pod["securityContext"]["runAsUser"] == 1000
    for container in pod["containers"]:
        assert container["securityContext"]["allowPrivilegeEscalation"] is False
        assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}


@pytest.mark.parametrize("pod", [pod for _, pod in PODS], ids=[name for name, _ in PODS])
def test_what_a_pod_mounts_exists(pod: dict[str, Any]) -> None:
    volumes = {volume["name"]: volume for volume in pod["volumes"]}
    claims = {
        content["metadata"]["name"] for _, content in OBJECTS if content["kind"] == "PersistentVolumeClaim"
    }

    for container in pod["containers"]:
        assert {mount["name"] for mount in container["volumeMounts"]} <= volumes.keys()
    assert volumes["shared"]["persistentVolumeClaim"]["claimName"] in claims
    assert volumes["login"]["secret"]["secretName"] == "cosa-tracking"


def test_trials_find_the_tracking_service_by_its_name() -> None:
    [service] = [content for _, content in OBJECTS if content["kind"] == "Service"]
    [deployment] = [content for _, content in OBJECTS if content["kind"] == "Deployment"]
    [container] = deployment["spec"]["template"]["spec"]["containers"]
    allowed = {item["name"]: item.get("value") for item in container["env"]}["MLFLOW_SERVER_ALLOWED_HOSTS"]
    head = ray_spec("raycluster.yaml")["headGroupSpec"]["template"]["spec"]["containers"][0]
    [uri] = [item["value"] for item in head["env"] if item["name"] == "MLFLOW_TRACKING_URI"]

    place = f"{service['metadata']['name']}:{service['spec']['ports'][0]['port']}"
    assert uri == f"http://{place}"
    assert place in allowed.split(",")
    assert service["spec"]["selector"] == deployment["spec"]["template"]["metadata"]["labels"]


def test_the_shared_folder_may_be_written_by_many_pods() -> None:
    [claim] = documents(FOLDER / "storage.yaml")

    assert claim["spec"]["accessModes"] == ["ReadWriteMany"]


@pytest.mark.parametrize("path", KUBERNETES, ids=[path.name for path in KUBERNETES])
def test_no_file_holds_a_secret(path: Path) -> None:
    assert not [content for content in documents(path) if content["kind"] == "Secret"]
