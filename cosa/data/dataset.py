"""A segmentation data set on disk: what is listed, what each image shows, and how its files are decoded.

Nothing is ever written into the folder. An image keeps its stored orientation (EXIF is ignored): the masks
are drawn in it.
"""

from __future__ import annotations

import contextlib
import hashlib
import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import cv2
import numpy as np
import torch
from jaxtyping import Float, UInt8
from PIL import Image
from torch import Tensor

from cosa.config import IMAGENET_MEAN, IMAGENET_STD, DataConfig
from cosa.data.files import OnProblem, read_each
from cosa.structures import IGNORE

# What Pillow raises on files that are cut off or no image at all, beside OSError.
_BROKEN_IMAGE = (OSError, SyntaxError, ValueError, struct.error, Image.DecompressionBombError)

_JPEG_END = b"\xff\xd9"  # where it is missing, the file is cut off: OpenCV would fill up, Pillow tells

_VOC_CLASSES = 20  # of a data set whose palettes are VOC's

Needs = Literal["labels", "masks", "images"]
"""What the caller cannot do without: see `open_dataset`."""


@dataclass(frozen=True, eq=False)
class SegmentationDataset:
    """Images with image-level labels and, where the split has them, masks."""

    classes: tuple[str, ...]
    """Names of the foreground classes; class 0 of a mask is the background."""
    names: tuple[str, ...]
    """One name per image, in the order of the split's list."""
    labels: Float[Tensor, "n c"]
    """Image-level labels, 0 or 1."""
    image_paths: tuple[Path, ...]
    """Image files, in the order of `names`."""
    mask_paths: tuple[Path, ...]
    """Index PNGs in the order of `names`; empty where the split has no masks."""

    mask_source: str = ""
    """Digest of the file that the masks are derived from, where they are no files of the data set itself."""

    def __len__(self) -> int:
        return len(self.names)

    @property
    def has_masks(self) -> bool:
        """Whether every image has a mask; without, classification alone can be judged."""
        return bool(self.mask_paths)

    def named_by_stem(self) -> SegmentationDataset:
        """The same with names that have lost their suffix."""
        return replace(self, names=tuple(name.rpartition(".")[0] for name in self.names))

    def image(self, index: int) -> UInt8[np.ndarray, "h w 3"]:
        """Image `index` as RGB, whatever its file holds.

        Raises:
            ValueError: The file is no readable image; it is named.
        """
        return read_image(self.image_paths[index])

    def mask(self, index: int) -> UInt8[np.ndarray, "h w"]:
        """Ground truth of image `index`: classes in [0, k) or IGNORE.

        Raises:
            ValueError: The file is no readable index PNG, its size is not the image's, or it holds a value
                outside the classes.
            FileNotFoundError: The split has no masks.
        """
        if not self.mask_paths:
            raise FileNotFoundError(
                f"split must have masks to be evaluated, got none for {self.names[index]!r}; add the masks"
            )
        return read_mask(self.mask_paths[index], self.image_paths[index], len(self.classes))

    def fingerprint(self) -> str:
        """Sixteen hex digits of what is in the split, the same wherever the folder lies.

        Covers classes, names, labels and the sizes in bytes of image and mask files: a file changed without
        a change of its size goes unseen, and in return no pixel is read. Masks that are derived from another
        file count as that file, whether they are derived yet or not.
        """
        digest = hashlib.sha256("\n".join((*self.classes, self.mask_source, *self.names)).encode())
        digest.update(self.labels.numpy().astype(np.uint8).tobytes())
        for path in (*self.image_paths, *(() if self.mask_source else self.mask_paths)):
            digest.update(path.stat().st_size.to_bytes(8, "big"))
        return digest.hexdigest()[:16]


