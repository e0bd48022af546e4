"""Reading the COCO layout: categories, labels, painting order, crowds, the cache, and bad files."""

from __future__ import annotations

import json
import logging
import multiprocessing
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageDraw
from pycocotools.coco import COCO

from cosa.data import SegmentationDataset, coco_masks, open_dataset
from cosa.data.coco import COCO_CATEGORIES, COCO_CLASSES
from tests.cosa.data.coco_folder import CocoFolder, box, run_lengths

CAT, DOG, PERSON = (COCO_CLASSES.index(name) + 1 for name in ("cat", "dog", "person"))


@pytest.fixture
def coco(tmp_path: Path) -> CocoFolder:
    return CocoFolder(tmp_path / "coco")


def opened(coco: CocoFolder) -> SegmentationDataset:
    return open_dataset(coco.write().config(), "val2014")


def present(dataset: SegmentationDataset) -> list[list[str]]:
    return [[COCO_CLASSES[i] for i, v in enumerate(row) if v] for row in dataset.labels.tolist()]


# --- classes and labels -------------------------------------------------------------------------------------


def test_there_are_80_classes_whose_ids_leave_out_ten_of_90() -> None:
    assert len(COCO_CLASSES) == len(set(COCO_CLASSES)) == len(COCO_CATEGORIES) == 80
    assert sorted({*range(1, 91)} - {*COCO_CATEGORIES}) == [12, 26, 29, 30, 45, 66, 68, 69, 71, 83]


@pytest.mark.parametrize(
    ("category", "name", "value"),
    [(1, "person", 1), (11, "fire hydrant", 11), (13, "stop sign", 12), (67, "dining table", 61),
     (90, "toothbrush", 80)],
)  # fmt: skip
def test_a_category_id_becomes_a_class_without_gaps(category: int, name: str, value: int) -> None:
    place = COCO_CATEGORIES.index(category)

    assert (COCO_CLASSES[place], place + 1) == (name, value)


def test_labels_are_the_classes_of_all_annotations_each_once(coco: CocoFolder) -> None:
    image = coco.image()
    for name in ("dog", "cat", "dog"):
        coco.object(image, name, box(0, 0, 2, 2))

    assert present(opened(coco)) == [["cat", "dog"]]


def test_a_crowd_counts_among_the_labels(coco: CocoFolder) -> None:
    coco.object(coco.image(), "person", run_lengths(np.ones((6, 8), bool)), crowd=True)

    assert present(opened(coco)) == [["person"]]


def test_an_image_without_annotations_has_no_label_and_a_mask_of_background(coco: CocoFolder) -> None:
    coco.image()

    dataset = opened(coco)

    assert present(dataset) == [[]]
    assert np.array_equal(dataset.mask(0), np.zeros((6, 8), np.uint8))


def test_an_image_without_an_object_is_left_out_unless_it_is_to_stay(coco: CocoFolder) -> None:
    coco.object(coco.image("a.jpg"), "cat", box(0, 0, 2, 2))
    coco.image("b.jpg")
    coco.object(coco.image("c.jpg"), "dog", box(0, 0, 2, 2))
    coco.write()

    labelled = open_dataset(coco.config(keep_empty=False), "val2014")
    everything = open_dataset(coco.config(), "val2014")

    assert (labelled.names, everything.names) == (("a", "c"), ("a", "b", "c"))
    assert np.array_equal(everything.mask(1), np.zeros((6, 8), np.uint8))
    assert np.array_equal(labelled.mask(1), everything.mask(2))


