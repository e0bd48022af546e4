"""Ranks with other data than the first one are refused by name, on all ranks, before anything is trained."""

from __future__ import annotations

import os
import shutil
import socket
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import distributed, multiprocessing

from cosa.config import Config, override
from cosa.data.open import (
    fingerprints,
    open_dataset,
    open_run_data,
    read_fingerprints,
)
from cosa.data.shapes import write_shapes
from cosa.storage.run_folder import TRAINING_TAG, VALIDATION_TAG
from cosa.structures import Ranks

ALONE = Ranks.current()
HOST = socket.gethostname()


@pytest.fixture(scope="module")
def head(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The data of the first rank."""
    root = tmp_path_factory.mktemp("head") / "shapes"
    write_shapes(root, train_images=4, val_images=2)
    return root


def changed(head: Path, target: Path, split: str, drop: int = 0) -> Path:
    """A copy of `head` whose split has lost images from its end; with none lost, the first is another."""
    shutil.copytree(head, target)
    names = target / "ImageSets/Segmentation" / f"{split}.txt"
    lines = names.read_text().split()
    if drop:
        names.write_text("\n".join(lines[:-drop]) + "\n")
    else:
        with (target / "JPEGImages" / f"{lines[0]}.png").open("ab") as file:
            file.write(b"more")
    return target


def _open_all(rank: int, folder: Path, jobs: dict[str, list[tuple[Config, dict[str, str]]]]) -> None:
    """One rank of two: opens each job's data with its own settings and leaves what it was told."""
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # gloo, on the CPU
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    for name, settings in jobs.items():
        try:
            open_run_data(settings[rank][0], Ranks.current(), settings[rank][1])
            told = "opened"
        except (OSError, ValueError) as error:
            told = f"{type(error).__name__}: {error}"
        for config, _ in settings:  # on real machines all have the same one
            told = told.replace(config.data.root, "ROOT")
        (folder / f"{name}.{rank}").write_text(told)
    distributed.destroy_process_group()


@pytest.fixture(scope="module")
def told(tiny_config: Config, head: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    """What both ranks were told of each case; one group for all, as starting one costs seconds."""
    folder = tmp_path_factory.mktemp("ranks")

    def at(root: Path, **more: Any) -> Config:
        return override(tiny_config, {"data.root": str(root), **more})

    shutil.copytree(head, folder / "copy")
    fewer = changed(head, folder / "fewer", "train_aug", drop=1)
    other = changed(head, folder / "other", "val")
    began = read_fingerprints(at(head).data)
    jobs = {
        "same": [(at(head), {}), (at(folder / "copy"), {})],
        "fewer": [(at(head), {}), (at(fewer), {})],
        "other": [(at(head), {}), (at(other), {})],
        "none": [(at(head), {}), (at(folder / "none", **{"data.layout": "voc"}), {})],
        "sweep": [(at(fewer), began), (at(fewer), began)],
    }
    multiprocessing.spawn(_open_all, (folder, jobs), nprocs=2)
    return {name: [(folder / f"{name}.{rank}").read_text() for rank in range(2)] for name in jobs}


def test_copies_of_the_same_data_are_opened(told: dict[str, list[str]]) -> None:
    assert told["same"] == ["opened", "opened"]


def test_a_machine_with_fewer_images_is_refused_by_name_on_all_ranks(told: dict[str, list[str]]) -> None:
    assert told["fewer"][0] == told["fewer"][1]
    assert told["fewer"][0].startswith(
        "ValueError: images, labels and masks in data.root must be the same on"
    )
    assert f"on {HOST} (rank 1): 3 images to train on instead of 4; copy them" in told["fewer"][0]


def test_other_validation_images_of_the_same_number_are_refused(told: dict[str, list[str]]) -> None:
    assert told["other"][0] == told["other"][1]
    assert f"on {HOST} (rank 1): 2 images to judge on; copy them" in told["other"][0]


def test_a_machine_without_the_data_is_named_on_all_ranks(told: dict[str, list[str]]) -> None:
    assert told["none"][0] == told["none"][1]
    assert told["none"][0].startswith("FileNotFoundError: data.root must be a folder")
    assert told["none"][0].endswith(f"(on {HOST} (rank 1))")


def test_ranks_that_agree_on_other_data_than_the_sweep_s_are_refused(told: dict[str, list[str]]) -> None:
    assert told["sweep"][0] == told["sweep"][1]
    assert f"on {HOST} (rank 0), {HOST} (rank 1): 3 images to train on; copy" in told["sweep"][0]


def test_one_process_is_held_to_what_is_expected(tiny_config: Config, head: Path, tmp_path: Path) -> None:
    config = override(tiny_config, {"data.root": str(head)})
    expected = read_fingerprints(config.data)

    assert open_run_data(config, ALONE, expected).tags == expected
    with pytest.raises(
        ValueError, match=f"must be the same on every machine, .* on {HOST}: 2 images to judge"
    ):
        open_run_data(config, ALONE, {**expected, VALIDATION_TAG: "f00"})


def test_fingerprints_of_settings_are_those_of_the_opened_data(tiny_config: Config, head: Path) -> None:
    data = override(tiny_config, {"data.root": str(head)}).data
    training, validation = (open_dataset(data, split) for split in ("train_aug", "val"))

    assert read_fingerprints(data) == fingerprints(training, validation)
    assert set(fingerprints(training, validation)) == {TRAINING_TAG, VALIDATION_TAG}


def test_a_run_without_evaluation_has_an_empty_fingerprint_for_it(tiny_config: Config, head: Path) -> None:
    data = override(tiny_config, {"data.root": str(head), "data.val_split": ""}).data

    assert read_fingerprints(data)[VALIDATION_TAG] == ""
