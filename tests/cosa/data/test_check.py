"""`cosa-data`: everything that is wrong with a data set, what it holds, and a picture of it."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cosa import cli
from cosa.config import DataConfig, fields
from cosa.data import open_dataset
from cosa.data.check import Summary, check, detect_layout, splits_of
from cosa.evaluation.pictures import draw_sample
from tests.cosa.data.coco_folder import CocoFolder, box
from tests.cosa.data.own_folder import OwnFolder
from tests.cosa.data.voc_folder import VocFolder
from tests.reading import ROOT


@pytest.fixture(autouse=True)
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The commands' cache lies below the working folder."""
    monkeypatch.setenv("COLUMNS", "1000")
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def voc(tmp_path: Path) -> VocFolder:
    return VocFolder(tmp_path / "voc")


@pytest.fixture
def coco(tmp_path: Path) -> CocoFolder:
    return CocoFolder(tmp_path / "coco")


@pytest.fixture
def own(tmp_path: Path) -> OwnFolder:
    return OwnFolder(tmp_path / "own")


def checked(data: DataConfig) -> Summary:
    return check(data, splits_of(data), lambda *_: None)


# --- what a data set holds ----------------------------------------------------------------------------------


def test_images_and_pixels_are_counted_by_class(voc: VocFolder) -> None:
    voc.fill({"a": [1, 1, 255], "b": [3, 1], "c": [0]})

    (split,) = checked(voc.config()).splits

    assert (split.name, split.images, split.without_objects) == ("train", 3, 1)
    assert split.images_per_class[:4] == (2, 0, 1, 0)
    assert split.pixels[:4] == (3 * 48 - 5, 3, 0, 1)
    assert split.pixels[-1] == 1
    assert len(split.pixels) == 22


def test_a_split_without_masks_has_no_pixels(own: OwnFolder) -> None:
    own.fill("a.jpg,train,cat", "b.jpg,train,")

    (split,) = checked(own.config()).splits

    assert split.pixels == ()
    assert split.images_per_class == (1,)
    assert split.without_objects == 1


def test_masks_that_show_more_than_the_labels_say_are_counted(own: OwnFolder) -> None:
    own.fill("a.jpg,val,dog", "b.jpg,val,cat;dog", "c.jpg,val,cat")
    for name in "abc":
        own.mask(f"{name}.png", 1)  # cat

    (split,) = checked(own.config()).splits

    assert split.unlabelled_masks == 1


def test_masks_that_disagree_with_the_labels_are_a_finding(own: OwnFolder) -> None:
    own.fill("a.jpg,val,dog", "b.jpg,val,cat")
    for name in "ab":
        own.mask(f"{name}.png", 1)  # cat

    (problem,) = checked(own.config()).problems

    assert "got 1 of 2 images of val whose mask shows more" in problem


def test_objects_that_are_marked_as_not_counted_are_a_finding(own: OwnFolder) -> None:
    own.fill("a.jpg,val,cat", "b.jpg,val,cat", "c.jpg,val,cat")
    for name in "abc":
        own.mask(f"{name}.png", 255)

    unseen, ignored = checked(own.config()).problems

    assert "got 3 images of val labelled 'cat' and no pixel of it" in unseen
    assert "got 100% of all pixels of val" in ignored


def test_masks_of_no_image_are_a_finding(own: OwnFolder) -> None:
    own.fill("a.jpg,val,cat", "b.jpg,train,cat")
    own.mask("a.png", 1)
    own.mask("c.png", 1)

    (problem,) = checked(own.config()).problems

    assert "got 1 in" in problem
    assert "first 'c.png', and 1 of 2 images without a mask" in problem


def test_the_masks_of_every_split_of_coco_are_drawn(coco: CocoFolder) -> None:
    coco.object(coco.image(), "cat", box(0, 0, 4, 4))
    coco.write()

    (split,) = checked(coco.config(val_split="other")).splits

    assert split.pixels[0] == 48 - 16
    assert sum(split.pixels[1:]) == 16


