"""What a result was made with: the commit, versions and hardware, as plain tags; how busy the hardware was.

Nothing here names a host, a user or a folder, and no environment variable is kept.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import psutil

import cosa

_PACKAGES = ("torch", "timm", "numpy", "albumentations", "ray", "mlflow")


def source_tags() -> dict[str, str]:
    """The commit that cosa runs from and whether its files differ from it; empty outside of a checkout.

    A job's uploaded folder has no history: there the submitting script passes these tags on.
    """
    try:
        _git("ls-files", "--error-unmatch", Path(__file__).name)  # or another's repository is around us
        found = _git("describe", "--always", "--abbrev=40", "--exclude=*", "--dirty")
    except (OSError, subprocess.SubprocessError):  # no git, perhaps
        return {}
    commit, _, dirty = found.partition("-")
    return {"mlflow.source.git.commit": commit, "cosa.dirty": str(bool(dirty)).lower()}


def _git(*arguments: str) -> str:
    command = ["git", "-C", str(Path(__file__).parent), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()


def environment_tags() -> dict[str, str]:
    """Versions of what computes, and the hardware it computes on; no names of hosts, users or folders."""
    import torch

    versions = {"python": platform.python_version(), "cosa": cosa.__version__}
    for package in _PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    gpus = "none"
    if torch.cuda.is_available():
        gpus = f"{torch.cuda.device_count()} x {torch.cuda.get_device_name(0)}"
    return {
        **{f"cosa.version.{name}": version for name, version in versions.items()},
        "cosa.host.system": f"{platform.system()} {platform.machine()}",
        "cosa.host.cpus": str(os.cpu_count() or 1),
        "cosa.host.memory_gib": f"{psutil.virtual_memory().total / 2**30:.0f}",
        "cosa.host.gpus": gpus,
    }


class MachineLoad:
    """How busy this machine is, as MLflow measures and names it, without a client that writes by itself."""

    def __init__(self) -> None:
        """Begin to measure."""
        from mlflow.system_metrics.metrics import cpu_monitor, gpu_monitor

        cpus: Any = cpu_monitor.CPUMonitor  # without annotations
        gpus: Any = gpu_monitor.GPUMonitor
        self._monitors = [cpus()]
        with contextlib.suppress(ImportError, RuntimeError):  # no GPU of NVIDIA, or no library to ask it with
            self._monitors.append(gpus())
        psutil.cpu_percent()  # the next call tells of the time since this one

    def sample(self) -> dict[str, float]:
        """Of the CPUs since the last call, of memory and GPUs now; what cannot be had is left out."""
        found: dict[str, float] = {}
        for monitor in self._monitors:
            with contextlib.suppress(OSError):
                monitor.collect_metrics()
                found |= {f"system/{name}": value for name, value in monitor.aggregate_metrics().items()}
            monitor.clear_metrics()
        return found
