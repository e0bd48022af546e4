"""Waits until a Ray cluster has its machines, and the tracking server answers where one is named.

python cluster/wait_for_nodes.py COUNT [TRACKING_URI]

RAY_ADDRESS names the cluster. Exit code 1, with a line that says what is missing, after ten minutes.
"""

from __future__ import annotations

import os
import sys
import time
import urllib.error
import urllib.request

import ray

_LONGEST = 600  # seconds; nodes that have to boot or to unpack an environment take minutes


def main() -> int:
    """Waits; returns the exit code."""
    count = int(sys.argv[1])
    uri = sys.argv[2] if len(sys.argv) > 2 else ""
    ray.init(address=os.environ["RAY_ADDRESS"], log_to_driver=False, logging_level="ERROR")
    deadline = time.monotonic() + _LONGEST
    while time.monotonic() < deadline:
        nodes = sum(node["Alive"] for node in ray.nodes())
        serving = _answers(uri)
        if nodes >= count and serving:
            return 0
        time.sleep(1)
    missing = "the tracking server is silent" if nodes >= count else f"{nodes} of {count} nodes have joined"
    sys.stderr.write(f"the cluster must be complete after {_LONGEST} s, got: {missing}; see the job's logs\n")
    return 1


def _answers(uri: str) -> bool:
    """Whether a server answers at `uri`; what is no address of a server need not."""
    if not uri.startswith(("http://", "https://")):
        return True
    try:
        with urllib.request.urlopen(f"{uri.rstrip('/')}/health", timeout=5):  # noqa: S310 (http alone, see above)
            return True
    except urllib.error.HTTPError:
        return True  # it does, if only to ask who we are
    except OSError:
        return False


if __name__ == "__main__":
    sys.exit(main())
