"""`cosa-data`: `check` reads a whole data set, `show` draws from it; `pack` and `speed` are for clusters."""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from cosa.cli.common import FAILED, Parser, changed_settings, whole_number
from cosa.cli.console import Counter, aligned_table
from cosa.config import Config, DataConfig, nearest, override
from cosa.storage.files import require_folder

if TYPE_CHECKING:
    from cosa.data.check import SplitSummary


def main(prog: str, arguments: Sequence[str]) -> int:
    """What `cosa-data` does; returns the exit code."""
    parser = Parser(prog=prog, description="Look at a data set before it is used.")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)

    def add(name: str, run: Callable[[argparse.Namespace, DataConfig], int], description: str) -> Parser:
        summary = description.partition(". ")[0].rstrip(".")
        command = commands.add_parser(name, help=summary, description=description)
        command.set_defaults(run=run)
        command.flag("root", "ROOT", "folder of the data set", type=Path)
        layouts = ("voc", "coco", "folder", "shapes")
        command.add_argument("--layout", choices=layouts, help="its layout (default: told by its files)")
        cache = DataConfig().cache
        command.flag("--cache", "DIR", f"where COCO's masks are kept (default {cache})", default=cache)
        command.traceback()
        return command

    check = add(
        "check",
        _check,
        "Read every file, list all that is wrong, count images and pixels per class. Exit code 1 when "
        "something is wrong. COCO's masks are drawn into the cache on the way, ready for training.",
    )
    check.flag("--split", "NAME", "check this split alone; may be repeated", action="append")
    show = add(
        "show",
        _show,
        "Draw a sample of images with their masks laid over them and the classes they are labelled with.",
    )
    show.flag("--split", "NAME", "which split (default one called val, else the first)")
    show.flag("--out", "FILE", "picture to write, such as a.png", type=Path, required=True)
    show.flag("--images", "N", "how many (default 12)", type=whole_number, default=12)
    show.flag("--seed", "N", "which ones (default 0)", type=whole_number, default=0)
    pack = add(
        "pack",
        _pack,
        "Write an archive that machines of a cluster unpack by themselves. It is one uncompressed tar, for "
        "--data.archive; the same files make the same bytes.",
    )
    pack.flag("--out", "FILE.tar", "archive to write, outside of ROOT", type=Path, required=True)
    speed = add(
        "speed",
        _speed,
        "Measure how fast images come from the disk and from the loader, and tell what training needs.",
    )
    speed.flag("--split", "NAME", "which split (default one called train, else the first)")
    speed.flag("--images", "N", "how many to read (default 256)", type=whole_number, default=256)
    speed.settings(Config(), only=("data.loader_workers", "data.crop_size"))
    given = parser.parse_known(arguments)
    code: int = given.run(given, _data(given))
    return code


def _data(given: argparse.Namespace) -> DataConfig:
    from cosa.data.check import detect_layout

    root = given.root.expanduser().absolute()
    # `shapes` is the VOC layout on disk; read as such, a mistyped folder is not filled with images.
    layout = {"shapes": "voc"}.get(given.layout, given.layout) or detect_layout(root)
    return DataConfig(layout=layout, root=str(root), cache=given.cache)


def _check(given: argparse.Namespace, data: DataConfig) -> int:
    from cosa.data.check import check

    summary = check(data, _splits(data, given.split or ()), _progress())
    print(f"\n{data.root}, layout {data.layout}\n")
    if summary.splits:
        print(table(summary.splits))
    print("", *summary.problems, sep="\n")
    count = len(summary.problems)
    names = [split.name for split in summary.splits]
    if not given.split and names == ["val"]:
        print("val alone is there, to judge on; to train, add the images and the list of another split")
    print(f"{count} thing{'s' * (count > 1)} wrong" if count else "nothing is wrong")
    return FAILED if count else 0


def _progress() -> Callable[[str, int, int], None]:
    """Shows a count for each split, which stays on a terminal."""
    counter = Counter(0)

    def advance(split: str, done: int, total: int) -> None:
        nonlocal counter
        if not total:
            counter.live.show(f"{split}: opening", always=True)
        elif not done:
            counter = Counter(total, f"{split}: ")
        else:
            counter.add(done - counter.done)

    return advance


def _show(given: argparse.Namespace, data: DataConfig) -> int:
    from cosa.data.check import open_split
    from cosa.evaluation.pictures import draw_sample

    split = _choose_split(given, data, "val")
    out: Path = given.out
    if out.suffix.lower() not in {".png", ".jpg"}:
        raise ValueError(f"--out must end in .png or .jpg, got {str(out)!r}")
    require_folder("--out", out.absolute().parent)
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
    require_folder("--out", out.parent)
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
    workers = f"  ({data.loader_workers} processes, crops of {data.crop_size})"
    rows = [("the disk alone", found.disk, f"  ({read} files)"), ("the loader", found.loader * size, workers)]
    rows += [("training needs", rate * size, "") for rate in (10, 100, 1000)]
    for name, rate, note in rows:
        print(f"{name:17}{rate / 1e6:8.2f} MB/s  {rate / size:7.0f} images/s{note}")
    print(
        "\nTraining says its images/s, over all workers, in each line of progress. Each worker has a loader\n"
        "of its own; the disk is shared by those of a machine, a shared file system by all."
    )
    return 0


def _splits(data: DataConfig, asked: Sequence[str]) -> list[str]:
    """The splits asked for, which must be there; by default all."""
    from cosa.data.check import splits_of

    splits = splits_of(data)
    for split in asked:
        if split not in splits:
            raise ValueError(
                f"--split must be one of the data set, got {split!r}; there are: {', '.join(splits)}"
                f"{nearest(split, splits)}"
            )
    return list(asked) or splits


def _choose_split(given: argparse.Namespace, data: DataConfig, beginning: str) -> str:
    """The split that was asked for, else the first one whose name begins so, else the first."""
    splits = _splits(data, [given.split] if given.split else [])
    return next((name for name in splits if name.startswith(beginning)), splits[0])


def table(splits: Sequence[SplitSummary]) -> str:
    """Images, and percent of pixels where there are masks, per class and split."""
    classes = splits[0].classes
    extra = ["mask shows more than labels"] if any(split.unlabelled_masks for split in splits) else []
    columns = {"": ["all", "without objects", "background", *classes, "not counted", *extra]}
    for split in splits:
        total = max(1, sum(split.pixels))
        percents = [f"{100 * count / total:.2f}" for count in split.pixels] or ["-"] * (len(classes) + 2)
        images = [
            split.images,
            split.without_objects,
            "",
            *split.images_per_class,
            "",
            split.unlabelled_masks,
        ]
        height = len(columns[""])
        columns[f"{split.name} images"] = [*map(str, images)][:height]
        columns[f"{split.name} pixels %"] = ["", "", *percents, ""][:height]
    return aligned_table(columns)
