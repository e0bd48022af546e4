"""The embedded data set `shapes`: procedural, seeded, written once in the VOC layout.

It holds the two problems the paper is about. *Incomplete activation*: each object is a large body that shows
its class by outline and only a hint of colour, with a small vivid core that gives the class away, so a
classifier needs the core alone. *Coexistence*: a train nearly always runs on rails and a boat nearly always
lies on water, and neither rails nor water is labelled, so a classifier may take them for the object. Pieces
of both lie about everywhere, too: close up they say nothing, from afar they do, which is why a deep CAM falls
for them more than a shallow one (the paper's Fig. 4).
The rest makes it a data set: several objects of several classes per image, overlaps, textured backgrounds,
distractors without a class, light from one side, noise.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from numpy.typing import NDArray
from PIL import Image

CLASSES = ("ball", "star", "cross", "house", "train", "boat")
"""Foreground classes; ground truth holds their position + 1."""
COEXISTENCE = ("train", "boat")
"""Classes that nearly always come with their context."""
SIZE = 64
"""Side of an image, pixels."""
TRAIN_IMAGES = 2_000
VAL_IMAGES = 240
SEED = 2_024

_CONTEXT_WITH_CLASS = 0.95
"""Probability of rails with a train, of water with a boat."""
_CONTEXT_ALONE = 0.05
"""Probability of each context in an image without its class."""
_CORE = 0.8
"""Probability that a train or a boat shows its core; without it the context tells more than the object."""
_BODY_TINT = 0.22
"""Share of the class's colour in the body; the rest is grey."""

# Vivid colours of the cores, RGB in [0, 1], far from the greys, browns and blues of the surroundings.
_COLOURS = {
    "ball": (0.90, 0.20, 0.16),
    "star": (0.92, 0.80, 0.12),
    "cross": (0.18, 0.72, 0.26),
    "house": (0.82, 0.26, 0.78),
    "train": (0.96, 0.52, 0.10),
    "boat": (0.20, 0.80, 0.80),
}

Picture = NDArray[np.float64]
Plane = NDArray[np.float64]
Mask = NDArray[np.bool_]


_y, _x = np.mgrid[0:SIZE, 0:SIZE].astype(np.float64)


def write_shapes(
    root: Path, *, train_images: int = TRAIN_IMAGES, val_images: int = VAL_IMAGES, seed: int = SEED
) -> None:
    """Write the data set under `root`, whole or not at all.

    Args:
        root: Folder that must not exist yet; its parents are made.
        train_images: Images in `train_aug`.
        val_images: Images in `val`, never the same as a training image.
        seed: The same seed writes the same bytes.

    Raises:
        FileExistsError: `root` is there already.
        OSError: No permission or no space to write.
    """
    if root.exists():
        raise FileExistsError(f"data.root must not exist yet to write shapes there, got {str(root)!r}")
    root.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix=f".{root.name}.", suffix=".part", dir=root.parent) as temporary:
        draft = Path(temporary, root.name)
        for folder in ("JPEGImages", "SegmentationClassAug", "ImageSets/Segmentation"):
            (draft / folder).mkdir(parents=True)
        (draft / "classes.txt").write_text("\n".join(CLASSES) + "\n")
        for split, offset, count in (("train_aug", 0, train_images), ("val", 1_000_000, val_images)):
            names = [f"{split}_{i:05d}" for i in range(count)]
            for i, name in enumerate(names):
                image, mask = draw(np.random.default_rng((seed, offset + i)))
                Image.fromarray(image).save(draft / "JPEGImages" / f"{name}.png")
                Image.fromarray(mask).save(draft / "SegmentationClassAug" / f"{name}.png")
            (draft / "ImageSets/Segmentation" / f"{split}.txt").write_text("\n".join(names) + "\n")
        draft.replace(root)


