"""The files for `ray up`: valid to Ray itself, nothing idle is paid for, nothing is open that need not be."""

from __future__ import annotations

import copy
import re
from typing import Any

import pytest
from ray.autoscaler._private.util import prepare_config, validate_config
from ray.autoscaler.v2.instance_manager.config import AutoscalingConfig
from ray.autoscaler.v2.scheduler import ResourceDemandScheduler, SchedulingRequest
from ray.autoscaler.v2.utils import ResourceRequestUtil
from ray.core.generated.autoscaler_pb2 import ClusterResourceConstraint, ResourceRequestByCount

from cosa.distributed.session import growth
from tests.cluster.reading import CLUSTER, documents, strings

CLOUDS = ("aws", "gcp")


def recipe(cloud: str) -> dict[str, Any]:
    [content] = documents(CLUSTER / f"{cloud}.yaml")
    return content


@pytest.mark.parametrize("cloud", CLOUDS)
def test_ray_accepts_the_file(cloud: str) -> None:
    validate_config(prepare_config(recipe(cloud)))


def test_rays_validator_would_object_to_a_misspelt_key() -> None:
    wrong = recipe("aws")
    wrong["idle_timeout_minuts"] = wrong.pop("idle_timeout_minutes")

    with pytest.raises(Exception, match="idle_timeout_minuts"):
        validate_config(prepare_config(wrong))


@pytest.mark.parametrize("cloud", CLOUDS)
def test_nothing_but_the_head_runs_while_no_trial_waits(cloud: str) -> None:
    content = recipe(cloud)
    types = content["available_node_types"]
    workers = {name: kind for name, kind in types.items() if name != content["head_node_type"]}

    assert all(kind["min_workers"] == 0 for kind in workers.values())
    assert content["idle_timeout_minutes"] <= 15
    assert types[content["head_node_type"]]["resources"] == {"CPU": 0}
    assert all(kind["resources"]["GPU"] >= 1 for kind in workers.values())
    assert sum(kind["max_workers"] for kind in workers.values()) == content["max_workers"]


def launched(cloud: str, trials: int) -> dict[str, int]:
    """Machines that Ray's autoscaler starts for so many trials of one GPU each, by node type."""
    config = AutoscalingConfig(configs=prepare_config(copy.deepcopy(recipe(cloud))), skip_content_hash=True)
    demand = ResourceRequestByCount(request=ResourceRequestUtil.make({"CPU": 1.0, "GPU": 1.0}), count=trials)
    asked = SchedulingRequest(
        resource_requests=[demand],
        cluster_resource_constraints=[ClusterResourceConstraint()],
        node_type_configs=config.get_node_type_configs(),
        max_num_nodes=config.get_max_num_nodes(),
        disable_launch_config_check=True,
        idle_timeout_s=None,
        current_instances=[],
        gang_resource_requests=[],
    )
    reply = ResourceDemandScheduler(None).schedule(asked)
    return {request.instance_type: request.count for request in reply.to_launch}


@pytest.mark.parametrize("cloud", CLOUDS)
def test_the_first_gpu_machine_cannot_be_taken_back_and_the_others_are_cheap(cloud: str) -> None:
    assert launched(cloud, 1) == {"on-demand": 1}
    assert launched(cloud, 5) == {"on-demand": 1, "spot": 4}


def test_spot_machines_are_asked_for_as_spot() -> None:
    aws = recipe("aws")["available_node_types"]
    gcp = recipe("gcp")["available_node_types"]

    assert aws["spot"]["node_config"]["InstanceMarketOptions"] == {"MarketType": "spot"}
    assert "InstanceMarketOptions" not in aws["on-demand"]["node_config"]
    assert gcp["spot"]["node_config"]["scheduling"][0]["preemptible"] is True
    assert "preemptible" not in gcp["on-demand"]["node_config"]["scheduling"][0]


@pytest.mark.parametrize("cloud", CLOUDS)
def test_every_node_asks_for_the_token(cloud: str) -> None:
    content = recipe(cloud)

    assert "--env RAY_AUTH_MODE=token" in content["docker"]["run_options"]
    assert content["file_mounts"]["/home/ray/.ray/auth_token"] == "~/.ray/auth_token"


@pytest.mark.parametrize("cloud", CLOUDS)
def test_the_dashboard_and_the_job_api_listen_on_the_loopback_interface(cloud: str) -> None:
    [start] = [line for line in recipe(cloud)["head_start_ray_commands"] if "ray start" in line]

    assert "--dashboard-host=127.0.0.1" in start
    assert not [text for text in strings(recipe(cloud)) if "0.0.0.0" in text]


@pytest.mark.parametrize("cloud", CLOUDS)
def test_outputs_lie_in_the_folder_that_all_machines_mount(cloud: str) -> None:
    content = recipe(cloud)

    assert "--volume /mnt/cosa:/mnt/cosa" in content["docker"]["run_options"]
    assert any("mount -t nfs" in line and "/mnt/cosa" in line for line in content["initialization_commands"])


@pytest.mark.parametrize("cloud", CLOUDS)
def test_a_sweep_is_told_what_the_cluster_may_grow_to(cloud: str) -> None:
    content = recipe(cloud)
    types = [
        kind for name, kind in content["available_node_types"].items() if name != content["head_node_type"]
    ]
    [start] = [line for line in content["head_start_ray_commands"] if "ray start" in line]
    said = re.search(r"COSA_GROWS_TO=(\S+)", start)

    assert said
    assert growth(said[1]) == {
        name: sum(kind["max_workers"] * kind["resources"][name] for kind in types) for name in ("CPU", "GPU")
    }
