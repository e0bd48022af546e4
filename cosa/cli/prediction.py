"""`cosa-predict SOURCE IMAGES...`: class maps and overlays of any images."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cosa.cli.common import (
    FAILED,
    Parser,
    add_settings,
    add_source,
    add_traceback,
    changed_settings,
    find_model,
)
from cosa.cli.console import Counter, print_error
from cosa.config import Config, override

if TYPE_CHECKING:
    from cosa.model import ImageOutput, Model
else:
    ImageOutput = Model = Any  # they import torch; tests check annotations as the program runs

_SETTINGS = (
    "data.loader_workers",
    "evaluation.size",
    "evaluation.scales",
    "evaluation.flip",
    "evaluation.batch_size",
)


def main(prog: str, arguments: Sequence[str]) -> int:
    """What `cosa-predict` does; returns the exit code: not 0 where an image could not be read."""
    given = _parser(prog).parse_known(arguments)
    from cosa.evaluation.predict import find_images, output_names, predict_files, write_prediction
    from cosa.model import build_model

    paths = find_images(given.images)
    stored = find_model(given, "assignment")
    model = build_model(replace(stored, config=override(stored.config, changed_settings(given))))
    cams = _indices(model, given.cams or [])
    out = given.out.expanduser().absolute()
    stems = [out / name for name in output_names(paths)]
    _keep_images(paths, [stem.with_name(f"{stem.name}.png") for stem in stems])
    skipped = []
    predictions = predict_files(model, paths, labels=given.labels, crf=given.crf)
    for stem, prediction in zip(stems, Counter(len(paths), "images").each(predictions), strict=True):
        if prediction.output is None:
            skipped.append(f"{prediction.path}: {prediction.error}")
        else:
            shown = cams if given.cams else _likely(prediction.output)
            write_prediction(prediction, stem, model.classes, cams=shown if given.cams is not None else ())
    print(f"{len(paths) - len(skipped)} class maps with their overlays in {out}")
    if skipped:
        print_error(f"skipped {len(skipped)} of {len(paths)} images:")
        for line in skipped:
            print_error(f"  {line}")
    return FAILED if skipped else 0


def _parser(prog: str) -> Parser:
    parser = Parser(
        prog=prog,
        usage=f"{prog} SOURCE IMAGES... [options] [--evaluation.SETTING VALUE ...]",
        description="Predict the class of each pixel: NAME.png holds class indices in the colours of VOC, "
        "NAME_overlay.png shows them on the image. Settings default to those of the run.",
    )
    add_source(parser)
    parser.add_argument(
        "images", nargs="+", metavar="IMAGES", help="image files, folders of images, or patterns in quotes"
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("predictions"),
        metavar="DIR",
        help="folder to write to (default predictions)",
    )
    parser.add_argument(
        "--cams",
        nargs="?",
        type=_names,
        const=[],
        metavar="CLASS,...",
        help="also a heat map NAME_cam_CLASS.png for each of these classes; without names for the classes "
        "that the image holds with a probability of at least 0.5, or the likeliest",
    )
    parser.add_argument(
        "--labels",
        type=_names,
        metavar="CLASS,...",
        help="the classes that all the images hold, where that is known: no other is predicted",
    )
    parser.add_argument("--crf", action="store_true", help="refine by a dense CRF; needs the extra `crf`")
    add_traceback(parser)
    add_settings(parser, Config(), _SETTINGS)
    return parser


def _names(text: str) -> list[str]:
    names = [name.strip() for name in text.split(",") if name.strip()]
    if not names:
        raise argparse.ArgumentTypeError(f"must name classes with commas between, got {text!r}")
    return names


def _indices(model: Model, names: Sequence[str]) -> list[int]:
    found: list[int] = model.label_vector(names)[0].nonzero().flatten().tolist()
    return found


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
