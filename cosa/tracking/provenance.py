"""What a result was made with: the experiment's identity, the commit, versions and hardware, as plain tags.

Nothing here names a host, a user or a folder, and no environment variable is kept.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path

import cosa
from cosa import config as configs
from cosa.config import Config

_PACKAGES = ("torch", "timm", "numpy", "albumentations", "ray", "mlflow")


def identity_tags(config: Config) -> dict[str, str]:
    """Which experiment this is, by the two identities that configs share where they are the same."""
    return {
        "cosa.identity": configs.identity(config),
        "cosa.warmup_identity": configs.warmup_identity(config),
    }


def source_tags() -> dict[str, str]:
    """The commit that cosa runs from and whether its files differ from it; empty outside of a checkout.

    A job's uploaded folder has no history: there the submitting script passes these tags on.
    """
    home = Path(__file__).parent
    if _git(home, "ls-files", "--error-unmatch", Path(__file__).name) is None:
        return {}  # installed, perhaps into the middle of somebody else's repository
    commit = _git(home, "rev-parse", "HEAD")
    changes = _git(home, "status", "--porcelain", "--untracked-files=no")
    if commit is None or changes is None:
        return {}
    return {"mlflow.source.git.commit": commit, "cosa.dirty": str(bool(changes)).lower()}


def _git(folder: Path, *arguments: str) -> str | None:
    """What git prints, or None where it fails or is not installed."""
    command = ["git", "-C", str(folder), *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def environment_tags() -> dict[str, str]:
    """Versions of what computes, and the hardware it computes on; no names of hosts, users or folders."""
    versions = {"python": platform.python_version(), "cosa": cosa.__version__}
    for package in _PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    tags = {f"cosa.version.{name}": version for name, version in versions.items()}
    tags["cosa.host.system"] = f"{platform.system()} {platform.machine()}"
    tags["cosa.host.cpus"] = str(os.cpu_count() or 1)
    with contextlib.suppress(AttributeError, ValueError, OSError):  # not every system has these two
        gib = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
        tags["cosa.host.memory_gib"] = f"{gib:.0f}"
    tags["cosa.host.gpus"] = _gpus()
    return tags


def _gpus() -> str:
    """`2 x NVIDIA ...`, or `none`."""
    import torch

    if not torch.cuda.is_available():
        return "none"
    return f"{torch.cuda.device_count()} x {torch.cuda.get_device_name(0)}"
