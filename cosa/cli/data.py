"""`cosa-data`: `check` reads a whole data set, `show` draws from it; `pack` and `speed` are for clusters."""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cosa.cli.common import FAILED, Parser, add_settings, add_traceback, changed_settings, whole_number
from cosa.cli.console import SplitBar
from cosa.config import Config, DataConfig, nearest, override

if TYPE_CHECKING:
    from cosa.data.check import SplitSummary
else:
    SplitSummary = Any  # the data package imports torch; tests check annotations as the program runs

RATES = (10, 100, 1000)
"""Images per second that the table of `speed` shows."""


def main(prog: str, arguments: Sequence[str]) -> int:
    """What `cosa-data` does; returns the exit code."""
    parser = Parser(prog=prog, description="Look at a data set before it is used.")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    check = commands.add_parser(
        "check",
        help="read every file, list all that is wrong, count images and pixels per class",
        description="Read every file of a data set and list everything that is wrong with it. Exit code 1 "
        "when something is. COCO's masks are drawn into the cache on the way, ready for training.",
    )
    show = commands.add_parser(
        "show",
        help="draw a sample of images with their masks laid over them",
        description="Draw a sample of images with their masks laid over them and the classes they are "
        "labelled with.",
    )
    pack = commands.add_parser(
        "pack",
        help="write an archive that machines of a cluster unpack by themselves",
        description="Write a data set into one uncompressed tar, for --data.archive. The same files make the "
        "same bytes.",
    )
    speed = commands.add_parser(
        "speed",
        help="measure how fast images come from the disk and from the loader",
        description="Measure how fast images come from the disk and from the loader, and tell what training "
        "needs.",
    )
    for command in (check, show, pack, speed):
        _add_data(command)
    check.add_argument(
        "--split", action="append", metavar="NAME", help="check this split alone; may be repeated"
    )
    show.add_argument("--split", metavar="NAME", help="which split (default one called val, else the first)")
    show.add_argument(
        "--out", type=Path, required=True, metavar="FILE", help="picture to write, such as a.png"
    )
    show.add_argument("--images", type=whole_number, default=12, metavar="N", help="how many (default 12)")
    show.add_argument("--seed", type=whole_number, default=0, metavar="N", help="which ones (default 0)")
    pack.add_argument(
        "--out", type=Path, required=True, metavar="FILE.tar", help="archive to write, outside of ROOT"
    )
    speed.add_argument(
        "--split", metavar="NAME", help="which split (default one called train, else the first)"
    )
    speed.add_argument(
        "--images", type=whole_number, default=256, metavar="N", help="how many to read (default 256)"
    )
    add_settings(speed, Config(), only=("data.loader_workers", "data.crop_size"))
    given = parser.parse_known(arguments)
    run = {"check": _check, "show": _show, "pack": _pack, "speed": _speed}[given.command]
    return run(given, _data(given))


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


def _check(given: argparse.Namespace, data: DataConfig) -> int:
    from cosa.data.check import check, splits_of

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


def _show(given: argparse.Namespace, data: DataConfig) -> int:
    from cosa.data.check import open_split
    from cosa.evaluation.pictures import draw_sample

    split = _choose_split(given, data, "val")
    out: Path = given.out
    if out.suffix.lower() not in {".png", ".jpg"}:
        raise ValueError(f"--out must end in .png or .jpg, got {str(out)!r}")
    dataset = open_split(data, split)
    out.parent.mkdir(parents=True, exist_ok=True)
    draw_sample(dataset, given.images, given.seed).save(out)
    print(f"{out}: {min(given.images, len(dataset))} of {len(dataset)} images of {split}")
    return 0


def _pack(given: argparse.Namespace, data: DataConfig) -> int:
    from cosa.data.archive import pack
    from cosa.data.check import splits_of
    from cosa.data.open import open_dataset
    from cosa.storage.files import digest

    root, out = Path(data.root), given.out.expanduser().absolute()
    images = {
        path for split in splits_of(data) for path in open_dataset(data, split, needs="images").image_paths
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    files, sha256 = pack(root, out), digest(out)
    print(f"{out}: {files} files, {len(images)} images of the splits, {out.stat().st_size:,} bytes")
    print(f"sha256 {sha256}")
    print("\nput it where all machines reach it, and name it with a folder that each of them has to itself:")
    flags = ["--data.archive", str(out), "--data.archive_sha256", sha256]
    print(f"  {shlex.join(flags)} --data.root /FOLDER/ON/EACH/{root.name}")
    return 0


def _speed(given: argparse.Namespace, data: DataConfig) -> int:
    from cosa.data.check import measure
    from cosa.data.open import open_dataset

    if not given.images:
        raise ValueError("--images must be >= 1, got 0")
    split = _choose_split(given, data, "train")
    data = override(Config(data=data), changed_settings(given)).data
    dataset = open_dataset(data, split, needs="images")
    found = measure(dataset, data, given.images)
    size = found.mean_bytes
    read = min(given.images, len(dataset))
    print(f"{data.root}, {split}: {len(dataset)} images of {size / 1e3:.0f} kB on average\n")
    print(f"the disk alone   {_rate(found.disk)}  {found.disk / size:7.0f} images/s  ({read} files)")
    print(
        f"the loader       {_rate(found.loader * size)}  {found.loader:7.0f} images/s  "
        f"({data.loader_workers} processes, crops of {data.crop_size})"
    )
    for rate in RATES:
        print(f"training needs   {_rate(rate * size)}  {rate:7} images/s")
    print(
        "\nTraining says its images/s, over all workers, in each line of progress. Each worker has a loader\n"
        "of its own; the disk is shared by those of a machine, a shared file system by all."
    )
    return 0


def _rate(bytes_per_second: float) -> str:
    return f"{bytes_per_second / 1e6:8.2f} MB/s"


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
    columns = [["", "", "all", "without objects", "background", *classes, "not counted"]]
    for split in splits:
        total = max(1, sum(split.pixels))
        percents = [f"{100 * count / total:.2f}" for count in split.pixels] or ["-"] * (len(classes) + 2)
        images = map(str, split.images_per_class)
        columns += [
            [split.name, "images", str(split.images), str(split.without_objects), "", *images, ""],
            ["", "pixels %", "", "", *percents],
        ]
    if any(split.unlabelled_masks for split in splits):
        cells = (cell for split in splits for cell in (str(split.unlabelled_masks), ""))
        for column, cell in zip(columns, ("mask shows more than labels", *cells), strict=True):
            column.append(cell)
    widths = [max(map(len, column)) for column in columns]
    names = [cell.ljust(widths[0]) for cell in columns[0]]
    numbers = ([cell.rjust(w) for cell in column] for column, w in zip(columns[1:], widths[1:], strict=True))
    return "\n".join("  ".join(row).rstrip() for row in zip(names, *numbers, strict=True))
