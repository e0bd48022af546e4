"""Reading the VOC layout: what counts as an image, a label and a mask, and what a bad folder is told."""

from __future__ import annotations

import io
import shutil
import struct
import zlib
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from cosa.config import DataConfig
from cosa.data import VOC_CLASSES, open_dataset
from cosa.data.dataset import palette, read_image, to_rgb
from tests.cosa.data.voc_folder import VocFolder


@pytest.fixture
def voc(tmp_path: Path) -> VocFolder:
    return VocFolder(tmp_path / "voc")


def present(labels: torch.Tensor) -> list[list[str]]:
    return [[VOC_CLASSES[i] for i, value in enumerate(row) if value] for row in labels.tolist()]


# --- labels and masks ---------------------------------------------------------------------------------------


def test_labels_are_the_classes_of_the_mask_without_background_and_border(voc: VocFolder) -> None:
    voc.fill({"a": [0, 1, 1, 255], "b": [20, 3]})

    dataset = open_dataset(voc.config(), "train")

    assert present(dataset.labels) == [["aeroplane"], ["bird", "tvmonitor"]]


def test_an_image_of_background_alone_has_no_label(voc: VocFolder) -> None:
    dataset = open_dataset(voc.fill({"a": [0, 255]}).config(), "train")

    assert dataset.labels.tolist() == [[0.0] * 20]


def test_annotations_decide_the_labels_where_they_are_there(voc: VocFolder) -> None:
    voc.fill({"a": [1]})
    voc.annotation("a", ["cat", "cat"])

    assert present(open_dataset(voc.config(), "train").labels) == [["cat"]]


def test_labels_from_masks_warn_of_those_that_sbd_does_not_draw(
    voc: VocFolder, caplog: pytest.LogCaptureFixture
) -> None:
    voc.fill({f"n{i:02}": [1] for i in range(34)})
    for own in ("n00", "n01"):
        voc.mask(own, [1], folder="SegmentationClass")

    open_dataset(voc.config(), "train")

    (text,) = [record.getMessage() for record in caplog.records]
    assert "Annotations is missing: of the 32 images whose masks are SBD's about 2 lack a class" in text


@pytest.mark.parametrize("known", ["own masks", "own classes", "annotations"])
def test_labels_that_lack_no_class_warn_of_nothing(
    voc: VocFolder, caplog: pytest.LogCaptureFixture, known: str
) -> None:
    voc.fill({"a": [1]})
    if known == "own masks":
        voc.mask("a", [1], folder="SegmentationClass")
    elif known == "own classes":
        (voc.root / "classes.txt").write_text("cat\ndog\n")
    else:
        voc.annotation("a", ["cat"])

    open_dataset(voc.config(), "train")

    assert not caplog.records


def test_a_difficult_object_counts(voc: VocFolder) -> None:
    voc.fill({"a": [1]})
    voc.annotation("a", ["cat"], difficult=["dog"])

    assert present(open_dataset(voc.config(), "train").labels) == [["cat", "dog"]]


def test_a_body_part_in_an_annotation_is_no_object(voc: VocFolder) -> None:
    voc.fill({"a": [1]})
    path = voc.annotation("a", ["person"])
    path.write_text(path.read_text().replace("</object>", "<part><name>head</name></part></object>"))

    assert present(open_dataset(voc.config(), "train").labels) == [["person"]]


def test_training_needs_no_masks_where_there_are_annotations(voc: VocFolder) -> None:
    voc.image("a")
    voc.annotation("a", ["cow"])
    voc.split("train", ["a"])

    assert present(open_dataset(voc.config(), "train").labels) == [["cow"]]


@pytest.mark.parametrize("split", ["train", "val"])
def test_a_split_may_be_without_any_mask_where_there_are_annotations(voc: VocFolder, split: str) -> None:
    voc.image("a")
    voc.annotation("a", ["cow"])
    voc.split(split, ["a"])

    dataset = open_dataset(voc.config(), split)

    assert present(dataset.labels) == [["cow"]]
    assert not dataset.has_masks


def test_a_split_whose_images_all_have_masks_says_so(voc: VocFolder) -> None:
    assert open_dataset(voc.fill({"a": [1]}).config(), "train").has_masks