def test_the_test_split_of_voc_needs_neither_labels_nor_masks(voc: VocFolder) -> None:
    voc.fill({"a": [1]})
    voc.image("t")
    voc.split("test", ["t"])

    summary = checked(voc.config())

    assert summary.problems == ()
    assert [(s.name, s.images, s.without_objects) for s in summary.splits] == [
        ("test", 1, 0),
        ("train", 1, 0),
    ]


def test_the_augmented_split_of_voc_is_checked_where_it_can_be_derived(voc: VocFolder) -> None:
    voc.fill({"a": [1], "b": [2]}, split="all")
    voc.split("val", ["b"])

    assert splits_of(voc.config()) == ["all", "train_aug", "val"]


def test_a_voc_folder_of_val_alone_is_checked_and_what_is_missing_is_said(
    voc: VocFolder, capsys: pytest.CaptureFixture[str]
) -> None:
    voc.fill({"a": [1], "b": [2]}, split="val")

    assert cli.data(["check", str(voc.root)]) == 0

    said = capsys.readouterr().out.splitlines()
    assert said[-2:] == [
        "val alone is there, to judge on; to train, add the images and the list of another split",
        "nothing is wrong",
    ]
    with pytest.raises(FileNotFoundError, match=r"got 'train_aug'; there are: val$"):
        open_dataset(voc.config(), "train_aug")