def draw(rng: np.random.Generator) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """One image (SIZE, SIZE, 3) and its ground truth (SIZE, SIZE), drawn from `rng`."""
    texture = 0.10 * _noise(rng, 3) + 0.07 * _noise(rng, 8) + 0.05 * _noise(rng, 24)
    tint = rng.uniform(-0.05, 0.05, 3)
    image = rng.uniform(0.35, 0.6) + texture[..., None] + tint
    mask = np.zeros((SIZE, SIZE), np.uint8)
    names = list(rng.choice(CLASSES, size=rng.choice([1, 2, 3], p=[0.35, 0.45, 0.20]), replace=False))
    places = {name: _place(name, rng) for name in names}
    for context, name in (("rails", "train"), ("water", "boat")):
        present = rng.random() < (_CONTEXT_WITH_CLASS if name in names else _CONTEXT_ALONE)
        if present:
            _, cy, radius = places.get(name) or _place(name, rng)
            _CONTEXTS[context](image, np.ones_like(mask, bool), cy + 0.62 * radius, rng)
    for _ in range(rng.integers(1, 4)):
        _distractor(image, rng)
    for name in rng.permutation(names):
        body = _object(image, str(name), *places[str(name)], rng)
        mask[body] = CLASSES.index(name) + 1
    light = 1 + 0.18 * np.cos(rng.uniform(0, 2 * np.pi) + (_x * rng.normal() + _y * rng.normal()) / SIZE)
    lit = image * light[..., None] + rng.normal(0, 0.025, image.shape)
    return (np.clip(lit, 0, 1) * 255).round().astype(np.uint8), mask


def _place(name: str, rng: np.random.Generator) -> tuple[float, float, float]:
    """Centre and radius of an object, pixels; those with a context stand where it has room below."""
    radius = rng.uniform(10, 18)
    low, high = (0.3, 0.6) if name in COEXISTENCE else (0.2, 0.8)
    return rng.uniform(0.2, 0.8) * SIZE, rng.uniform(low, high) * SIZE, radius


def _noise(rng: np.random.Generator, cells: int) -> Plane:
    """Smooth noise in [-1, 1] with about `cells` bumps per side."""
    grid = Image.fromarray(rng.uniform(-1, 1, (cells, cells)).astype(np.float32))
    return np.asarray(grid.resize((SIZE, SIZE), Image.Resampling.BICUBIC), dtype=np.float64)


def _turned(cx: float, cy: float, angle: float) -> tuple[Plane, Plane]:
    """Coordinates right and down of a centre, pixels, in a frame turned by `angle`."""
    dx, dy = _x - cx, _y - cy
    return dx * np.cos(angle) + dy * np.sin(angle), dy * np.cos(angle) - dx * np.sin(angle)


def _object(image: Picture, name: str, cx: float, cy: float, radius: float, rng: np.random.Generator) -> Mask:
    """Paint a faint body with the class's outline, then its vivid core; returns where the body is."""
    angle = rng.uniform(-0.35, 0.35) if name not in COEXISTENCE else rng.uniform(-0.08, 0.08)
    u, v = (plane / radius for plane in _turned(cx, cy, angle))
    body = _OUTLINES[name](u, v)
    colour = np.asarray(_COLOURS[name])
    grey = rng.uniform(0.62, 0.85) if rng.random() < 0.5 else rng.uniform(0.15, 0.32)
    texture = 0.05 * _noise(rng, 10) + 0.04 * np.sign(np.sin(4.5 * v + rng.uniform(0, 6)))
    paint = (1 - _BODY_TINT) * grey + _BODY_TINT * colour + texture[..., None]
    image[body] = paint[body]
    if name not in COEXISTENCE or rng.random() < _CORE:
        core_u, core_v = rng.uniform(-0.25, 0.25, 2)
        core = body & (np.hypot(u - core_u, v - core_v) < rng.uniform(0.26, 0.36))
        image[core] = (colour * rng.uniform(0.85, 1.05))[None]
    return body


def _box(across: Plane, along: Plane, half: float, low: float, high: float) -> Mask:
    """Where `across` is less than `half` from 0 and `along` between `low` and `high`."""
    return (np.abs(across) < half) & (along > low) & (along < high)


