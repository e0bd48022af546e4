"""`cosa-predict SOURCE IMAGES...`: class maps and overlays of any images; or a split's pseudo-labels."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from cosa.cli import pseudo_labels
from cosa.cli.common import FAILED, Parser, changed_settings, find_model
from cosa.cli.console import Counter, print_error
from cosa.config import Config, override
from cosa.storage.files import require_folder

if TYPE_CHECKING:
    from cosa.model import ImageOutput


def main(prog: str, arguments: Sequence[str]) -> int:
    """What `cosa-predict` does; returns the exit code: not 0 where an image could not be read."""
    if pseudo_labels.are_asked_for(arguments):
        return pseudo_labels.main(prog, arguments)
    given = _parser(prog).parse_known(arguments)
    from cosa.evaluation.predict import find_images, output_names, predict_files, write_prediction
    from cosa.model import build_model

    paths = find_images(given.images)
    stored = find_model(given)
    if given.cams is not None and stored.config.standalone:
        raise ValueError(f"--cams must be left out, got {given.source!r}, a standalone network without CAMs")
    model = build_model(replace(stored, config=override(stored.config, changed_settings(given))))
    cams: list[int] = model.label_vector(given.cams or [])[0].nonzero().flatten().tolist()
    out = given.out.expanduser().absolute()
    require_folder("--out", out)
    stems = [out / name for name in output_names(paths)]
    _keep_images(paths, [stem.with_name(f"{stem.name}.png") for stem in stems])
    skipped = []
    predictions = predict_files(model, paths, labels=given.labels, crf=given.crf)
    for stem, prediction in zip(stems, Counter(len(paths)).each(predictions), strict=True):
        if prediction.output is None:
            skipped.append(f"{prediction.path}: {prediction.error}")
        else:
            shown = cams or _likely(prediction.output) if given.cams is not None else ()
            write_prediction(prediction, stem, model.classes, cams=shown)
    print(f"{len(paths) - len(skipped)} class maps with their overlays in {out}")
    if skipped:
        print_error("\n  ".join([f"skipped {len(skipped)} of {len(paths)} images:", *skipped]))
    return FAILED if skipped else 0


def _parser(prog: str) -> Parser:
    parser = Parser(
        prog=prog,
        usage=f"{prog} SOURCE IMAGES... [options] [--evaluation.SETTING VALUE ...]\n"
        f"       {prog} SOURCE --pseudo-labels DIR [options]   (see {prog} --pseudo-labels --help)",
        description="Predict the class of each pixel: NAME.png holds class indices in the colours of VOC, "
        "NAME_overlay.png shows them on the image. Settings default to those of the run.",
    )
    parser.source()
    parser.flag("images", "IMAGES", "image files, folders of images, or patterns in quotes", nargs="+")
    place = Path("predictions")
    parser.flag("--out", "DIR", f"folder to write to (default {place})", type=Path, default=place)
    parser.flag(
        "--cams",
        "CLASS,...",
        "also a heat map NAME_cam_CLASS.png for each of these classes; without names for the classes that "
        "the image holds with a probability of at least 0.5, or the likeliest",
        nargs="?",
        type=_names,
        const=[],
    )
    parser.flag(
        "--labels",
        "CLASS,...",
        "the classes that all the images hold, where that is known: no other is predicted",
        type=_names,
    )
    parser.switch("--crf", "refine by a dense CRF; needs the extra `crf`")
    parser.traceback()
    names = ("size", "scales", "flip", "batch_size")
    parser.settings(Config(), ("data.loader_workers", *(f"evaluation.{name}" for name in names)))
    return parser


def _names(text: str) -> list[str]:
    names = [name.strip() for name in text.split(",") if name.strip()]
    if not names:
        raise argparse.ArgumentTypeError(f"must name classes with commas between, got {text!r}")
    return names


def _likely(output: ImageOutput) -> list[int]:
    """The classes that the image holds by its class logits; at least the likeliest."""
    probs = output.cls_probs
    return [index for index, prob in enumerate(probs) if prob >= 0.5] or [int(probs.argmax())]


def _keep_images(images: Sequence[Path], outputs: Sequence[Path]) -> None:
    """Refuse to overwrite an image by its own class map."""
    lost = {path.resolve() for path in images} & {path.resolve() for path in outputs}
    if lost:
        raise ValueError(
            f"out must not be the folder of the images, got {str(min(lost).parent)!r}, where "
            f"{min(lost).name!r} would be overwritten; choose another --out"
        )
