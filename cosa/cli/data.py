"""`cosa-data`: `check` reads a whole data set, `show` draws from it; `pack` and `speed` are for clusters."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cosa.cli.common import FAILED, Parser, add_traceback, whole_number
from cosa.cli.console import SplitBar
from cosa.cli.packing import add_pack, add_speed, run_pack, run_speed
from cosa.config import DataConfig, nearest

if TYPE_CHECKING:
    from cosa.data.check import SplitSummary
else:
    SplitSummary = Any  # the data package imports torch; tests check annotations as the program runs


def main(prog: str, arguments: Sequence[str]) -> int:
    """What `cosa-data` does; returns the exit code."""
    parser = Parser(prog=prog, description="Look at a data set before it is used.", allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    check = commands.add_parser(
        "check",
        help="read every file, list all that is wrong, count images and pixels per class",
        description="Read every file of a data set and list everything that is wrong with it. Exit code 1 "
        "when something is. COCO's masks are drawn into the cache on the way, ready for training.",
        allow_abbrev=False,
    )
    show = commands.add_parser(
        "show",
        help="draw a sample of images with their masks laid over them",
        description="Draw a sample of images with their masks laid over them and the classes they are "
        "labelled with.",
        allow_abbrev=False,
    )
    pack = commands.add_parser(
        "pack",
        help="write an archive that machines of a cluster unpack by themselves",
        description="Write a data set into one uncompressed tar, for --data.archive. The same files make the "
        "same bytes.",
        allow_abbrev=False,
    )
    speed = commands.add_parser(
        "speed",
        help="measure how fast images come from the disk and from the loader",
        description="Measure how fast images come from the disk and from the loader, and tell what training "
        "needs.",
        allow_abbrev=False,
    )
    for command in (check, show, pack, speed):
        _add_data(command)
    add_pack(pack)
    add_speed(speed)
    check.add_argument(
        "--split", action="append", metavar="NAME", help="check this split alone; may be repeated"
    )
    show.add_argument("--split", metavar="NAME", help="which split (default one called val, else the first)")
    show.add_argument(
        "--out", type=Path, required=True, metavar="FILE", help="picture to write, such as a.png"
    )
    show.add_argument("--images", type=whole_number, default=12, metavar="N", help="how many (default 12)")
    show.add_argument("--seed", type=whole_number, default=0, metavar="N", help="which ones (default 0)")
    given = parser.parse_known(arguments)
    if given.command == "pack":
        return run_pack(given, _data(given))
    if given.command == "speed":
        data = _data(given)
        return run_speed(given, data, _choose_split(given, data, "train"))
    return _check(given) if given.command == "check" else _show(given)


def _add_data(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("root", type=Path, metavar="ROOT", help="folder of the data set")
    parser.add_argument(
        "--layout",
        choices=("voc", "coco", "folder", "shapes"),
        help="its layout (default: told by its files)",
    )
    parser.add_argument(
        "--cache",
        default=DataConfig().cache,
        metavar="DIR",
        help=f"where COCO's masks are kept (default {DataConfig().cache})",
    )
    add_traceback(parser)


def _data(given: argparse.Namespace) -> DataConfig:
    from cosa.data.check import detect_layout

    root = given.root.expanduser().absolute()
    # `shapes` is the VOC layout on disk; read as such, a mistyped folder is not filled with images.
    layout = {"shapes": "voc"}.get(given.layout, given.layout) or detect_layout(root)
    return DataConfig(layout=layout, root=str(root), cache=given.cache)


def _check(given: argparse.Namespace) -> int:
    from cosa.data.check import check, splits_of

    data = _data(given)
    splits = splits_of(data)
    for split in given.split or ():
        _require_split(split, splits)
    progress = SplitBar()
    summary = check(data, given.split or splits, progress)
    progress.keep()
    print(f"\n{data.root}, layout {data.layout}\n")
    if summary.splits:
        print(table(summary.splits))
    print()
    for problem in summary.problems:
        print(problem)
    count = len(summary.problems)
    print(f"{count} thing{'s' * (count > 1)} wrong" if count else "nothing is wrong")
    return FAILED if count else 0


def _show(given: argparse.Namespace) -> int:
    from cosa.data.check import open_split
    from cosa.evaluation.gallery import draw_gallery

    data = _data(given)
    split = _choose_split(given, data, "val")
    out: Path = given.out
    if out.suffix.lower() not in {".png", ".jpg"}:
        raise ValueError(f"--out must end in .png or .jpg, got {str(out)!r}")
    dataset = open_split(data, split)
    out.parent.mkdir(parents=True, exist_ok=True)
    draw_gallery(dataset, given.images, given.seed).save(out)
    print(f"{out}: {min(given.images, len(dataset))} of {len(dataset)} images of {split}")
    return 0


def _choose_split(given: argparse.Namespace, data: DataConfig, beginning: str) -> str:
    """The split that was asked for, else the first one whose name begins so, else the first."""
    from cosa.data.check import splits_of

    splits = splits_of(data)
    split = given.split or next((name for name in splits if name.startswith(beginning)), splits[0])
    _require_split(split, splits)
    return str(split)


def _require_split(split: str, splits: Sequence[str]) -> None:
    if split not in splits:
        raise ValueError(
            f"--split must be one of the data set, got {split!r}; there are: {', '.join(splits)}"
            f"{nearest(split, splits)}"
        )


def table(splits: Sequence[SplitSummary]) -> str:
    """Images, and percent of pixels where there are masks, per class and split."""
    classes = splits[0].classes
    rows = [["", *(cell for split in splits for cell in (split.name, ""))]]
    rows += [["", *(cell for _ in splits for cell in ("images", "pixels %"))]]
    rows += [["all", *(cell for s in splits for cell in (str(s.images), ""))]]
    rows += [["without objects", *(cell for s in splits for cell in (str(s.without_objects), ""))]]
    rows += [["background", *(cell for s in splits for cell in ("", _percent(s, 0)))]]
    rows += [
        [name, *(cell for s in splits for cell in (str(s.images_per_class[i]), _percent(s, i + 1)))]
        for i, name in enumerate(classes)
    ]
    rows += [["not counted", *(cell for s in splits for cell in ("", _percent(s, -1)))]]
    if any(s.unlabelled_masks for s in splits):
        cells = (cell for s in splits for cell in (str(s.unlabelled_masks), ""))
        rows += [["mask shows more than labels", *cells]]
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "\n".join(
        (
            row[0].ljust(widths[0]) + "".join(f"  {c:>{w}}" for c, w in zip(row[1:], widths[1:], strict=True))
        ).rstrip()
        for row in rows
    )


def _percent(split: SplitSummary, place: int) -> str:
    if not split.pixels:
        return "-"
    return f"{100 * split.pixels[place] / max(1, sum(split.pixels)):.2f}"
