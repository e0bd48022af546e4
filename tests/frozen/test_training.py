"""A small run of all terms has, step by step, the losses of commit 25ac2bd: alone, in two, resumed.

Its bits were that commit's until AN's maps were cut down to an image's own classes: sums are taken in
another order since, and losses differ by 1.5e-7 of their value at most. On another kind of CPU a threshold
may tip over at a rounding, so they are held together less tightly there.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.frozen import recipe

pytestmark = pytest.mark.slow

TOLERANCE, TOLERANCE_ELSEWHERE = 1e-5, 1e-3


def require_same(out: Path, ranks: str, *, after: int = 0) -> None:
    """The run in `out` must be the kept one, at each step beyond `after`."""
    kept = recipe.read("training.json")
    entries = [entry for entry in recipe.journal(out) if entry["step"] > after]
    expected = [entry for entry in kept[ranks] if entry["step"] > after]
    assert [entry["step"] for entry in entries] == [entry["step"] for entry in expected]
    tolerance = TOLERANCE if kept["made on"] == recipe.made_on() else TOLERANCE_ELSEWHERE
    for now, then in zip(entries, expected, strict=True):
        assert now.keys() == then.keys()
        assert _losses(now) == pytest.approx(_losses(then), rel=tolerance, abs=tolerance)


def _losses(entry: dict[str, Any]) -> dict[str, float]:
    return {name: value for name, value in entry.items() if name.startswith("train/loss/")}


def test_the_kept_run_has_every_term_of_the_loss() -> None:
    losses = _losses(recipe.read("training.json")["one rank"][-1])

    assert losses.keys() == {
        f"train/loss/{name}" for name in ("cls", "aux_cls", "c2s", "aux_c2s", "s2c", "csc", "total")
    }
    assert all(losses.values())


def test_one_rank_trains_as_it_did(place: Path) -> None:
    require_same(place / "run", "one rank")


def test_two_ranks_train_as_they_did(place: Path, tmp_path: Path) -> None:
    shutil.copyfile(place / "run/config.json", tmp_path / "config.json")
    (tmp_path / "shapes").symlink_to(place / "shapes")
    processes = [
        recipe.start(recipe.two_ranks_command(rank, "config.json", "two"), tmp_path, f"log{rank}.txt")
        for rank in (0, 1)
    ]
    try:
        codes = [process.wait(recipe.PATIENCE) for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert codes == [0, 0], (tmp_path / "log0.txt").read_text()[-3000:]

    require_same(tmp_path / "two", "two ranks")


def test_a_run_that_the_old_code_left_in_the_middle_ends_as_if_never_stopped(
    place: Path, tmp_path: Path
) -> None:
    folder = recipe.roomy(tmp_path)
    recipe.unpack(recipe.DATA / "stopped_run.tar.gz", folder)
    (folder / "shapes").symlink_to(place / "shapes")
    begun = recipe.last_step(folder / "stopped")
    before = recipe.journal(folder / "stopped")
    assert 12 < begun < 24

    recipe.finish(recipe.train_command("stopped", "--tracking-uri", "none"), folder)

    assert json.dumps(recipe.journal(folder / "stopped")[: len(before)]) == json.dumps(before)
    require_same(folder / "stopped", "one rank")