# The objects' outlines: where they are, u to the right and v down, in radii from the centre.
_OUTLINES: Mapping[str, Callable[[Plane, Plane], Mask]] = {
    "ball": lambda u, v: np.hypot(u, v) < 0.9,
    "star": lambda u, v: np.hypot(u, v) < 0.68 + 0.32 * np.cos(5 * np.arctan2(u, -v)),
    "cross": lambda u, v: _box(u, v, 0.34, -0.95, 0.95) | _box(v, u, 0.34, -0.95, 0.95),
    "house": lambda u, v: (
        _box(u, v, 0.62, -0.2, 0.8) | ((v <= -0.2) & (v > -0.95) & (np.abs(u) < v + 1.0))  # walls, roof
    ),
    "train": lambda u, v: (
        _box(u, v, 1.15, -0.35, 0.45)
        | ((np.abs(u + 0.75) < 0.16) & (v > -0.75) & (v <= -0.35))  # chimney
        | (np.hypot(u - 0.65, v - 0.5) < 0.2)
        | (np.hypot(u + 0.65, v - 0.5) < 0.2)
    ),
    "boat": lambda u, v: (
        ((v > 0.2) & (v < 0.65) & (np.abs(u) < 1.1 - 0.7 * (v - 0.2)))  # hull
        | ((v <= 0.2) & (v > -0.95) & (u > -0.1) & (u < 0.75 * (v + 0.95) - 0.1))  # sail
        | ((v <= 0.2) & (v > -0.95) & (np.abs(u + 0.16) < 0.07))  # mast
    ),
}


def _rails(image: Picture, where: Mask, top: float, rng: np.random.Generator) -> None:
    """Two dark rails over brown sleepers on gravel, as far as `where` reaches."""
    height = rng.uniform(7, 10)
    depth = _y - top
    band = where & (depth > 0) & (depth < height)
    gravel = 0.42 + 0.12 * np.sign(_noise(rng, 32))
    image[band] = gravel[band][:, None] * np.asarray((1.05, 1.0, 0.92))
    sleepers = band & (np.mod(_x + 0.4 * depth + rng.uniform(0, 6), 6) < 2.6)
    image[sleepers] = (0.34, 0.22, 0.12)
    for at in (0.25, 0.75):
        image[band & (np.abs(depth - at * height) < 0.8)] = (0.12, 0.12, 0.15)


def _water(image: Picture, where: Mask, top: float, rng: np.random.Generator) -> None:
    """Dark blue waves as far as `where` reaches, their upper edge a little under the hull's."""
    phase = rng.uniform(0, 2 * np.pi, 2)
    shore = top - 2 + 1.2 * np.sin(_x / 4 + phase[0])
    band = where & (_y > shore) & (_y < shore + rng.uniform(10, 16))
    waves = np.sin(_y * 1.6 + 1.4 * np.sin(_x / 3.2 + phase[1]))
    blue = np.asarray((0.10, 0.18, 0.38)) + 0.08 * waves[..., None] + 0.05 * _noise(rng, 12)[..., None]
    image[band] = blue[band]


_CONTEXTS = {"rails": _rails, "water": _water}


def _distractor(image: Picture, rng: np.random.Generator) -> None:
    """A blob of no class: grey, a piece of rails or a puddle.

    Not all that stands out is an object; and the contexts' textures, seen closely, mean nothing: only their
    course through the image goes with a class.
    """
    cx, cy = rng.uniform(0, SIZE, 2)
    angle, radius = rng.uniform(0, np.pi), rng.uniform(5, 11)
    u, v = _turned(cx, cy, angle)
    blob = np.hypot(u / rng.uniform(0.8, 1.8), v / rng.uniform(0.3, 0.8)) < radius
    kind = rng.choice(["grey", *_CONTEXTS])
    if kind == "grey":
        grey = rng.uniform(0.15, 0.85) + 0.06 * _noise(rng, 10)
        image[blob] = grey[blob][:, None]
    else:
        _CONTEXTS[kind](image, blob, cy - 5, rng)
