from __future__ import annotations

import pytest

from cosa.config import Config, override
from cosa.presets import PRESETS, get_preset


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_passes_every_check(name: str) -> None:
    preset = get_preset(name)

    assert override(preset, {}) == preset


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_says_where_it_runs_and_by_which_command(name: str) -> None:
    note = PRESETS[name].__doc__ or ""

    assert "Hardware: " in note
    assert f"Command: cosa-train {name}" in note


def test_the_voc_preset_is_the_paper_setting() -> None:
    assert get_preset("voc") == Config()


def test_an_unknown_preset_names_the_nearest_one() -> None:
    with pytest.raises(ValueError, match=r"preset must be one of .+, got 'shape'; did you mean 'shapes'\?"):
        get_preset("shape")
