from __future__ import annotations

import inspect
import re

import pytest
import torch

from cosa.config import Config, fields, override
from cosa.data.shapes import CLASSES
from cosa.data.voc import VOC_CLASSES
from cosa.evaluation import coexistence_indices
from cosa.presets import PRESETS, get_preset
from cosa.step import build_state


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_passes_every_check(name: str) -> None:
    preset = get_preset(name)

    assert override(preset, {}) == preset


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_says_where_it_runs_and_by_which_command(name: str) -> None:
    note = PRESETS[name].__doc__ or ""

    assert "Hardware: " in note
    assert f"Command: cosa-train {name}" in note


@pytest.mark.parametrize("name", PRESETS)
def test_the_command_of_a_preset_uses_settings_that_exist(name: str) -> None:
    (command,) = re.findall(r"^Command: (.+)$", inspect.getdoc(PRESETS[name]) or "", re.MULTILINE)

    assert {flag for flag in re.findall(r"--(\S+)", command) if "." in flag} <= fields().keys()


@pytest.mark.parametrize("name", PRESETS)
def test_the_sizes_of_a_preset_fit_each_other(name: str) -> None:
    """Crop, strides and evaluation fit the patches, and the earlier block exists; in a narrower network."""
    preset = get_preset(name)
    heads = preset.network.heads or 2
    narrow = {"network.pretrained": False, "network.heads": heads, "network.width": 8 * heads}

    state = build_state(override(preset, narrow), classes=6, device=torch.device("cpu"))

    assert state.step == 0


@pytest.mark.parametrize("name", PRESETS)
def test_the_coexistence_classes_of_a_preset_are_classes_of_its_data(name: str) -> None:
    preset = get_preset(name)
    classes = {"shapes": CLASSES, "voc": VOC_CLASSES}.get(preset.data.layout, ())  # the others name none

    assert bool(coexistence_indices(preset.evaluation, classes)) == bool(classes)


def test_the_voc_preset_is_the_paper_setting() -> None:
    assert get_preset("voc") == override(Config(), {"evaluation.train_split": "train"})


def test_the_coco_preset_is_the_paper_setting_for_two_gpus_with_four_images_each() -> None:
    preset = get_preset("coco")

    assert (preset.train.iterations, preset.train.warmup, preset.train.batch_size) == (40_000, 10_000, 2 * 4)
    assert (preset.data.layout, preset.data.train_split, preset.data.val_split) == (
        "coco",
        "train2014",
        "val2014",
    )


def test_an_unknown_preset_names_the_nearest_one() -> None:
    with pytest.raises(ValueError, match=r"preset must be one of .+, got 'shape'; did you mean 'shapes'\?"):
        get_preset("shape")
