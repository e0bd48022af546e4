"""The files beside the code: nothing in them belongs to one machine, and the lock fits the project."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
import tomllib
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.reading import COSA, ROOT, SWEEPS, packages

FORBIDDEN = {
    "the host of a package registry": r"pypi\.org|pythonhosted\.org|registry\.npmjs|deb\.debian\.org",
    "an index option of pip": r"--(extra-)?index-url|--find-links|PIP_INDEX|PIP_FIND_LINKS",
    "a folder of one machine": r"(?<![\w.~-])/(work|root|opt/(wheels|pypi)|Users|home/(?!ray\b))\b(?!\.)",
}


def _files() -> list[Path]:
    """What git holds or would take."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    if listed.returncode:
        pytest.skip("needs a git checkout to know which files are the project's")
    return [path for name in listed.stdout.split("\0") if name and (path := ROOT / name).is_file()]


@pytest.mark.parametrize("what", FORBIDDEN)
def test_no_file_names_a_place_that_other_machines_lack(what: str) -> None:
    found = []
    for path in _files():
        if path == Path(__file__):
            continue
        try:
            lines = path.read_text(encoding="utf-8").splitlines()
        except UnicodeDecodeError:
            continue  # a picture
        found += [
            f"{path.relative_to(ROOT)}:{number}: {line.strip()}"
            for number, line in enumerate(lines, 1)
            if re.search(FORBIDDEN[what], line)
        ]

    assert not found, f"{what}: " + "; ".join(found)


def test_the_lock_pins_exact_versions_and_nothing_else() -> None:
    pins = [p for p in (ROOT / "requirements.lock").read_text().splitlines() if not p.startswith("#")]

    assert all(re.fullmatch(r"[A-Za-z0-9_.-]+==[0-9][0-9a-z.]*", pin) for pin in pins)


def _requirements() -> dict[str, Requirement]:
    """What pyproject.toml asks for, by canonical name."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    texts = project["dependencies"] + project["optional-dependencies"]["dev"]
    return {canonicalize_name(r.name): r for r in map(Requirement, texts)}


def test_the_lock_holds_every_dependency_in_a_version_that_the_project_accepts() -> None:
    lock = (ROOT / "requirements.lock").read_text()
    locked = {canonicalize_name(n): v for n, v in re.findall(r"^([\w.-]+)==(\S+)$", lock, re.MULTILINE)}

    for name, requirement in _requirements().items():
        assert requirement.specifier.contains(locked[name]), requirement


def test_every_package_that_the_code_imports_is_a_dependency() -> None:
    imported = set().union(*(packages(path) for path in COSA + SWEEPS))
    # torchvision comes with timm, and is touched for its sake alone; pydensecrf is the extra `crf`.
    foreign = imported - sys.stdlib_module_names - {"cosa", "sweeps", "torchvision", "pydensecrf"}
    homes = packages_distributions()
    declared = _requirements().keys()

    assert not {p for p in foreign if not {canonicalize_name(d) for d in homes.get(p, [])} & declared}


def test_the_picture_and_the_page_of_the_house_show_its_source() -> None:
    spec = importlib.util.spec_from_file_location("house", ROOT / "docs" / "house.py")
    house = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(house)

    stale = [path.name for path, text in house.written().items() if path.read_text() != text]
    assert not stale, f"{stale}: run python docs/house.py"