def read_image(path: Path) -> UInt8[np.ndarray, "h w 3"]:
    """The image file as RGB, see `to_rgb`.

    Raises:
        ValueError: The file is cut off, damaged, no image, or of numbers without a known range.
    """
    with decoding("image", path), Image.open(path) as image:
        if image.format == "JPEG" and image.mode == "RGB":
            content = np.fromfile(path, np.uint8)
            if content[-2:].tobytes() == _JPEG_END:
                # the pixels that Pillow decodes, by the same library, without its copies of them
                decoded = cv2.imdecode(content, cv2.IMREAD_COLOR_RGB | cv2.IMREAD_IGNORE_ORIENTATION)
                if decoded is not None:
                    return np.asarray(decoded, np.uint8)
        return to_rgb(image)


def to_rgb(image: Image.Image) -> UInt8[np.ndarray, "h w 3"]:
    """An image of any of Pillow's modes in 8 bits: 16-bit grey is scaled, transparency is dropped.

    Raises:
        ValueError: Its numbers have no known range: 32-bit integers or floats.
    """
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PNG"):
        grey = np.array(image).astype(np.uint32)
        # Pillow's own conversion clips: a photograph of 16 bits would be white all over.
        return np.repeat((grey // 257).astype(np.uint8)[:, :, None], 3, axis=2)
    if image.mode in ("I", "F"):
        raise ValueError(
            f"its numbers, 32-bit {'integers' if image.mode == 'I' else 'floats'}, have no known range: "
            "save it with 8 or 16 bits"
        )
    if "transparency" in image.info:
        image = image.convert("RGBA")  # else Pillow warns of what it then does right
    return np.array(image if image.mode == "RGB" else image.convert("RGB"))  # a conversion to itself copies


def read_mask(path: Path, image_path: Path, classes: int) -> UInt8[np.ndarray, "h w"]:
    """The index PNG as it is stored, checked against its image and the number of foreground classes.

    Raises:
        ValueError: The file is no readable index PNG, its size is not the image's, it holds a value outside
            [0, classes] that is not IGNORE, or its palette says that its values are not VOC's.
    """
    with decoding("mask", path), Image.open(path) as stored:
        mode, kind, samples = stored.mode, stored.format, np.array(stored)
        colours = stored.getpalette() or ()
    if kind == "JPEG" or mode not in ("1", "L", "P", "I", "I;16", "I;16B"):
        raise ValueError(
            f"mask must hold one class index per pixel (PNG mode P or L), got "
            f"{f'mode {mode}' if kind != 'JPEG' else 'a JPEG, whose losses change indices,'} in {path}; "
            "convert colours to indices"
        )
    with decoding("image", image_path), Image.open(image_path) as image:
        width, height = image.size
    if samples.shape != (height, width):
        raise ValueError(
            f"mask must have the size of its image, {width}x{height} pixels, "
            f"got {samples.shape[1]}x{samples.shape[0]} in {path}; replace one of the two"
        )
    if mode == "L" and kind == "PNG":
        samples = samples // _grey_step(path)
    present = np.unique(samples).astype(np.int64)
    outside = present[((present > classes) & (present != IGNORE)) | (present < 0)]
    if outside.size:
        raise ValueError(
            f"mask must hold classes in [0, {classes}] or {IGNORE}, got {outside[0]} in {path}; "
            "check the mask, or the class names in classes.txt"
        )
    _require_voc_order(colours, present.tolist(), classes, path)
    mask: UInt8[np.ndarray, "h w"] = samples.astype(np.uint8)
    return mask


def _grey_step(path: Path) -> int:
    """By how much Pillow multiplies the samples of a grey PNG, which may have 1, 2, 4 or 8 bits: 255 to 1."""
    with path.open("rb") as file:
        header = file.read(25)
    largest: int = (1 << header[24]) - 1  # of the bit depth; PNG's signature and IHDR's start come before it
    return 255 // largest


def palette(k: int) -> UInt8[np.ndarray, "k 3"]:
    """Colours of PASCAL VOC for classes 0 ... k - 1, black first: a class's bits, spread over RGB."""
    levels = np.arange(8)
    bits = np.arange(k)[:, None, None] >> (3 * levels + np.arange(3)[:, None]) & 1
    colours: UInt8[np.ndarray, "k 3"] = (bits << (7 - levels)).sum(2, dtype=np.uint8)
    return colours


def _require_voc_order(stored: Sequence[int], present: Sequence[int], classes: int, path: Path) -> None:
    """Refuse a value in the colour that VOC gives another class: the palette was saved in another order.

    With other classes than VOC's twenty, whose colours may be anybody's, only a palette of VOC's colours
    alone in which background or border has another place.

    Args:
        stored: The file's palette: red, green and blue of each value.
        present: Values in the file.
        classes: Number of foreground classes.
        path: The file.

    Raises:
        ValueError: There is one.
    """
    colours = [tuple(stored[3 * value : 3 * value + 3]) for value in range(len(stored) // 3)]
    voc = palette(IGNORE + 1).tolist()
    meaning = {tuple(voc[value]): value for value in (*range(classes + 1), IGNORE)}
    meant = {value: meaning.get(colours[value]) for value in present if value < len(colours)}
    wrong = {value: other for value, other in meant.items() if other not in (None, value)}
    if classes != _VOC_CLASSES and (None in meant.values() or not {0, IGNORE} & {*wrong.values()}):
        return
    for value, other in wrong.items():
        raise ValueError(
            f"mask must hold class indices in the order of VOC's palette, got value {value} in the colour of "
            f"{other} in {path}; save it without reordering its palette"
        )


def assemble(
    classes: tuple[str, ...],
    names: tuple[str, ...],
    images: Mapping[str, Path],
    masks: Mapping[str, Path],
    labels_of: Callable[[str], list[int]] | None,
    on_problem: OnProblem,
    *,
    verify_masks: bool = False,
) -> SegmentationDataset:
    """The data set of files that are all there.

    Args:
        classes: The foreground classes.
        names: The images, in order.
        images: Image files by name.
        masks: Mask files by name; empty for a split without.
        labels_of: Positions of the classes in an image, by its name; None takes those that its mask shows.
        on_problem: Is told of labels and masks that are bad; such an image has no label.
        verify_masks: Whether masks that no label comes from are read now, too, to find a bad one before hours
            of training.
    """

    def shown(name: str) -> list[int]:
        mask = read_mask(masks[name], images[name], len(classes))
        return [int(value) - 1 for value in np.unique(mask) if value not in (0, IGNORE)]

    present: list[list[int]] = []
    if masks and (verify_masks or labels_of is None):
        present = read_each(shown, names, on_problem)
    if labels_of is not None:
        present = read_each(labels_of, names, on_problem)
    labels = torch.zeros(len(names), len(classes))
    for row, positions in zip(labels, present, strict=True):
        row[positions] = 1
    image_paths = tuple(images[name] for name in names)
    mask_paths = tuple(masks[name] for name in names) if masks else ()
    return SegmentationDataset(classes, names, labels, image_paths, mask_paths)


def normalise(images: UInt8[np.ndarray, "b h w 3"], data: DataConfig) -> Float[Tensor, "b 3 h w"]:
    """The images in the mean and deviation of `data`, in ImageNet's where it has none; channels first."""
    mean, std = (
        255 * torch.tensor(own or imagenet).view(3, 1, 1)
        for own, imagenet in ((data.mean, IMAGENET_MEAN), (data.std, IMAGENET_STD))
    )
    planes = torch.from_numpy(images).permute(0, 3, 1, 2).contiguous()  # while a number is one byte
    return planes.float().sub_(mean).div_(std)


@contextlib.contextmanager
def decoding(what: str, path: Path) -> Iterator[None]:
    """Turns whatever Pillow raises on a bad file into one line that names it."""
    try:
        yield
    except (FileNotFoundError, PermissionError):
        raise
    except _BROKEN_IMAGE as error:
        raise ValueError(
            f"{what} must be a readable JPEG or PNG, got {path} ({error}); replace the file"
        ) from error