def test_a_caller_that_needs_masks_is_told_which_are_missing(voc: VocFolder) -> None:
    voc.image("a")
    voc.annotation("a", ["cow"])
    voc.split("train", ["a"])

    with pytest.raises(FileNotFoundError, match=r"must have a mask in .*, got 1 missing of 1, first 'a'"):
        open_dataset(voc.config(), "train", needs="masks")


@pytest.mark.parametrize("split", ["train", "val"])
def test_a_split_of_which_only_some_images_have_masks_is_refused(voc: VocFolder, split: str) -> None:
    voc.fill({"a": [1], "b": [1], "c": [1]}, split=split)
    for name in "abc":
        voc.annotation(name, ["cow"])
    (voc.root / "SegmentationClassAug/b.png").unlink()
    (voc.root / "SegmentationClassAug/c.png").unlink()

    with pytest.raises(FileNotFoundError, match=r"must have a mask in .*, got 2 missing of 3, first 'b'"):
        open_dataset(voc.config(), split)


def test_masks_that_a_caller_needs_are_verified_on_opening(voc: VocFolder) -> None:
    voc.fill({"a": [77]})
    voc.annotation("a", ["cat"])

    with pytest.raises(ValueError, match="got 77"):
        open_dataset(voc.config(), "train", needs="masks")


def test_a_test_split_has_names_and_images_alone(voc: VocFolder) -> None:
    voc.fill({"a": [1]})
    voc.image("t")
    voc.annotation("a", ["cow"])
    voc.split("test", ["t"])

    dataset = open_dataset(voc.config(), "test", needs="images")

    assert dataset.names == ("t",)
    assert dataset.image(0).shape == (6, 8, 3)
    assert not dataset.has_masks
    assert dataset.labels.tolist() == [[0.0] * 20]


def test_augmented_ground_truth_comes_before_the_plain_one(voc: VocFolder) -> None:
    voc.fill({"a": [7], "b": [8]})
    voc.mask("a", [9], folder="SegmentationClass")
    (voc.root / "SegmentationClassAug/b.png").rename(voc.root / "SegmentationClass/b.png")

    dataset = open_dataset(voc.config(), "train")

    assert [int(dataset.mask(i).flat[0]) for i in range(2)] == [7, 8]


def test_a_palette_mask_is_read_as_indices(voc: VocFolder) -> None:
    voc.fill({"a": [5, 255]})
    path = voc.root / "SegmentationClassAug/a.png"
    indices = open_dataset(voc.config(), "train").mask(0)
    coloured = Image.new("P", (8, 6))
    coloured.putdata(indices.flatten().tolist())
    coloured.putpalette([v for i in range(256) for v in (i * 7 % 256, i * 13 % 256, 99)])
    coloured.save(path)

    assert np.array_equal(open_dataset(voc.config(), "train").mask(0), indices)


@pytest.mark.parametrize("bits", [1, 2, 4, 8, 16])
def test_a_grey_mask_of_any_depth_is_read_as_it_is_stored(voc: VocFolder, bits: int) -> None:
    voc.fill({"a": [1]})
    indices = np.zeros((6, 8), np.uint16)
    indices[2:4, 1:7] = 1
    indices[5] = min(2**bits - 1, 3)
    (voc.root / "SegmentationClassAug/a.png").write_bytes(grey_png(indices, bits))

    assert np.array_equal(open_dataset(voc.config(), "train").mask(0), indices)


def test_a_mask_whose_palette_was_put_in_another_order_is_refused(voc: VocFolder) -> None:
    voc.fill({"a": [15]})
    squeezed = Image.new("P", (8, 6))
    squeezed.putdata([0] * 24 + [1] * 24)
    squeezed.putpalette([0, 0, 0, *palette(16)[15].tolist()])
    squeezed.save(voc.root / "SegmentationClassAug/a.png")

    with pytest.raises(ValueError, match=r"got value 1 in the colour of 15 in .*a\.png"):
        open_dataset(voc.config(), "train").mask(0)


def test_colours_of_other_classes_than_vocs_are_anybodys(voc: VocFolder) -> None:
    (voc.root / "classes.txt").write_text("bolt\nscrew\n")
    voc.fill({"a": [0, 1]})
    green = Image.new("P", (8, 6))
    green.putdata([0] * 24 + [1] * 24)
    green.putpalette([0, 0, 0, *palette(3)[2].tolist()])
    green.save(voc.root / "SegmentationClassAug/a.png")
    assert int(open_dataset(voc.config(), "train").mask(0).max()) == 1

    green.putpalette([*palette(3)[1].tolist(), 0, 0, 0])
    green.save(voc.root / "SegmentationClassAug/a.png")
    with pytest.raises(ValueError, match="got value 0 in the colour of 1 in"):
        open_dataset(voc.config(), "train").mask(0)


