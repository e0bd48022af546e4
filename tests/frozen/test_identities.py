"""Identities and settings as text are those of commit 25ac2bd: results made earlier are found again."""

from __future__ import annotations

import json

import pytest

from cosa.config import from_json, to_json
from cosa.config.presets import PRESETS, get_preset
from tests.frozen.identities import identities
from tests.frozen.recipe import DATA, read


def test_every_identity_is_what_it_was() -> None:
    now = json.dumps(identities(), indent=1, sort_keys=True) + "\n"

    assert now == (DATA / "identities.json").read_text()


def test_there_are_the_presets_that_there_were() -> None:
    assert sorted(PRESETS) == sorted(read("presets.json"))


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_as_text_is_what_it_was(name: str) -> None:
    kept = read("presets.json")[name]

    assert to_json(get_preset(name)) == kept
    assert from_json(kept) == get_preset(name)
