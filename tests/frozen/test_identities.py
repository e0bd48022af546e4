"""Identities and settings as text are those that were kept: results made earlier are found again.

Those of `shapes`, and of what the presets of commit 25ac2bd wrote, are that commit's. The other presets start
from published weights, and what they start from was not named then.
"""

from __future__ import annotations

import json

import pytest

from cosa.config import from_json, identity, to_json, warmup_identity
from cosa.config.presets import PRESETS, get_preset
from tests.frozen.identities import as_texts, identities
from tests.frozen.recipe import DATA, read


def test_every_identity_is_what_it_was() -> None:
    now = json.dumps(identities(), indent=1, sort_keys=True) + "\n"

    assert now == (DATA / "identities.json").read_text()


def test_there_are_the_presets_that_there_were() -> None:
    assert sorted(PRESETS) == sorted(read("presets.json"))


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_as_text_is_what_it_was(name: str) -> None:
    kept = read("presets.json")[name]

    assert as_texts()[name] == kept
    assert from_json(kept) == get_preset(name)


@pytest.mark.parametrize("name", read("earlier_presets.json"))
def test_settings_that_commit_25ac2bd_wrote_are_the_experiment_that_they_were(name: str) -> None:
    kept = read("earlier_presets.json")[name]
    found = from_json(kept["settings"])

    assert [identity(found), warmup_identity(found)] == kept["identities"]
    assert json.loads(kept["settings"]).items() <= json.loads(to_json(found)).items()


def test_shapes_is_the_experiment_that_it_was() -> None:
    preset = get_preset("shapes")

    assert [identity(preset), warmup_identity(preset)] == read("earlier_presets.json")["shapes"]["identities"]