def test_a_mask_that_was_saved_as_jpeg_is_refused(voc: VocFolder) -> None:
    voc.fill({"a": [1]})
    Image.new("L", (8, 6), 1).save(voc.root / "SegmentationClassAug/a.png", "JPEG")

    with pytest.raises(ValueError, match="got a JPEG, whose losses change indices"):
        open_dataset(voc.config(), "train").mask(0)


def grey_png(samples: np.ndarray, bits: int) -> bytes:
    """A grey PNG with so many bits a sample, written by hand: Pillow writes 8 and 16."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return (
            struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))
        )

    height, width = samples.shape
    as_bits = (samples[:, :, None] >> np.arange(bits - 1, -1, -1)) & 1
    rows = [b"\0" + np.packbits(row.astype(np.uint8).ravel()).tobytes() for row in as_bits]
    header = struct.pack(">IIBBBBB", width, height, bits, 0, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(b"".join(rows)))
        + chunk(b"IEND", b"")
    )


# --- images -------------------------------------------------------------------------------------------------


def test_a_grayscale_image_becomes_three_equal_channels(voc: VocFolder) -> None:
    voc.fill({"a": [1]})
    gray = np.arange(48, dtype=np.uint8).reshape(6, 8)
    voc.image("a", gray)

    assert np.array_equal(open_dataset(voc.config(), "train").image(0), np.stack([gray] * 3, -1))


def test_a_palette_image_becomes_its_colours(voc: VocFolder) -> None:
    voc.fill({"a": [1]})
    image = Image.new("P", (8, 6), 1)
    image.putpalette([0, 0, 0, 10, 20, 30])
    image.save(voc.root / "JPEGImages/a.png")

    assert np.unique(open_dataset(voc.config(), "train").image(0).reshape(-1, 3), axis=0).tolist() == [
        [10, 20, 30]
    ]


def test_a_cmyk_image_becomes_rgb(voc: VocFolder) -> None:
    voc.fill({"a": [1]})
    Image.new("CMYK", (8, 6), (255, 0, 0, 0)).save(voc.root / "JPEGImages/a.jpg", quality=100)

    pixel = open_dataset(voc.config(), "train").image(0)[3, 3].astype(int)

    assert np.abs(pixel - (0, 255, 255)).max() <= 4  # cyan ink


def test_a_grey_image_of_16_bits_is_scaled_and_not_clipped(voc: VocFolder) -> None:
    voc.fill({"a": [1]})
    samples = np.linspace(0, 65535, 48).astype(np.uint16).reshape(6, 8)
    (voc.root / "JPEGImages/a.png").write_bytes(grey_png(samples, 16))

    image = open_dataset(voc.config(), "train").image(0)

    assert np.array_equal(image, np.stack([samples // 257] * 3, -1))


@pytest.mark.parametrize("suffix", ["PNG", "TIFF"])
def test_a_tiff_of_16_bits_is_scaled_as_a_png_is(suffix: str) -> None:
    stored = io.BytesIO()
    Image.fromarray(np.full((2, 3), 40_000, np.uint16)).save(stored, suffix)

    assert to_rgb(Image.open(stored)).tolist() == [[[155] * 3] * 3] * 2


@pytest.mark.parametrize(("kind", "word"), [(np.float32, "floats"), (np.int32, "integers")])
def test_numbers_without_a_known_range_are_refused(voc: VocFolder, kind: type[np.generic], word: str) -> None:
    voc.fill({"a": [1]})
    Image.fromarray(np.full((6, 8), 0.5, kind)).save(voc.root / "JPEGImages/a.png", "TIFF")

    with pytest.raises(ValueError, match=rf"got .*a\.png \(its numbers, 32-bit {word}, have no known range"):
        open_dataset(voc.config(), "train").image(0)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr", "HSV", "LAB", "PA"])
def test_every_other_mode_shows_what_it_shows_elsewhere(mode: str) -> None:
    ramp = np.arange(0, 256, 17, dtype=np.uint8).reshape(4, 4)
    if mode == "LAB":
        image = Image.fromarray(np.dstack([ramp, np.full_like(ramp, 0), np.full_like(ramp, 0)]), "LAB")
    else:
        image = Image.fromarray(ramp).convert("RGB").convert(mode)

    assert np.abs(to_rgb(image).astype(int) - np.array(image.convert("RGB")).astype(int)).max() == 0
    assert len(np.unique(to_rgb(image))) >= 2


def test_exif_orientation_is_ignored_as_masks_are_drawn_in_stored_orientation(voc: VocFolder) -> None:
    voc.fill({"a": [1]})
    exif = Image.Exif()
    exif[274] = 6  # stored lying on its side
    Image.new("RGB", (8, 6)).save(voc.root / "JPEGImages/a.jpg", exif=exif)

    assert open_dataset(voc.config(), "train").image(0).shape == (6, 8, 3)


def test_a_jpg_comes_before_a_png_of_the_same_name(voc: VocFolder) -> None:
    voc.fill({"a": [1]})
    voc.image("a", np.full((6, 8, 3), 200, np.uint8), suffix="jpg")

    assert open_dataset(voc.config(), "train").image(0).mean() > 190


# --- lists --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "line",
    [
        "2007_000032",
        "  2007_000032\t",
        "2007_000032.jpg",
        "/JPEGImages/2007_000032.jpg",
        "JPEGImages/2007_000032.jpg SegmentationClass/2007_000032.png",
        "/JPEGImages/2007_000032.jpg /SegmentationClassAug/2007_000032.png",
    ],
)
def test_a_list_may_hold_names_or_paths(voc: VocFolder, line: str) -> None:
    voc.fill({"2007_000032": [1]})
    voc.split("train", ["", line])

    assert open_dataset(voc.config(), "train").names == ("2007_000032",)


def test_a_list_of_windows_is_read(voc: VocFolder) -> None:
    voc.fill({"a": [1], "b": [1]})
    (voc.lists / "train.txt").write_bytes(b"\xef\xbb\xbfa\r\nb\r\n")

    assert open_dataset(voc.config(), "train").names == ("a", "b")


def test_the_order_of_the_list_is_kept(voc: VocFolder) -> None:
    voc.fill({"c": [1], "a": [2], "b": [3]})

    dataset = open_dataset(voc.config(), "train")

    assert dataset.names == ("c", "a", "b")
    assert [p.stem for p in (*dataset.image_paths, *dataset.mask_paths)] == ["c", "a", "b"] * 2


def test_train_aug_without_a_list_is_every_augmented_mask_less_val(voc: VocFolder) -> None:
    voc.fill({"a": [1], "b": [2], "c": [3]}, split="all")
    voc.split("val", ["b"])

    assert open_dataset(voc.config(), "train_aug").names == ("a", "c")


def test_train_aug_is_its_list_where_there_is_one(voc: VocFolder) -> None:
    voc.fill({"a": [1], "b": [2], "c": [3]}, split="all")
    voc.split("val", ["b"])
    voc.split("train_aug", ["c"])

    assert open_dataset(voc.config(), "train_aug").names == ("c",)


@pytest.mark.parametrize(
    "line",
    [
        "../x",
        "..",
        "/etc/passwd",
        "JPEGImages/../a.jpg",
        "..\\a",
        "a b",
        "/JPEGImages/a.jpg /SegmentationClass/b.png",
        "/JPEGImages/a.jpg /elsewhere/a.png",
    ],
)
def test_a_line_that_is_no_image_name_is_refused(voc: VocFolder, line: str) -> None:
    voc.fill({"a": [1], "b": [1]})
    path = voc.split("train", ["b", line])

    with pytest.raises(ValueError, match="list must hold one image name per line") as caught:
        open_dataset(voc.config(), "train")
    assert repr(line) in str(caught.value)
    assert str(path) in str(caught.value)


def test_classes_txt_replaces_the_classes_of_voc(voc: VocFolder) -> None:
    voc.fill({"a": [2, 255]})
    (voc.root / "classes.txt").write_text("ball\n\nred star \n")

    dataset = open_dataset(voc.config(), "train")

    assert dataset.classes == ("ball", "red star")
    assert dataset.labels.tolist() == [[0.0, 1.0]]


# --- bad folders: one line that says what, where and what to do ---------------------------------------------


def read_all(data: DataConfig, split: str) -> None:
    dataset = open_dataset(data, split)
    for i in range(len(dataset)):
        dataset.image(i)
        dataset.mask(i)


def complaint(data: DataConfig, split: str, kind: type[Exception]) -> str:
    with pytest.raises(kind) as caught:
        read_all(data, split)
    assert type(caught.value) is kind
    text = str(caught.value)
    assert "\n" not in text
    assert "; " in text  # the remedy
    return text


def test_a_missing_root_is_named(tmp_path: Path) -> None:
    text = complaint(DataConfig(root=str(tmp_path / "gone")), "train", FileNotFoundError)

    assert str(tmp_path / "gone") in text
    assert "does not exist" in text


def test_an_empty_root_is_told_what_is_missing(tmp_path: Path) -> None:
    text = complaint(DataConfig(root=str(tmp_path)), "train", FileNotFoundError)

    assert "must hold JPEGImages" in text
    assert "holds nothing" in text


def test_a_root_too_high_up_is_pointed_to_the_right_folder(tmp_path: Path) -> None:
    VocFolder(tmp_path / "VOCdevkit/VOC2012")

    text = complaint(DataConfig(root=str(tmp_path)), "train", FileNotFoundError)

    assert f"did you mean {str(tmp_path / 'VOCdevkit/VOC2012')!r}?" in text


def test_an_empty_image_folder_is_named(voc: VocFolder) -> None:
    voc.split("train", ["a"])

    assert "JPEGImages must hold images" in complaint(voc.config(), "train", FileNotFoundError)


def test_a_missing_list_is_told_those_that_are_there(voc: VocFolder) -> None:
    voc.fill({"a": [1]}, split="train")
    voc.split("val", ["a"])

    text = complaint(voc.config(), "trian", FileNotFoundError)

    assert "there are: train, val; did you mean 'train'?" in text


def test_images_that_are_not_there_are_counted_and_the_first_named(voc: VocFolder) -> None:
    voc.fill({"a": [1]})
    voc.split("train", ["a", "x", "y"])

    text = complaint(voc.config(), "train", FileNotFoundError)

    assert "got 2 missing of 3, first 'x'" in text
    assert "JPEGImages" in text


def test_masks_that_are_not_there_are_counted_and_the_first_named(voc: VocFolder) -> None:
    voc.fill({"a": [1], "b": [1]})
    (voc.root / "SegmentationClassAug/b.png").unlink()

    assert "got 1 missing of 2, first 'b'" in complaint(voc.config(), "train", FileNotFoundError)


def test_an_image_without_annotation_is_named(voc: VocFolder) -> None:
    voc.fill({"a": [1], "b": [1]})
    voc.annotation("a", ["cat"])

    text = complaint(voc.config(), "train", FileNotFoundError)

    assert "Annotations, got 1 missing of 2, first 'b'" in text


def test_a_list_without_names_is_refused(voc: VocFolder) -> None:
    voc.fill({"a": [1]})
    path = voc.split("train", ["", "  "])

    assert str(path) in complaint(voc.config(), "train", ValueError)


def test_a_name_twice_in_a_list_is_refused(voc: VocFolder) -> None:
    voc.fill({"a": [1], "b": [1]})
    voc.split("train", ["a", "b", "a"])

    assert "got 'a' twice" in complaint(voc.config(), "train", ValueError)


@pytest.mark.parametrize("suffix", ["jpg", "png"])
def test_a_truncated_image_is_named(voc: VocFolder, suffix: str) -> None:
    voc.fill({"a": [1]})
    (voc.root / "JPEGImages/a.png").unlink()
    noise = np.random.default_rng(0).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    path = voc.image("a", noise, suffix)
    path.write_bytes(path.read_bytes()[:-60])

    assert f"image must be a readable JPEG or PNG, got {path}" in complaint(voc.config(), "train", ValueError)


@pytest.mark.parametrize("content", [b"", b"not an image", b"\x89PNG\r\n\x1a\n" + bytes(40)])
def test_a_file_that_is_no_image_is_named(voc: VocFolder, content: bytes) -> None:
    voc.fill({"a": [1]})
    path = voc.root / "JPEGImages/a.png"
    path.write_bytes(content)

    assert str(path) in complaint(voc.config(), "train", ValueError)


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
def test_a_jpeg_has_the_pixels_that_pillow_decodes_in_the_orientation_that_is_stored(
    tmp_path: Path, mode: str
) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (37, 45, len(mode) if mode != "L" else 1), np.uint8)
    turned = Image.Exif()
    turned[0x0112] = 6  # a viewer is to turn it by a quarter
    picture = Image.fromarray(noise.squeeze(), mode).resize((90, 74))  # smooth, as photographs are
    picture.save(tmp_path / "a.jpg", quality=85, exif=turned)

    with Image.open(tmp_path / "a.jpg") as stored:
        expected = np.array(stored.convert("RGB"))

    np.testing.assert_array_equal(read_image(tmp_path / "a.jpg"), expected)


@pytest.mark.parametrize("share", [0.1, 0.5, 0.99])
def test_a_jpeg_that_is_cut_off_is_refused_wherever_it_ends(tmp_path: Path, share: float) -> None:
    path = tmp_path / "a.jpg"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)).save(path)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(share * len(whole))])

    with pytest.raises(ValueError, match=r"image must be a readable JPEG or PNG, got .*a\.jpg"):
        read_image(path)


def test_a_truncated_mask_is_named(voc: VocFolder) -> None:
    voc.fill({"a": [1]})
    path = voc.root / "SegmentationClassAug/a.png"
    path.write_bytes(path.read_bytes()[:45])

    assert f"mask must be a readable JPEG or PNG, got {path}" in complaint(voc.config(), "train", ValueError)


def test_a_mask_of_another_size_is_told_both_sizes(voc: VocFolder) -> None:
    voc.fill({"a": [1]})
    path = voc.root / "SegmentationClassAug/a.png"
    Image.new("L", (6, 8)).save(path)

    text = complaint(voc.config(), "train", ValueError)

    assert "8x6 pixels, got 6x8" in text
    assert str(path) in text


def test_a_mask_value_outside_the_classes_is_named(voc: VocFolder) -> None:
    voc.fill({"a": [1], "b": [20, 21, 30]})

    text = complaint(voc.config(), "train", ValueError)

    assert "[0, 20] or 255, got 21" in text
    assert "b.png" in text


def test_a_bad_mask_of_the_evaluated_split_is_found_on_opening(voc: VocFolder) -> None:
    voc.fill({"a": [77]}, split="val")
    voc.annotation("a", ["cat"])

    with pytest.raises(ValueError, match="got 77"):
        open_dataset(voc.config(), "val")


def test_a_mask_in_colours_is_refused(voc: VocFolder) -> None:
    voc.fill({"a": [1]})
    Image.new("RGB", (8, 6)).save(voc.root / "SegmentationClassAug/a.png")

    assert "got mode RGB" in complaint(voc.config(), "train", ValueError)


def test_an_annotation_that_is_no_xml_is_named(voc: VocFolder) -> None:
    voc.fill({"a": [1]})
    path = voc.annotation("a", ["cat"])
    path.write_text("<annotation><object>")

    assert str(path) in complaint(voc.config(), "train", ValueError)


def test_an_unknown_class_in_an_annotation_is_told_the_nearest(voc: VocFolder) -> None:
    voc.fill({"a": [1]})
    voc.annotation("a", ["tvmonitr"])

    text = complaint(voc.config(), "train", ValueError)

    assert "got 'tvmonitr'" in text
    assert "did you mean 'tvmonitor'?" in text


@pytest.mark.parametrize("content", ["", "\n \n", "\n".join(map(str, range(255)))])
def test_classes_txt_with_no_or_too_many_names_is_refused(voc: VocFolder, content: str) -> None:
    voc.fill({"a": [1]})
    (voc.root / "classes.txt").write_text(content)

    assert "classes.txt must name 1 to 254 classes" in complaint(voc.config(), "train", ValueError)


def test_a_class_twice_in_classes_txt_is_refused(voc: VocFolder) -> None:
    voc.fill({"a": [1]})
    (voc.root / "classes.txt").write_text("ball\nball\n")

    assert "got 'ball' twice" in complaint(voc.config(), "train", ValueError)


# --- the folder as a whole ----------------------------------------------------------------------------------


def test_reading_leaves_the_folder_as_it_was(voc: VocFolder) -> None:
    voc.fill({"a": [1], "b": [2]})
    before = {p: p.stat().st_mtime_ns for p in voc.root.rglob("*")}

    dataset = open_dataset(voc.config(), "train")
    dataset.image(0)
    dataset.mask(0)
    dataset.fingerprint()

    assert {p: p.stat().st_mtime_ns for p in voc.root.rglob("*")} == before


def test_the_fingerprint_is_the_same_in_another_folder(voc: VocFolder, tmp_path: Path) -> None:
    voc.fill({"a": [1], "b": [2]})
    shutil.copytree(voc.root, tmp_path / "copy")

    first, second = (open_dataset(DataConfig(root=str(r)), "train") for r in (voc.root, tmp_path / "copy"))

    assert first.fingerprint() == second.fingerprint()
    assert len(first.fingerprint()) == 16
    assert int(first.fingerprint(), 16) >= 0


@pytest.mark.parametrize("changed", ["image", "label", "mask", "name", "order", "class"])
def test_the_fingerprint_tells_a_changed_data_set(voc: VocFolder, changed: str) -> None:
    voc.fill({"a": [1], "b": [2]})
    before = open_dataset(voc.config(), "train").fingerprint()
    if changed == "image":
        voc.image("a", np.random.default_rng(0).integers(0, 256, (6, 8, 3), dtype=np.uint8))
    elif changed == "label":
        voc.mask("a", [3])
    elif changed == "mask":
        voc.mask("a", [1, 0, 1, 0, 1, 0, 0, 1, 1, 0, 1, 1, 0, 1])
    elif changed == "name":
        voc.image("c")
        voc.mask("c", [2])
        voc.split("train", ["a", "c"])
    elif changed == "order":
        voc.split("train", ["b", "a"])
    else:
        (voc.root / "classes.txt").write_text("\n".join((*VOC_CLASSES[:19], "television")))

    assert open_dataset(voc.config(), "train").fingerprint() != before


def test_the_shapes_layout_is_written_once_and_then_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written: list[Path] = []

    def write(root: Path) -> None:
        written.append(root)
        VocFolder(root).fill({"a": [1]})
        (root / "classes.txt").write_text("ball")

    monkeypatch.setattr("cosa.data.open.write_shapes", write)
    data = DataConfig(layout="shapes", root=str(tmp_path / "shapes"))

    names = [open_dataset(data, "train").names for _ in range(2)]

    assert names == [("a",), ("a",)]
    assert written == [tmp_path / "shapes"]


# --- the real images ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def real_root(real_data: Path) -> Path:
    return real_data / "data/VOCdevkit/VOC2012"


@pytest.mark.parametrize("split", ["train_aug", "val"])
def test_real_labels_are_the_values_that_pillow_counts_in_the_masks(real_root: Path, split: str) -> None:
    dataset = open_dataset(DataConfig(root=str(real_root)), split)
    counted: Counter[str] = Counter()
    for name in (real_root / f"ImageSets/Segmentation/{split}.txt").read_text().split():
        with Image.open(real_root / f"SegmentationClassAug/{name}.png") as mask:
            values = {value for _, value in mask.getcolors()}  # type: ignore[union-attr]
        counted.update(VOC_CLASSES[value - 1] for value in values if 1 <= value <= 20)  # type: ignore[operator]

    assert dict(zip(dataset.classes, dataset.labels.sum(0).int().tolist(), strict=True)) == {
        name: counted[name] for name in VOC_CLASSES
    }


def test_real_masks_carry_the_colours_of_voc_in_the_order_of_our_classes(real_root: Path) -> None:
    colours = {0: (0, 0, 0), 1: (128, 0, 0), 8: (64, 0, 0), 15: (192, 128, 128), 20: (0, 64, 128)}
    with Image.open(open_dataset(DataConfig(root=str(real_root)), "val").mask_paths[0]) as mask:
        palette = mask.getpalette()

    assert palette is not None
    assert {i: tuple(palette[3 * i : 3 * i + 3]) for i in colours} == colours
    assert tuple(palette[-3:]) == (224, 224, 192)


def test_real_masks_have_borders_that_no_metric_counts(real_root: Path) -> None:
    dataset = open_dataset(DataConfig(root=str(real_root)), "val")

    shares = [(dataset.mask(i) == 255).mean() for i in range(20)]

    assert all(0 < share < 0.3 for share in shares)


def test_real_images_and_masks_agree_in_size(real_root: Path) -> None:
    dataset = open_dataset(DataConfig(root=str(real_root)), "val")

    assert all(dataset.image(i).shape[:2] == dataset.mask(i).shape for i in range(0, len(dataset), 10))
