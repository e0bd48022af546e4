"""`cosa-data pack` and `cosa-data speed`: a data set for the machines of a cluster, and how fast it comes."""

from __future__ import annotations

import argparse
import shlex
from pathlib import Path

from cosa.cli.common import add_settings, changed_settings, whole_number
from cosa.config import Config, DataConfig, override

RATES = (10, 100, 1000)
"""Images per second that the table of `speed` shows."""


def add_pack(parser: argparse.ArgumentParser) -> None:
    """The flags of `cosa-data pack`."""
    parser.add_argument(
        "--out", type=Path, required=True, metavar="FILE.tar", help="archive to write, outside of ROOT"
    )


def add_speed(parser: argparse.ArgumentParser) -> None:
    """The flags of `cosa-data speed`."""
    parser.add_argument(
        "--split", metavar="NAME", help="which split (default one called train, else the first)"
    )
    parser.add_argument(
        "--images", type=whole_number, default=256, metavar="N", help="how many to read (default 256)"
    )
    add_settings(parser, Config(), only=("data.loader_workers", "data.crop_size"))


def run_pack(given: argparse.Namespace, data: DataConfig) -> int:
    """Write the archive and say how it is used; returns the exit code."""
    from cosa.data.archive import pack
    from cosa.data.check import splits_of
    from cosa.data.open import open_dataset

    root, out = Path(data.root), given.out.expanduser().absolute()
    images = {
        path for split in splits_of(data) for path in open_dataset(data, split, needs="images").image_paths
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    packed = pack(root, out)
    print(f"{out}: {packed.files} files, {len(images)} images of the splits, {packed.size:,} bytes")
    print(f"sha256 {packed.sha256}")
    print("\nput it where all machines reach it, and name it with a folder that each of them has to itself:")
    flags = ["--data.archive", str(out), "--data.archive_sha256", packed.sha256]
    print(f"  {shlex.join(flags)} --data.root /FOLDER/ON/EACH/{root.name}")
    return 0


def run_speed(given: argparse.Namespace, data: DataConfig, split: str) -> int:
    """Measure and tell; returns the exit code."""
    from cosa.data.check import measure
    from cosa.data.open import open_dataset

    if not given.images:
        raise ValueError("--images must be >= 1, got 0")
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