def test_many_images_are_read_by_several_processes(voc: VocFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cosa.data.check._BATCH", 2)
    monkeypatch.setattr("cosa.data.files._WORTH_A_PROCESS", 3)
    monkeypatch.setattr("os.sched_getaffinity", lambda _: {0, 1})
    voc.fill({f"{i}": [1] * (i + 1) for i in range(5)})
    told: list[tuple[str, int, int]] = []

    summary = check(voc.config(), ["train"], lambda *progress: told.append(progress))

    assert summary.splits[0].pixels[1] == 1 + 2 + 3 + 4 + 5
    assert told == [("train", 0, 0), ("train", 0, 5), ("train", 2, 5), ("train", 4, 5), ("train", 5, 5)]


# --- what is wrong ------------------------------------------------------------------------------------------


def test_everything_that_is_wrong_is_listed_and_not_the_first_alone(voc: VocFolder) -> None:
    voc.fill({"a": [1], "b": [77], "c": [1], "d": [1]})
    (voc.root / "SegmentationClassAug/c.png").unlink()
    voc.split("train", ["a", "b", "c", "d", "x", "y"])
    (voc.root / "JPEGImages/d.png").write_bytes(b"no image")
    voc.split("val", [])

    problems = checked(voc.config()).problems

    for said in ("got none for 'x'", "got none for 'y'", "got none for 'c'", "got 77", "d.png", "list 'val'"):
        assert sum(said in problem for problem in problems) == 1, said
    assert len(problems) == 6


def test_a_problem_that_two_splits_share_is_listed_once(voc: VocFolder) -> None:
    voc.fill({"a": [77]})
    voc.split("trainval", ["a"])

    assert len(checked(voc.config()).problems) == 1


def test_everything_that_is_wrong_with_own_data_is_listed(own: OwnFolder) -> None:
    own.fill("a.jpg,train,cat", "b.jpg,train,dgo", "c.jpg,train,cat", "d.jpg,val,dog")
    own.image("stray.jpg")
    own.image("e.jpg").write_bytes(b"")
    with (own.root / "labels.csv").open("a") as table:
        table.write("e.jpg,train,cat\na.jpg,val,cat\nshort,row\ngone.jpg,val,cat\n")
    (own.root / "classes.txt").write_text("cat\ndog\n")
    own.mask("a.png", size=(3, 3))
    own.mask("b.png")
    own.mask("e.png")

    problems = checked(own.config()).problems

    for said in (
        "got 'dgo' in line 3",
        "got none for 'stray.jpg'",
        "got 'a.jpg' in line 7",
        "got 2 in line 8",
        "got none for 'gone.jpg'",
        "got none for 'c.jpg'",
        "8x6 pixels, got 3x3",
        "e.jpg (",
    ):
        assert sum(said in problem for problem in problems) == 1, (said, problems)
    assert len(problems) == 9


def test_everything_that_is_wrong_with_coco_is_listed(coco: CocoFolder) -> None:
    for name in ("a.jpg", "b.jpg", "c.jpg", "d.jpg"):
        coco.object(coco.image(name), "cat", box(0, 0, 4, 4))
    (coco.root / "val2014/a.jpg").unlink()
    coco.images[1]["width"] = 7
    (coco.root / "val2014/c.jpg").write_bytes(b"no image")
    (coco.root / "annotations/instances_train2014.json").write_text("{")
    coco.write()

    summary = checked(coco.config())

    for said in ("got none for 'a.jpg'", "got 8x6 in", "c.jpg", "annotations must be JSON"):
        assert sum(said in problem for problem in summary.problems) == 1, said
    assert len(summary.problems) == 4
    assert [(s.name, s.images) for s in summary.splits] == [("val2014", 1)]


# --- which layout -------------------------------------------------------------------------------------------


def test_the_layout_is_told_by_the_files(voc: VocFolder, coco: CocoFolder, own: OwnFolder) -> None:
    own.table("a.jpg,train,cat")

    assert [detect_layout(data.root) for data in (voc, coco, own)] == ["voc", "coco", "folder"]


def test_a_folder_in_no_layout_is_told_what_it_holds(tmp_path: Path) -> None:
    (tmp_path / "holiday.jpg").touch()

    with pytest.raises(FileNotFoundError, match=r"must hold .*labels\.csv.*, which holds holiday\.jpg; see"):
        detect_layout(tmp_path)


# --- the command --------------------------------------------------------------------------------------------


def test_check_prints_the_counts_and_succeeds(own: OwnFolder, capsys: pytest.CaptureFixture[str]) -> None:
    own.fill("a.jpg,train,cat", "b.jpg,train,cat", "c.jpg,val,dog")
    own.mask("c.png", 2)

    code = cli.data(["check", str(own.root)])

    lines = [line.replace("|", " ").split() for line in capsys.readouterr().out.splitlines()]
    assert code == 0
    assert ["train:", "opening"] in lines
    assert any(line[:3] == ["train:", "2/2", "images"] for line in lines)
    assert ["cat", "2", "-", "0", "0.00"] in lines
    assert ["dog", "0", "-", "1", "100.00"] in lines
    assert lines[-1] == ["nothing", "is", "wrong"]


def test_check_lists_what_is_wrong_and_fails(own: OwnFolder, capsys: pytest.CaptureFixture[str]) -> None:
    own.fill("a.jpg,train,cat")
    own.table("a.jpg,train,cat", "x.jpg,train,cat", "y.jpg,train,cat")

    code = cli.data(["check", str(own.root)])

    assert code == cli.FAILED
    *_, first, second, last = capsys.readouterr().out.splitlines()
    assert "'x.jpg'" in first
    assert "'y.jpg'" in second
    assert last == "2 things wrong"


def test_one_split_can_be_checked_alone(own: OwnFolder, capsys: pytest.CaptureFixture[str]) -> None:
    own.fill("a.jpg,train,cat", "b.jpg,val,cat")
    (own.root / "images/b.jpg").write_bytes(b"")

    assert cli.data(["check", str(own.root), "--split", "train"]) == 0


@pytest.mark.parametrize("command", [["check"], ["show", "--out", "a.png"]])
def test_a_split_that_is_not_there_is_told_the_others(
    own: OwnFolder, capsys: pytest.CaptureFixture[str], command: list[str]
) -> None:
    own.fill("a.jpg,train,cat", "b.jpg,val,cat")

    assert cli.data([*command, str(own.root), "--split", "vla"]) == cli.MISTAKE
    assert "got 'vla'; there are: train, val; did you mean 'val'?" in capsys.readouterr().err


def test_a_mistyped_root_of_shapes_is_not_filled(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.data(["check", str(tmp_path / "gone"), "--layout", "shapes"]) == cli.MISTAKE
    assert not (tmp_path / "gone").exists()


def test_a_command_that_does_not_exist_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.data(["chek", "."]) == cli.MISTAKE
    assert "chek" in capsys.readouterr().err


def test_the_example_of_the_documentation_makes_a_data_set_without_fault(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (example,) = re.findall(r"```python\n(.+?)```", (ROOT / "docs/own-data.md").read_text(), re.DOTALL)

    exec(compile(example, "own-data.md", "exec"), {})

    assert cli.data(["check", "my-data"]) == 0
    shown = capsys.readouterr().out.replace("|", " ")
    assert ["all", "48", "12"] in [line.split() for line in shown.splitlines()]


def test_the_table_in_the_documentation_is_one_that_is_read(own: OwnFolder) -> None:
    (table,) = re.findall(r"```csv\n(.+?)```", (ROOT / "docs/own-data.md").read_text(), re.DOTALL)
    header, *rows = table.splitlines()
    assert header == "image,split,labels"

    dataset = open_dataset(own.fill(*rows).config(), "train")

    assert dataset.names == ("000", "001", "002")
    assert dataset.labels.sum(1).tolist() == [1, 2, 0]


def test_the_flags_in_the_documentation_exist() -> None:
    named = set(re.findall(r"--(\w+\.\w+)", (ROOT / "docs/own-data.md").read_text()))

    assert named
    assert named <= fields().keys()


# --- the picture --------------------------------------------------------------------------------------------


@pytest.fixture
def gallery_of(voc: VocFolder) -> Callable[[int, int], Image.Image]:
    for place in range(6):
        voc.image(f"{place}", np.full((6, 8, 3), 40 * place, np.uint8))
        voc.mask(f"{place}", [1])
    voc.split("train", [f"{place}" for place in range(6)])
    dataset = open_dataset(voc.config(), "train")
    return lambda count, seed: draw_sample(dataset, count, seed)


def test_a_sample_is_drawn_by_its_seed(gallery_of: Callable[[int, int], Image.Image]) -> None:
    first, again, other = (np.array(gallery_of(2, seed)) for seed in (0, 0, 1))

    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)


def test_a_sheet_grows_by_rows_of_four_and_shows_no_image_twice(
    gallery_of: Callable[[int, int], Image.Image],
) -> None:
    assert gallery_of(5, 0).height == gallery_of(99, 0).height > gallery_of(4, 0).height


def test_show_writes_a_picture_of_the_evaluated_split(
    own: OwnFolder, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own.fill("a.jpg,train,cat", "b.jpg,val,cat")
    own.mask("b.png")

    code = cli.data(["show", str(own.root), "--out", "new/sheet.png"])

    assert code == 0
    assert "1 of 1 images of val" in capsys.readouterr().out
    with Image.open(tmp_path / "new/sheet.png") as sheet:
        assert sheet.mode == "RGB"


def test_show_draws_images_that_have_no_masks(own: OwnFolder, tmp_path: Path) -> None:
    own.fill("a.jpg,train,cat")

    assert cli.data(["show", str(own.root), "--out", "sheet.png"]) == 0


def test_show_writes_no_file_of_another_kind(own: OwnFolder, capsys: pytest.CaptureFixture[str]) -> None:
    own.fill("a.jpg,train,cat")

    assert cli.data(["show", str(own.root), "--out", "sheet.txt"]) == cli.MISTAKE
    assert "--out must end in .png or .jpg, got 'sheet.txt'" in capsys.readouterr().err
