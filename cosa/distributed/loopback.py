"""A Ray of our own is reached from this machine alone."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator


@contextlib.contextmanager
def loopback_only() -> Iterator[None]:
    """A Ray that is started in this block has 127.0.0.1 for its address and listens nowhere else.

    Ray does so by itself where it knows no clusters (Windows, macOS). Elsewhere it takes any name of the
    loopback interface for the machine's outer address and listens on all interfaces.
    """
    from ray._private import ray_constants

    name = "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"
    before = os.environ.get(name), ray_constants.ENABLE_RAY_CLUSTER
    os.environ[name], ray_constants.ENABLE_RAY_CLUSTER = "0", False  # read by its processes, and by this one
    try:
        yield
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = before[1]
        if before[0] is None:
            del os.environ[name]
        else:
            os.environ[name] = before[0]
