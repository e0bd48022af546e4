"""What a Ray cluster can offer: the machines it has, or those that its autoscaler may add."""

from __future__ import annotations

from collections.abc import Mapping


def capacity() -> Mapping[str, float]:
    """Most of each resource that the connected cluster will ever have, by Ray's name of it.

    A cluster that grows on demand begins without workers: who asks what is there would be told that nothing
    fits, and would never ask for what makes it grow. Node types that stand in for one another, such as spot
    and on-demand ones, are counted together.
    """
    import ray
    from ray._private.state import state

    now: Mapping[str, float] = ray.cluster_resources()  # type: ignore[no-untyped-call]
    most: Mapping[str, float] = state.get_max_resources_from_cluster_config() or {}
    return {name: max(now.get(name, 0.0), float(most.get(name, 0))) for name in {*now, *most}}
