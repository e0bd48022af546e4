"""What a Ray cluster can offer: the machines it has, or those that its autoscaler may add.

Ray does not say what a cluster may grow to, so whoever starts its head does: COSA_GROWS_TO=CPU=64,GPU=8. Jobs
inherit it from there.
"""

from __future__ import annotations

import os
from collections.abc import Mapping

VARIABLE = "COSA_GROWS_TO"


def capacity() -> Mapping[str, float]:
    """Most of each resource that the connected cluster will ever have, by Ray's name of it.

    A cluster that grows on demand begins without workers: who asks what is there would be told that nothing
    fits, and would never ask for what makes it grow.

    Raises:
        ValueError: COSA_GROWS_TO is no list of resources.
    """
    import ray

    now: Mapping[str, float] = ray.cluster_resources()  # type: ignore[no-untyped-call]
    most = _limits(os.environ.get(VARIABLE, ""))
    return {name: max(now.get(name, 0.0), most.get(name, 0.0)) for name in {*now, *most}}


def _limits(text: str) -> Mapping[str, float]:
    """`CPU=64,GPU=8` as numbers by name."""
    try:
        pairs = [part.split("=") for part in text.split(",") if part]
        return {name: float(value) for name, value in pairs}
    except ValueError:
        raise ValueError(f"{VARIABLE} must read like CPU=64,GPU=8, got {text!r}; mend or unset it") from None