def test_masks_of_all_images_serve_those_with_an_object_where_nothing_can_be_written(
    coco: CocoFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    coco.object(coco.image("a.jpg"), "cat", box(0, 0, 2, 2))
    coco.image("b.jpg")
    opened(coco)
    monkeypatch.setattr(coco_masks, "write_atomically", refused)

    labelled = open_dataset(coco.config(keep_empty=False), "val2014")

    assert labelled.names == ("a",)


def refused(*_: object, **__: object) -> None:
    """Stands for writing into a cache that is complete."""
    raise AssertionError("a complete cache must not be written")


def test_a_split_without_any_object_is_refused_with_the_setting_that_keeps_it(coco: CocoFolder) -> None:
    coco.image()

    with pytest.raises(ValueError, match=r"must hold an image with an object.+set data.keep_empty"):
        open_dataset(coco.write().config(keep_empty=False), "val2014")


def test_images_come_in_the_order_of_their_names(coco: CocoFolder) -> None:
    for name in ("c.jpg", "a.jpg", "b.jpg"):
        coco.object(coco.image(name), {"a": "cat", "b": "dog", "c": "cow"}[name[0]], box(0, 0, 4, 4))

    dataset = opened(coco)

    assert dataset.names == ("a", "b", "c")
    assert present(dataset) == [["cat"], ["dog"], ["cow"]]
    assert [path.stem for path in (*dataset.image_paths, *dataset.mask_paths)] == ["a", "b", "c"] * 2


# --- masks --------------------------------------------------------------------------------------------------


def test_a_box_is_drawn_where_it_is(coco: CocoFolder) -> None:
    coco.object(coco.image(), "cat", box(2, 1, 5, 4))
    expected = np.zeros((6, 8), np.uint8)
    expected[1:4, 2:5] = CAT

    assert np.array_equal(opened(coco).mask(0), expected)


def test_all_polygons_of_an_object_are_drawn(coco: CocoFolder) -> None:
    coco.object(coco.image(), "cat", [*box(0, 0, 2, 2), *box(6, 4, 8, 6)])

    mask = opened(coco).mask(0)

    assert (mask == CAT).sum() == 8
    assert mask[0, 0] == mask[5, 7] == CAT


@pytest.mark.parametrize("order", [("dog", "cat"), ("cat", "dog")])
def test_the_smaller_object_is_painted_over_the_larger_one(coco: CocoFolder, order: tuple[str, str]) -> None:
    image, boxes = coco.image(), {"dog": box(0, 0, 8, 6), "cat": box(2, 2, 4, 4)}
    for name in order:
        coco.object(image, name, boxes[name])

    mask = opened(coco).mask(0)

    assert (mask == CAT).sum() == 4
    assert (mask == DOG).sum() == 48 - 4


@pytest.mark.parametrize(("cat_id", "winner"), [(5, DOG), (11, CAT)])
def test_of_two_objects_of_one_size_the_later_id_is_on_top(
    coco: CocoFolder, cat_id: int, winner: int
) -> None:
    image = coco.image()
    coco.object(image, "cat", box(0, 0, 4, 4), id=cat_id)
    coco.object(image, "dog", box(0, 0, 4, 4), id=9)

    assert opened(coco).mask(0)[1, 1] == winner


def test_a_crowd_is_not_counted_where_no_single_object_covers_it(coco: CocoFolder) -> None:
    image = coco.image()
    coco.object(image, "person", box(0, 0, 6, 6))  # larger than the crowd, and yet on top of it
    crowd = np.zeros((6, 8), bool)
    crowd[:2] = True
    coco.object(image, "person", run_lengths(crowd), crowd=True)
    expected = np.zeros((6, 8), np.uint8)
    expected[:2] = 255
    expected[:, :6] = PERSON

    assert np.array_equal(opened(coco).mask(0), expected)


def test_run_lengths_are_read_columns_first(coco: CocoFolder) -> None:
    inside = np.zeros((6, 8), bool)
    inside[1, 3:6] = inside[4, 0] = True
    coco.object(coco.image(), "cat", run_lengths(inside))

    assert np.array_equal(opened(coco).mask(0) == CAT, inside)


@pytest.mark.parametrize("segmentation", [[], [[1, 1, 5, 5]]])
def test_an_object_without_area_is_a_label_alone(coco: CocoFolder, segmentation: list[list[int]]) -> None:
    coco.object(coco.image(), "cat", segmentation)

    dataset = opened(coco)

    assert present(dataset) == [["cat"]]
    assert not dataset.mask(0).any()


@pytest.mark.parametrize(("mode", "expected"), [("L", (90, 90, 90)), ("CMYK", (0, 255, 255))])
def test_grayscale_and_cmyk_images_are_read_as_rgb(
    coco: CocoFolder, mode: str, expected: tuple[int, int, int]
) -> None:
    coco.image(mode=mode)

    assert np.abs(opened(coco).image(0).astype(int) - expected).max() <= 4  # of a JPEG


# --- what is needed -----------------------------------------------------------------------------------------


def test_training_on_labels_draws_no_mask(coco: CocoFolder) -> None:
    coco.object(coco.image(), "cat", box(0, 0, 4, 4))

    dataset = open_dataset(coco.write().config(val_split="other"), "val2014")

    assert not dataset.has_masks
    assert not list(coco.cache.rglob("*.png"))


def test_a_training_split_has_masks_where_they_are_needed(coco: CocoFolder) -> None:
    coco.object(coco.image(), "cat", box(0, 0, 4, 4))

    assert open_dataset(coco.write().config(val_split="other"), "val2014", needs="masks").has_masks


def test_images_alone_need_no_annotations(coco: CocoFolder) -> None:
    coco.image("b.jpg")
    coco.image("a.jpg")

    dataset = open_dataset(coco.config(), "val2014", needs="images")

    assert dataset.names == ("a", "b")
    assert dataset.labels.shape == (2, 80)
    assert not dataset.labels.any()


def test_the_fingerprint_does_not_depend_on_whether_masks_are_drawn(coco: CocoFolder) -> None:
    coco.object(coco.image(), "cat", box(0, 0, 4, 4))
    data = coco.write().config(val_split="other")

    before = open_dataset(data, "val2014").fingerprint()

    assert open_dataset(data, "val2014", needs="masks").fingerprint() == before


def test_the_fingerprint_tells_a_changed_outline(coco: CocoFolder) -> None:
    coco.object(coco.image(), "cat", box(0, 0, 4, 4))
    before = opened(coco).fingerprint()
    coco.annotations[0]["segmentation"] = box(0, 0, 5, 4)

    assert opened(coco).fingerprint() != before


# --- the cache ----------------------------------------------------------------------------------------------


def test_another_annotation_file_meets_no_stale_mask(coco: CocoFolder) -> None:
    coco.object(coco.image(), "cat", box(0, 0, 4, 4))
    opened(coco)
    coco.annotations[0]["category_id"] = 18

    dataset = opened(coco)

    assert present(dataset) == [["dog"]]
    assert set(np.unique(dataset.mask(0))) == {0, DOG}


def test_the_annotation_file_is_parsed_once(coco: CocoFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    coco.object(coco.image(), "cat", box(0, 0, 4, 4))
    first = opened(coco)
    monkeypatch.setattr("cosa.data.coco.read_annotations", lambda path: pytest.fail(f"parsed {path} again"))

    second = open_dataset(coco.config(), "val2014")

    assert present(second) == present(first)
    assert np.array_equal(second.mask(0), first.mask(0))


def test_drawing_that_was_ended_half_way_goes_on_with_what_is_missing(coco: CocoFolder) -> None:
    for name in ("a.jpg", "b.jpg"):
        coco.object(coco.image(name), "cat", box(0, 0, 4, 4))
    drawn = opened(coco).mask_paths
    (drawn[0].parents[1] / "complete").unlink()
    drawn[1].unlink()
    kept = drawn[0].stat().st_mtime_ns

    dataset = opened(coco)

    assert dataset.mask(1).any()
    assert drawn[0].stat().st_mtime_ns == kept
    assert (drawn[0].parents[1] / "complete").is_file()


def test_masks_are_not_complete_while_one_cannot_be_drawn(coco: CocoFolder) -> None:
    coco.image("a.jpg")
    coco.image("b.jpg")
    coco.images[1]["width"] = 7

    with pytest.raises(ValueError, match="size"):
        opened(coco)

    assert not list(coco.cache.rglob("complete"))


def _open_in_a_process(coco: CocoFolder, barrier: object) -> None:
    barrier.wait()  # type: ignore[attr-defined]
    dataset = open_dataset(coco.config(), "val2014")
    assert all(dataset.mask(i).any() for i in range(len(dataset)))


def test_several_processes_may_open_a_fresh_cache_at_once(coco: CocoFolder) -> None:
    for number in range(5):
        coco.object(coco.image(f"{number}.jpg"), "cat", box(0, 0, 4, 4))
    coco.write()
    context = multiprocessing.get_context("fork")
    barrier = context.Barrier(3)
    processes = [context.Process(target=_open_in_a_process, args=(coco, barrier)) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()

    assert [process.exitcode for process in processes] == [0, 0, 0]
    assert len(list(coco.cache.rglob("*.png"))) == 5
    assert not list(coco.cache.rglob("*.part"))


def test_many_masks_are_drawn_by_several_processes(coco: CocoFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cosa.data.files._WORTH_A_PROCESS", 2)
    monkeypatch.setattr("os.sched_getaffinity", lambda _: {0, 1})
    for number in range(4):
        coco.object(coco.image(f"{number}.jpg"), "cat", box(0, 0, number + 1, 1))

    dataset = opened(coco)

    assert [int((dataset.mask(i) == CAT).sum()) for i in range(4)] == [1, 2, 3, 4]


def test_a_complete_cache_is_read_where_nothing_can_be_written(coco: CocoFolder) -> None:
    coco.image()
    opened(coco)
    folder = next(coco.cache.iterdir())
    (folder / "lock").unlink()

    open_dataset(coco.config(), "val2014")

    assert not (folder / "lock").exists()


def test_a_cache_that_cannot_be_written_is_named(coco: CocoFolder) -> None:
    coco.image()
    coco.cache.write_text("in the way")

    with pytest.raises(
        OSError, match=r"^data\.cache must be a folder that can be written, got .*cache.*; set"
    ):
        opened(coco)


# --- bad data: one line that says what, where and what to do ------------------------------------------------


def complaint(coco: CocoFolder, kind: type[Exception] = ValueError) -> str:
    with pytest.raises(kind) as caught:
        open_dataset(coco.config(), "val2014")
    assert type(caught.value) is kind
    text = str(caught.value)
    assert "\n" not in text
    assert "; " in text  # the remedy
    return text


def test_a_missing_split_is_told_those_that_are_there(coco: CocoFolder) -> None:
    with pytest.raises(
        FileNotFoundError, match=r"got 'val2O14'; there are: train2014, val2014; did you mean"
    ):
        open_dataset(coco.config(), "val2O14")


def test_a_missing_root_is_named(coco: CocoFolder, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"COCO layout, got '.*gone', which does not exist; set"):
        open_dataset(coco.config(root=str(tmp_path / "gone")), "val2014")


def test_missing_annotations_are_told_where_they_should_be(coco: CocoFolder) -> None:
    coco.image()

    text = complaint(coco, FileNotFoundError)

    assert str(coco.path) in text
    assert "those of: no split" in text


@pytest.mark.parametrize("content", ["", "{", '{"images": [', "\x00"])
def test_broken_json_is_named(coco: CocoFolder, content: str) -> None:
    coco.path.write_text(content)

    assert f"annotations must be JSON, got {coco.path}" in complaint(coco)


@pytest.mark.parametrize("missing", ["images", "annotations", "categories"])
def test_json_of_another_format_is_told_what_it_lacks(coco: CocoFolder, missing: str) -> None:
    coco.image()
    coco.write(**{missing: None})

    assert f"without '{missing}'" in complaint(coco)


@pytest.mark.parametrize("content", ["[]", "7", '{"images": 1, "annotations": 2, "categories": 3}'])
def test_json_of_another_shape_is_refused(coco: CocoFolder, content: str) -> None:
    coco.path.write_text(content)

    assert "annotations must be COCO's" in complaint(coco)


def test_captions_are_no_instances(coco: CocoFolder) -> None:
    coco.write(images=[{"id": 1, "file_name": "a.jpg", "height": 6, "width": 8}],
               annotations=[{"id": 1, "image_id": 1, "category_id": 1, "caption": "x"}])  # fmt: skip

    assert "annotations must be COCO's" in complaint(coco)


def test_other_categories_are_refused_with_the_first_that_differs(coco: CocoFolder) -> None:
    content = json.loads(coco.write().path.read_text())
    content["categories"][16]["name"] = "kitten"
    coco.path.write_text(json.dumps(content))

    assert "got 'kitten' for id 18" in complaint(coco)


def test_an_unknown_category_is_named(coco: CocoFolder) -> None:
    coco.object(coco.image(), "cat", box(0, 0, 4, 4))
    coco.annotations[0]["category_id"] = 12
    coco.write()

    assert "got category_id 12 in annotation 1" in complaint(coco)


def test_an_annotation_of_no_image_is_named(coco: CocoFolder) -> None:
    coco.object(7, "cat", box(0, 0, 4, 4))
    coco.write()

    assert "got image_id 7 in annotation 1" in complaint(coco)


def test_polygons_that_are_no_numbers_are_refused(coco: CocoFolder) -> None:
    coco.object(coco.image(), "cat", [["x", "y"] * 4])
    coco.write()

    assert "polygons must be lists of numbers" in complaint(coco)


def test_images_that_are_not_there_are_counted_and_the_first_named(coco: CocoFolder) -> None:
    for name in ("a.jpg", "b.jpg", "c.jpg"):
        coco.image(name)
        (coco.root / "val2014" / name).unlink()
    coco.image("d.jpg")
    coco.write()

    assert "got 3 missing of 4, first 'a.jpg'" in complaint(coco, FileNotFoundError)


def test_an_image_of_another_size_than_annotated_is_told_both_sizes(coco: CocoFolder) -> None:
    coco.image()
    coco.images[0]["width"] = 7
    coco.write()

    text = complaint(coco)

    assert "7x6 pixels, got 8x6" in text
    assert "a.jpg" in text


def test_run_lengths_of_another_size_are_named(coco: CocoFolder) -> None:
    coco.object(coco.image(), "cat", run_lengths(np.ones((8, 6), bool)), id=42)
    coco.write()

    text = complaint(coco)

    assert "got size [8, 6] (rows, columns) in annotation 42" in text


FILLING = [0, 12, 36]


@pytest.mark.parametrize(
    "wrong",
    [
        {"counts": [0, 12, 35]},
        {"counts": [0, 12, 37]},
        {"counts": [60, -12]},
        {"counts": [0.0, 12.0, 36.0]},
        {"counts": [True, 47]},
        {"counts": "0<S1"},
        {"counts": "~"},
        {"counts": None},
        {"size": [6.0, 8.0]},
        {"size": 48},
    ],
)
def test_run_lengths_that_do_not_fill_their_image_are_named(coco: CocoFolder, wrong: dict[str, Any]) -> None:
    coco.object(coco.image(), "cat", {"size": [6, 8], "counts": FILLING} | wrong, id=42)
    coco.write()

    text = complaint(coco)

    assert text.startswith("run lengths must")
    assert "in annotation 42" in text


def test_compressed_run_lengths_are_those_that_are_listed(coco: CocoFolder) -> None:
    from pycocotools import mask as library

    inside = np.random.default_rng(3).random((60, 80)) < 0.5
    inside[:, 20:60] = True  # a run that takes several characters
    compressed = library.encode(np.asfortranarray(inside.astype(np.uint8)))["counts"].decode()
    coco.object(coco.image(size=(80, 60)), "cat", {"size": [60, 80], "counts": compressed})

    assert np.array_equal(opened(coco).mask(0) == CAT, inside)


@pytest.mark.parametrize("polygon", [[1, 1, 5, 1, 5], [1, 1, 5, 1, 5, 5, 2], [1, 1, 5, 1, float("nan"), 5]])
def test_a_polygon_that_is_no_list_of_points_is_named(coco: CocoFolder, polygon: list[float]) -> None:
    coco.object(coco.image(), "cat", [box(0, 0, 2, 2)[0], polygon], id=42)
    coco.write()

    assert "polygon must be finite numbers x, y, x, y" in complaint(coco)


@pytest.mark.parametrize("segmentation", [None, "text", 3])
def test_a_segmentation_that_is_none_is_named(coco: CocoFolder, segmentation: object) -> None:
    coco.object(coco.image(), "cat", segmentation, id=42)
    coco.write()

    assert "segmentation must be polygons or run lengths, got" in complaint(coco)


@pytest.mark.parametrize(
    ("part", "field"),
    [("annotations", key) for key in ("id", "image_id", "category_id", "iscrowd")]
    + [("images", key) for key in ("id", "file_name", "height", "width")]
    + [("categories", key) for key in ("id", "name")],
)
@pytest.mark.parametrize("value", [None, 1.5, [1], {"a": 1}])
def test_a_field_of_a_wrong_type_is_named(coco: CocoFolder, part: str, field: str, value: object) -> None:
    coco.object(coco.image(), "cat", box(0, 0, 4, 4))
    content = json.loads(coco.write().path.read_text())
    content[part][0][field] = value
    coco.path.write_text(json.dumps(content))

    assert f"with {part}.0.{field} " in complaint(coco)


def test_an_image_named_twice_is_refused(coco: CocoFolder) -> None:
    coco.image()
    coco.image()
    coco.write()

    assert "got one twice" in complaint(coco)


def test_reading_leaves_the_folder_as_it_was(coco: CocoFolder) -> None:
    coco.object(coco.image(), "cat", box(0, 0, 4, 4))
    coco.write()
    before = {p: p.stat().st_mtime_ns for p in coco.root.rglob("*")}

    open_dataset(coco.config(), "val2014").mask(0)

    assert {p: p.stat().st_mtime_ns for p in coco.root.rglob("*")} == before


# --- the real images ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def real_root(real_data: Path) -> Path:
    root = real_data / "data/coco2014"
    if not root.is_dir():
        pytest.skip("needs COCO 2014 in COSA_TEST_DATA/data/coco2014")
    return root


@pytest.fixture(scope="module")
def real(real_root: Path, tmp_path_factory: pytest.TempPathFactory) -> SegmentationDataset:
    """The real val2014, its masks drawn into a fresh cache."""
    coco = CocoFolder(tmp_path_factory.mktemp("real") / "coco")
    return open_dataset(coco.config(root=str(real_root)), "val2014")


@pytest.fixture(scope="module")
def annotated(real_root: Path) -> dict[str, list[dict[str, Any]]]:
    """The real annotations by the stem of their image, as the file holds them."""
    content = json.loads((real_root / "annotations/instances_val2014.json").read_text())
    stems = {image["id"]: Path(image["file_name"]).stem for image in content["images"]}
    found: dict[str, list[dict[str, Any]]] = {stem: [] for stem in stems.values()}
    names = {category["id"]: category["name"] for category in content["categories"]}
    for item in content["annotations"]:
        found[stems[item["image_id"]]].append(item | {"name": names[item["category_id"]]})
    return found


def test_real_labels_are_the_names_that_the_annotations_give(
    real: SegmentationDataset, annotated: dict[str, list[dict[str, Any]]]
) -> None:
    counted = Counter(name for items in annotated.values() for name in {item["name"] for item in items})

    assert len(real) == len(annotated)
    assert dict(zip(real.classes, real.labels.sum(0).int().tolist(), strict=True)) == {
        name: counted[name] for name in COCO_CLASSES
    }


def test_real_images_and_masks_agree_in_size(real: SegmentationDataset) -> None:
    assert all(real.image(i).shape[:2] == real.mask(i).shape for i in range(len(real)))


def test_real_masks_show_what_pillow_draws_of_the_polygons(
    real: SegmentationDataset, annotated: dict[str, list[dict[str, Any]]]
) -> None:
    agreement = []
    for place, name in enumerate(real.names):
        if any(item["iscrowd"] for item in annotated[name]):
            continue
        mask = real.mask(place)
        expected = Image.new("L", mask.shape[::-1])
        draw = ImageDraw.Draw(expected)
        for item in sorted(annotated[name], key=lambda item: -item["area"]):
            for polygon in item["segmentation"]:
                draw.polygon(polygon, fill=COCO_CLASSES.index(item["name"]) + 1)
        agreement.append((mask == np.array(expected)).mean())

    assert len(agreement) > 100
    assert min(agreement) > 0.95  # outlines differ by a pixel
    assert np.mean(agreement) > 0.985


def test_real_pixels_that_are_not_counted_lie_in_crowds_alone(
    real_root: Path, real: SegmentationDataset
) -> None:
    reference = COCO(real_root / "annotations/instances_val2014.json")
    by_stem = {Path(image["file_name"]).stem: image["id"] for image in reference.dataset["images"]}
    crowded = 0
    for place, name in enumerate(real.names):
        mask = real.mask(place)
        items = reference.loadAnns(reference.getAnnIds(imgIds=by_stem[name]))
        crowd, single = np.zeros_like(mask, bool), np.zeros_like(mask, bool)
        for item in items:
            (crowd if item["iscrowd"] else single)[reference.annToMask(item) > 0] = True
        assert np.array_equal(mask == 255, crowd & ~single), name
        crowded += bool(crowd.any())

    assert crowded > 5


def test_drawing_masks_is_a_notice_and_no_warning(coco: CocoFolder, caplog: pytest.LogCaptureFixture) -> None:
    coco.object(coco.image(), "cat", box(0, 0, 4, 4))

    with caplog.at_level(logging.INFO, "cosa"):
        opened(coco)

    (record,) = caplog.records
    assert record.levelno == logging.INFO
    assert record.getMessage().startswith("drawing the masks of 1 images, once, into ")
