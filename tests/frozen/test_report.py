"""From a store that commit 25ac2bd filled, the report's command writes the tables that it wrote then.

But for two things, changed on purpose since: rows without SA, Base, GC and no-SA, are judged on ON, as the
paper judges them. Their cells, what follows from them (the highest row, the legend, a column's width) and the
CSV's column `network` are of today; that they are ON's is held against what 25ac2bd itself kept as ON's. And
a line that names the classes of C-mIoU stands below each table that shows it.

The store is that of a sweep of Tables 3a, 3b, 4b and 5c over two seeds; an earlier one ran two of its trials.
Nothing in the tables depends on machine, place or time but what the store itself remembers.
"""

from __future__ import annotations

import csv
import io
from pathlib import Path

import pytest

from tests.frozen import recipe

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of today's report."""
    folder = recipe.roomy(tmp_path_factory.mktemp("f"))
    recipe.unpack(recipe.DATA / "report.tar.gz", folder)
    recipe.finish(recipe.report_command(folder, "second"), folder)
    return folder / "report"


def _rows(text: str) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(text)))


def test_the_kept_sweep_takes_trials_from_an_earlier_one() -> None:
    assert "2 of them in earlier runs" in (recipe.DATA / "tables.md").read_text()


def test_every_cell_of_the_csv_is_what_it_was(report: Path) -> None:
    now, then = _rows((report / "tables.csv").read_text()), _rows((recipe.DATA / "tables.csv").read_text())

    assert len(then) == 19
    assert now == then


def test_rows_without_sa_show_what_was_kept_as_ons_own(report: Path) -> None:
    rows = _rows((report / "tables.csv").read_text())
    online = [row for row in rows if row["network"] == "online"]

    assert [row["arm"] for row in online] == ["Base", "GC", "no-SA"]
    for row in online:
        for name in ("seg_miou_labelled", "seg_miou", "cpl_miou", "cpl_cmiou"):
            for number in ("n", "mean", "deviation"):
                assert row[f"{name}_{number}"] == row[f"online_{name}_{number}"] != ""


@pytest.mark.parametrize("name", ["tables.md", "tables.tex", "tables.txt"])
def test_every_line_is_what_it_was(report: Path, name: str) -> None:
    assert (report / name).read_text().splitlines() == (recipe.DATA / name).read_text().splitlines()


def test_every_cell_of_the_page_is_what_it_was(report: Path) -> None:
    assert recipe.html_cells((report / "report.html").read_text()) == recipe.read("report_cells.json")
