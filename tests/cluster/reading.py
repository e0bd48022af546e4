"""What the tests of `cluster/` read: its files, what they install, the commands that its pages show."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from tests.reading import ROOT

CLUSTER = ROOT / "cluster"
SCRIPTS = sorted(CLUSTER.rglob("*.sh"))
KUBERNETES = sorted((CLUSTER / "kubernetes").glob("*.yaml"))


def locked() -> dict[str, str]:
    """Versions that requirements.lock pins, by name in lower case."""
    pins = re.findall(r"^([\w.-]+)==(\S+)$", (ROOT / "requirements.lock").read_text(), re.MULTILINE)
    return {name.lower(): version for name, version in pins}


def documents(path: Path) -> list[Any]:
    """The documents of a YAML file."""
    return list(yaml.safe_load_all(path.read_text()))


def strings(value: Any) -> list[str]:
    """Every text inside a YAML document, keys left out."""
    if isinstance(value, dict):
        return [text for item in value.values() for text in strings(item)]
    if isinstance(value, list):
        return [text for item in value for text in strings(item)]
    return [value] if isinstance(value, str) else []


def commands(page: Path) -> list[str]:
    """Lines of a page's code blocks, fenced or indented, without comments; a trailing backslash joins two."""
    lines: list[str] = []
    fenced = False
    for line in page.read_text().splitlines():
        if line.startswith("```"):
            fenced = not fenced
            continue
        if fenced or line.startswith("    "):
            lines.append(line.strip())
    joined = re.sub(r"\\\n\s*", " ", "\n".join(lines))
    return [cut for line in joined.splitlines() if (cut := re.sub(r"(^|\s+)#.*$", "", line).strip())]
