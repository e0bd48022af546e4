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


def test_both_voc_presets_see_the_images_that_their_sources_say() -> None:
    seen = {
        name: (p.iterations * p.batch_size, p.warmup * p.batch_size, p.batch_size)
        for name, p in ((name, get_preset(name).train) for name in ("voc", "voc_released"))
    }

    assert seen == {"voc": (80_000, 24_000, 4), "voc_released": (128_000, 24_000, 4)}


@pytest.mark.parametrize(
    ("name", "schedule", "bands"),
    [
        ("voc_released", (32_000, 6_000, 4), ((0.2, 0.7), (0.25, 0.7))),
        ("coco_released", (60_000, 10_000, 8), ((0.25, 0.65), (0.25, 0.7))),
    ],
)
def test_a_released_preset_has_the_schedule_and_the_options_of_the_authors_log(
    name: str, schedule: tuple[int, int, int], bands: tuple[tuple[float, float], ...]
) -> None:
    config, paper = get_preset(name), get_preset(name.removesuffix("_released"))

    assert (config.train.iterations, config.train.warmup, config.train.batch_size) == schedule
    assert (config.threshold.mode, config.threshold.band, config.threshold.aux_band) == ("fixed", *bands)
    assert (config.csc.weight, config.raw.enabled) == (0, False)
    assert (config.c2s.weight, config.c2s.average) == (0.05, "balanced")
    assert (config.s2c.weight, config.s2c.cam) == (0.05, "relu")
    assert (config.cam.fusion, config.cam.aux_fusion) == ("sum", "last")
    assert (config.network, config.optim, config.ema, config.data) == (
        paper.network,
        paper.optim,
        paper.ema,
        paper.data,
    )


def test_the_spl_of_the_released_presets_are_of_the_sum_of_six_logits() -> None:
    config = get_preset("voc_released")
    total = 2 * len(config.cam.scales) * torch.tensor([[0.3, 0.1, 0.2]])

    torch.testing.assert_close((total / 6 / config.s2c.tau).softmax(1), (total / 0.01).softmax(1))


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
