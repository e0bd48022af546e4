from __future__ import annotations

import inspect
import re
from pathlib import Path

import pytest
import torch

from cosa.config import Config, fields, override, to_json
from cosa.config.presets import PRESETS, get_preset, short_name
from cosa.data.shapes import CLASSES
from cosa.data.voc import VOC_CLASSES
from cosa.evaluation.evaluate import coexistence_indices
from cosa.training.step import build_state


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


def test_a_file_of_settings_is_a_preset(tmp_path: Path) -> None:
    config = override(get_preset("shapes"), {"csc.weight": 0.25, "data.root": "/mnt/shapes"})
    path = tmp_path / "best.json"
    path.write_text(to_json(config))

    assert get_preset(str(path)) == config
    assert short_name(str(path)) == "best"
    assert short_name("voc_tiny") == "voc_tiny"


@pytest.mark.parametrize(
    ("content", "error"),
    [
        ('{"csc.weight": 0.2', "config must be JSON, got an error at line 1"),
        ('{"csc.wieght": 0.2}', "got 'csc.wieght'; did you mean 'csc.weight'?"),
        ('{"csc.weight": "much"}', "csc.weight must be a number, got 'much'"),
        ("[1, 2]", "config must be a JSON object of dotted settings, got list"),
        ("\N{SNOWMAN}", "config must be JSON"),
    ],
)
def test_a_broken_file_of_settings_is_named_with_what_is_wrong(
    tmp_path: Path, content: str, error: str
) -> None:
    path = tmp_path / "best.json"
    path.write_text(content, encoding="utf-8")

    with pytest.raises((ValueError, TypeError), match=re.escape(error)) as raised:
        get_preset(str(path))

    assert str(path) in str(raised.value)


def test_a_file_of_settings_that_does_not_exist_is_named() -> None:
    with pytest.raises(
        FileNotFoundError, match=r"preset must name a file that exists, got 'nowhere/best\.json'"
    ):
        get_preset("nowhere/best.json")
