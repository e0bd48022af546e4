"""Reading own data: a folder of images beside a labels.csv, perhaps with classes.txt and masks."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from cosa.data import SegmentationDataset, open_dataset
from tests.cosa.data.own_folder import OwnFolder


@pytest.fixture
def own(tmp_path: Path) -> OwnFolder:
    return OwnFolder(tmp_path / "own")


def present(dataset: SegmentationDataset) -> list[list[str]]:
    return [[dataset.classes[i] for i, v in enumerate(row) if v] for row in dataset.labels.tolist()]


# --- the table ----------------------------------------------------------------------------------------------


def test_rows_give_labels_in_their_order(own: OwnFolder) -> None:
    own.fill("b.jpg,train,dog;cat", "a.png,train,cow", "c.jpg,val,cat")

    dataset = open_dataset(own.config(), "train")

    assert dataset.names == ("b", "a")
    assert [path.name for path in dataset.image_paths] == ["b.jpg", "a.png"]
    assert present(dataset) == [["cat", "dog"], ["cow"]]


def test_without_classes_txt_the_classes_are_the_labels_of_all_splits_sorted(own: OwnFolder) -> None:
    own.fill("a.jpg,train,dog", "b.jpg,val,cat;ant")

    assert open_dataset(own.config(), "train").classes == ("ant", "cat", "dog")


def test_classes_txt_fixes_the_classes_and_their_order(own: OwnFolder) -> None:
    own.fill("a.jpg,train,dog")
    (own.root / "classes.txt").write_text("dog\nzebra\ncat\n")

    dataset = open_dataset(own.config(), "train")

    assert dataset.classes == ("dog", "zebra", "cat")
    assert dataset.labels.tolist() == [[1.0, 0.0, 0.0]]


def test_an_empty_cell_is_an_image_without_objects(own: OwnFolder) -> None:
    own.fill("a.jpg,train,", "b.jpg,train,cat")

    assert present(open_dataset(own.config(), "train")) == [[], ["cat"]]


def test_blanks_empty_lines_and_repeated_labels_do_no_harm(own: OwnFolder) -> None:
    own.image("a.jpg")
    own.table("", " a.jpg , train , cat ; cat; big dog ;", ",,", "")

    assert present(open_dataset(own.config(), "train")) == [["big dog", "cat"]]


def test_a_table_saved_by_a_spreadsheet_of_windows_is_read(own: OwnFolder) -> None:
    own.fill("a.jpg,train,cat")
    (own.root / "labels.csv").write_bytes('\ufeffimage,split,labels\r\n"a.jpg",train,"Käse;cat"\r\n'.encode())

    assert present(open_dataset(own.config(), "train")) == [["Käse", "cat"]]


def test_images_may_lie_in_subfolders(own: OwnFolder) -> None:
    own.fill("x/a.jpg,train,cat", "y/a.jpg,train,dog")
    own.mask("x/a.png", 1)
    own.mask("y/a.png", 2)

    dataset = open_dataset(own.config(), "train")

    assert dataset.names == ("x/a", "y/a")
    assert [int(dataset.mask(i)[0, 0]) for i in range(2)] == [1, 2]


def test_other_files_among_the_images_do_no_harm(own: OwnFolder) -> None:
    own.fill("a.jpg,train,cat")
    (own.root / "images/Thumbs.db").write_bytes(b"x")

    assert len(open_dataset(own.config(), "train")) == 1


# --- masks --------------------------------------------------------------------------------------------------


def test_a_split_may_be_without_masks(own: OwnFolder) -> None:
    own.fill("a.jpg,train,cat", "b.jpg,val,cat")
    own.mask("b.png")

    assert [open_dataset(own.config(), split).has_masks for split in ("train", "val")] == [False, True]


def test_a_split_of_which_only_some_images_have_masks_is_refused(own: OwnFolder) -> None:
    own.fill("a.jpg,val,cat", "b.jpg,val,cat", "c.jpg,val,cat")
    own.mask("b.png")

    with pytest.raises(FileNotFoundError, match=r"must have a mask in .*, got 2 missing of 3, first 'a.jpg'"):
        open_dataset(own.config(), "val")


def test_a_caller_that_needs_masks_is_told_there_are_none(own: OwnFolder) -> None:
    own.fill("a.jpg,train,cat")

    with pytest.raises(FileNotFoundError, match=r"got 1 missing of 1, first 'a.jpg'"):
        open_dataset(own.config(), "train", needs="masks")


def test_a_bad_mask_of_the_evaluated_split_is_found_on_opening(own: OwnFolder) -> None:
    own.fill("a.jpg,val,cat")
    own.mask("a.png", 2)

    with pytest.raises(ValueError, match=r"classes in \[0, 1\] or 255, got 2"):
        open_dataset(own.config(), "val")


def test_masks_are_found_whatever_the_case_of_their_names(own: OwnFolder) -> None:
    own.fill("farm/000.jpg,val,cat", "Dog.JPG,val,dog")
    own.mask("farm/000.PNG", 1)
    own.mask("dog.png", 2)
    (own.root / "masks").rename(own.root / "Masks")

    dataset = open_dataset(own.config(), "val")

    assert [int(dataset.mask(index).max()) for index in range(2)] == [1, 2]


@pytest.mark.parametrize("name", ["000_mask.png", "elsewhere/000.png"])
def test_masks_that_all_belong_to_no_image_are_not_passed_over(own: OwnFolder, name: str) -> None:
    own.fill("000.jpg,val,cat")
    own.mask(name)

    with pytest.raises(ValueError, match=r"got 1 in .* that belong to none, .* 1 of 1 images without a mask"):
        open_dataset(own.config(), "val")


@pytest.mark.parametrize("file", ["classes.txt", "labels.csv"])
def test_the_background_is_no_class(own: OwnFolder, file: str) -> None:
    own.fill("a.jpg,val,cat;Background" if file == "labels.csv" else "a.jpg,val,cat")
    if file == "classes.txt":
        (own.root / file).write_text("Background\ncat\n")

    with pytest.raises(ValueError, match=f"got 'Background' in .*{file}; take it out"):
        open_dataset(own.config(), "val")


def test_images_alone_need_no_masks_and_have_no_labels(own: OwnFolder) -> None:
    own.fill("a.jpg,test,", "b.jpg,test,", "c.jpg,train,cat")
    own.mask("a.png")

    dataset = open_dataset(own.config(), "test", needs="images")

    assert not dataset.has_masks
    assert dataset.labels.tolist() == [[0.0], [0.0]]


# --- bad folders: one line that says what, where and what to do ---------------------------------------------


def complaint(own: OwnFolder, split: str = "train", kind: type[Exception] = ValueError) -> str:
    with pytest.raises(kind) as caught:
        open_dataset(own.config(), split)
    assert type(caught.value) is kind
    text = str(caught.value)
    assert "\n" not in text
    assert "; " in text  # the remedy
    return text


def test_a_root_that_is_no_folder_is_named(own: OwnFolder) -> None:
    assert f"got {str(own.root)!r}, which does not exist" in complaint(own, kind=FileNotFoundError)


def test_a_folder_without_images_is_told_what_it_holds(own: OwnFolder) -> None:
    own.table("a.jpg,train,cat")

    assert "must hold images and labels.csv, got" in complaint(own, kind=FileNotFoundError)
    assert "which holds labels.csv" in complaint(own, kind=FileNotFoundError)


def test_an_empty_image_folder_is_named(own: OwnFolder) -> None:
    own.table("a.jpg,train,cat")
    (own.root / "images").mkdir()

    assert "must hold JPEGs or PNGs, got none" in complaint(own, kind=FileNotFoundError)


def test_a_missing_table_is_named_with_its_header(own: OwnFolder) -> None:
    own.image("a.jpg")

    text = complaint(own, kind=FileNotFoundError)

    assert str(own.root / "labels.csv") in text
    assert "image,split,labels" in text


@pytest.mark.parametrize("header", ["image;split;labels", "name,split,labels", "a.jpg,train,cat", ""])
def test_another_header_is_shown_beside_the_right_one(own: OwnFolder, header: str) -> None:
    own.image("a.jpg")
    own.table("a.jpg,train,cat", header=header)

    text = complaint(own)

    assert f"must begin with the line image,split,labels, got {header!r}" in text


@pytest.mark.parametrize("content", [b"image,split,labels\na.jpg,train,K\xe4se\n", b"\xff\xfe\x00"])
def test_a_table_in_another_encoding_is_refused(own: OwnFolder, content: bytes) -> None:
    own.image("a.jpg")
    (own.root / "labels.csv").write_bytes(content)

    assert "must be a table in UTF-8" in complaint(own)


def test_a_table_without_rows_is_refused(own: OwnFolder) -> None:
    own.image("a.jpg")
    own.table()

    assert "must have a row per image, got none" in complaint(own)


@pytest.mark.parametrize(("row", "columns"), [("a.jpg,train,cat,dog", 4), ("a.jpg,train", 2)])
def test_a_row_of_other_columns_is_told_its_line(own: OwnFolder, row: str, columns: int) -> None:
    own.fill("b.jpg,train,cat")
    own.table("b.jpg,train,cat", row)

    assert f"must have 3 columns, got {columns} in line 3" in complaint(own)


@pytest.mark.parametrize("row", [",train,cat", "a.jpg,,cat"])
def test_a_row_without_image_or_split_is_told_its_line(own: OwnFolder, row: str) -> None:
    own.fill("a.jpg,train,cat")
    own.table(row)

    assert "in line 2" in complaint(own)


@pytest.mark.parametrize("again", ["a.jpg", "a.png"])
def test_two_rows_for_one_image_or_one_name_are_refused(own: OwnFolder, again: str) -> None:
    own.fill("a.jpg,train,cat", f"{again},val,cat")

    assert f"got {again!r} in line 3 after 'a.jpg' in line 2" in complaint(own)


def test_a_split_that_nobody_names_is_told_the_others(own: OwnFolder) -> None:
    own.fill("a.jpg,train,cat", "b.jpg,val,cat")

    assert "got 'trian'; there are: train, val; did you mean 'train'?" in complaint(own, "trian")


def test_images_without_a_row_are_counted_and_listed(own: OwnFolder) -> None:
    own.fill("a.jpg,train,cat")
    for name in "bcdefgh":
        own.image(f"{name}.jpg")

    text = complaint(own)

    assert "got 7 missing of 8, first 'b.jpg'" in text


def test_rows_without_image_are_counted_and_the_first_named(own: OwnFolder) -> None:
    own.fill("a.jpg,train,cat")
    own.table("x.jpg,train,cat", "a.jpg,train,cat", "y.jpg,train,cat")

    assert "got 2 missing of 3, first 'x.jpg'" in complaint(own, kind=FileNotFoundError)


def test_a_label_that_is_no_class_is_told_the_nearest(own: OwnFolder) -> None:
    own.fill("a.jpg,train,cat", "b.jpg,train,dgo")
    (own.root / "classes.txt").write_text("cat\ndog\n")

    text = complaint(own)

    assert "got 'dgo' in line 3" in text
    assert "did you mean 'dog'?" in text


def test_a_table_without_any_label_is_refused(own: OwnFolder) -> None:
    own.fill("a.jpg,train,")

    assert "must use 1 to 254 labels, got 0" in complaint(own)


def test_a_mask_of_another_size_is_named(own: OwnFolder) -> None:
    own.fill("a.jpg,val,cat")
    path = own.mask("a.png", size=(6, 8))

    text = complaint(own, "val")

    assert "8x6 pixels, got 6x8" in text
    assert str(path) in text


def test_reading_leaves_the_folder_as_it_was(own: OwnFolder) -> None:
    own.fill("a.jpg,val,cat")
    own.mask("a.png")
    before = {p: p.stat().st_mtime_ns for p in own.root.rglob("*")}

    dataset = open_dataset(own.config(), "val")

    assert np.array_equal(dataset.mask(0), np.ones((6, 8), np.uint8))
    assert {p: p.stat().st_mtime_ns for p in own.root.rglob("*")} == before
