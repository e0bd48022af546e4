from __future__ import annotations

import copy
import json
import math
import os
import pickle
import re
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from cosa import config as configs
from cosa.config import (
    MACHINE_FIELDS,
    CamConfig,
    Config,
    CscConfig,
    EmaConfig,
    difference,
    fields,
    flatten,
    from_json,
    identity,
    override,
    to_json,
    warmup_identity,
)

# A valid value other than the default, for every setting.
OTHER: Mapping[str, Any] = {
    "data.layout": "shapes",
    "data.root": "elsewhere",
    "data.archive": "s3://bucket/images.tar",
    "data.archive_sha256": "0" * 64,
    "data.cache": "elsewhere",
    "data.train_split": "train",
    "data.val_split": "test",
    "data.keep_empty": False,
    "data.crop_size": 224,
    "data.scale_min": 0.75,
    "data.scale_max": 1.5,
    "data.mean": (0.5, 0.5, 0.5),
    "data.std": (0.5, 0.5, 0.5),
    "data.flip_prob": 0.0,
    "data.blur_prob": 0.25,
    "data.strong_appearance": False,
    "data.loader_workers": 0,
    "network.architecture": "upernet",
    "network.encoder": "vit_tiny_patch16_224",
    "network.pretrained": False,
    "network.weights": "",  # needs `pretrained` off: see its own tests
    "network.weights_sha256": "0" * 64,
    "network.patch_size": 8,
    "network.width": 64,
    "network.depth": 6,
    "network.heads": 4,
    "network.drop_path": 0.1,
    "network.aux_block": -4,
    "network.aux_head": True,  # False goes with no CSC alone: see its own test
    "network.aux_norm": True,
    "network.train_pos_embed": True,
    "network.decoder_channels": 64,
    "network.decoder_dilation": 2,
    "cam.scales": (1.0,),
    "cam.flip": False,
    "cam.fusion": "sum",
    "cam.aux_fusion": "last",
    "cam.stride": 4,
    "cam.source": "online",
    "threshold.mode": "fixed",
    "threshold.xi": 0.3,
    "threshold.band": (),  # goes with a fixed threshold alone: see its own tests
    "threshold.aux_band": (),
    "threshold.queue": 10,
    "threshold.min_activation": -1.0,
    "threshold.min_std": 0.2,
    "raw.enabled": False,
    "raw.alpha": 0.5,
    "raw.beta": 2.0,
    "c2s.weight": 0.2,
    "c2s.aux": False,
    "c2s.average": "balanced",
    "s2c.weight": 0.1,
    "s2c.tau": 0.1,
    "s2c.cam": "relu",
    "s2c.source": "gt",
    "s2c.detach": "features",
    "csc.weight": 0.2,
    "csc.epsilon": math.inf,
    "csc.tau": 0.1,
    "csc.max_anchors": 64,
    "ema.momentum": 0.99,
    "optim.lr": 1e-4,
    "optim.head_lr_scale": 1.0,
    "optim.weight_decay": 0.05,
    "optim.decay_vectors": False,
    "optim.beta1": 0.8,
    "optim.beta2": 0.99,
    "optim.lr_warmup": 10,
    "optim.power": 1.0,
    "optim.clip_norm": 1.0,
    "optim.algorithm": "sgd",
    "train.seed": 1,
    "train.iterations": 40_000,
    "train.warmup": 100,
    "train.batch_size": 8,
    "train.accumulate": 2,
    "train.precision": "bf16",
    "train.compile": True,
    "train.log_every": 10,
    "train.checkpoint_every": 10,
    "train.keep_checkpoints": 1,
    "evaluation.every": 10,
    "evaluation.size": 224,
    "evaluation.scales": (1.0, 0.5),
    "evaluation.flip": False,
    "evaluation.batch_size": 1,
    "evaluation.max_images": 100,
    "evaluation.xi": 0.45,
    "evaluation.coexistence": ("train",),
    "evaluation.train_split": "train",
    "evaluation.crf": True,
    "evaluation.panel_images": 0,
    "evaluation.panel_choice": "first",
    "evaluation.panel_seed": 1,
    "segmentation.supervision": "masks",
    "segmentation.labels": "labels",
    "segmentation.labels_fingerprint": "0" * 16,
    "segmentation.aux_weight": 0.2,
}
NOT_ALONE = {
    "network.weights",
    "network.aux_head",
    "threshold.band",
    "threshold.aux_band",
    *(name for name in OTHER if name.startswith("segmentation.")),
}
CHANGEABLE = [name for name in OTHER if name not in NOT_ALONE]

# Values just outside each setting's law.
OUTSIDE: Mapping[str, tuple[Any, ...]] = {
    "data.archive": ("s3://***@bucket/images.tar",),
    "data.archive_sha256": ("0" * 63, "g" * 64),
    "data.crop_size": (0,),
    "data.scale_min": (0.0, 8.5),
    "data.scale_max": (0.4, 8.5),
    "data.mean": ((0.5, 0.5), (0.5, 0.5, 1.1)),
    "data.std": ((0.5,), (0.0, 0.5, 0.5)),
    "data.flip_prob": (-0.1, 1.1),
    "data.blur_prob": (-0.1, 1.1),
    "data.loader_workers": (-1,),
    "network.patch_size": (-1,),
    "network.width": (-1,),
    "network.depth": (-1,),
    "network.heads": (-1,),
    "network.drop_path": (-0.1, 1.0),
    "network.aux_block": (-1, 0),
    "network.decoder_channels": (0,),
    "network.decoder_dilation": (0,),
    "cam.scales": ((), (0.0,), (1.0, 4.5)),
    "cam.stride": (0,),
    "threshold.xi": (0.0, 1.0),
    "threshold.queue": (0,),
    "threshold.min_activation": (1.0,),
    "threshold.min_std": (0.0, 0.6),
    "raw.alpha": (0.0, 1.1),
    "raw.beta": (0.0,),
    "c2s.weight": (-0.1, math.inf),
    "s2c.weight": (-0.1, math.inf),
    "s2c.tau": (0.0,),
    "csc.weight": (-0.1, math.inf),
    "csc.epsilon": (0.0,),
    "csc.tau": (0.0,),
    "csc.max_anchors": (1,),
    "ema.momentum": (-0.1, 1.1),
    "optim.lr": (0.0,),
    "optim.head_lr_scale": (0.0,),
    "optim.weight_decay": (-0.1,),
    "optim.beta1": (-0.1, 1.0),
    "optim.beta2": (-0.1, 1.0),
    "optim.lr_warmup": (-1,),
    "optim.power": (-0.1,),
    "optim.clip_norm": (-0.1,),
    "train.seed": (-1, 2**32),
    "train.iterations": (0,),
    "train.warmup": (-1, 20_001),
    "train.batch_size": (0, -2),
    "train.accumulate": (0, 3),
    "train.log_every": (0,),
    "train.checkpoint_every": (0,),
    "train.keep_checkpoints": (0,),
    "evaluation.every": (0,),
    "evaluation.size": (0,),
    "evaluation.scales": ((), (-1.0,)),
    "evaluation.batch_size": (0,),
    "evaluation.max_images": (-1,),
    "evaluation.xi": (0.0, 1.0),
    "evaluation.panel_images": (-1,),
    "evaluation.panel_seed": (-1,),
    "segmentation.aux_weight": (-0.1, math.inf),
}


def test_the_tables_of_this_file_name_every_setting() -> None:
    numbers = {name for name, known in fields().items() if known.annotation in {int, float}}

    assert set(OTHER) == set(fields())
    assert numbers <= set(OUTSIDE), "every number has a law, and an example that breaks it"


@pytest.mark.parametrize("name", fields())
def test_every_setting_says_what_it_means(name: str) -> None:
    doc = fields()[name].description or ""

    assert len(doc.split()) >= 3
    assert doc.endswith(".")


@pytest.mark.parametrize(("name", "value"), [(name, value) for name in OUTSIDE for value in OUTSIDE[name]])
def test_a_value_outside_its_law_is_refused_by_name_and_value(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=r"must .+, got ") as refused:
        override(Config(), {name: value})

    message = str(refused.value)
    assert message.startswith(f"{name} must ")
    assert f", got {value!r}" in message


def test_a_section_refuses_by_itself_what_override_refuses() -> None:
    with pytest.raises(ValueError, match=r"^csc\.weight must be finite and >= 0, got -1$"):
        CscConfig(weight=-1)
    with pytest.raises(TypeError, match=r"^cam\.scales must be a number, got 'big'$"):
        CamConfig(scales=("big",))  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"^csc must be a CscConfig, got 3$"):
        Config(csc=3)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"got 'ema\.momentun'; did you mean 'ema\.momentum'"):
        EmaConfig(momentun=0.9)  # type: ignore[call-arg]


@pytest.mark.parametrize(
    ("name", "value", "law"),
    [
        ("data.flip_prob", 1.5, "lie in [0, 1]"),
        ("raw.alpha", 0.0, "lie in (0, 1]"),
        ("optim.beta1", 1.0, "lie in [0, 1)"),
        ("threshold.min_activation", 1.0, "be < 1"),
        ("csc.max_anchors", 1, "be >= 2"),
        ("csc.epsilon", 0.0, "be > 0"),
        ("s2c.tau", math.inf, "be finite and > 0"),
        ("data.crop_size", 0, "be > 0 pixels"),
        ("cam.scales", (1.0, 5.0), "hold one or more scales in (0, 4]"),
        ("data.scale_max", 0.25, "lie in [data.scale_min, 8] = [0.5, 8]"),
        ("train.warmup", 20_001, "lie in [0, train.iterations] = [0, 20000]"),
    ],
)
def test_a_law_is_told_as_the_range_it_is(name: str, value: Any, law: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(f'{name} must {law}, got {value!r}')}$"):
        override(Config(), {name: value})


@pytest.mark.parametrize("sent", [copy.deepcopy, lambda config: pickle.loads(pickle.dumps(config))])
def test_a_config_travels_between_processes(sent: Callable[[Config], Config]) -> None:
    config = override(Config(), {"csc.epsilon": math.inf})

    assert sent(config) == config
    assert hash(sent(config)) == hash(config)


def test_weights_from_two_sources_are_refused_with_the_way_out() -> None:
    with pytest.raises(ValueError, match=r"network\.pretrained must be false where network\.weights"):
        override(Config(), {"network.weights": "deit.safetensors"})


@pytest.mark.parametrize(
    ("name", "value", "kind"),
    [
        ("train.iterations", "many", "a whole number"),
        ("train.iterations", 1.5, "a whole number"),
        ("train.iterations", "1.5", "a whole number"),
        ("train.iterations", True, "a whole number"),
        ("csc.weight", None, "a number"),
        ("csc.weight", "nan", "a number"),
        ("csc.weight", math.nan, "a number"),
        ("raw.enabled", "perhaps", "true or false"),
        ("raw.enabled", 1, "true or false"),
        ("data.root", 3, "text"),
        ("cam.scales", 1.0, "a list of float"),
        ("cam.scales", "1.0,big", "a number"),
    ],
)
def test_a_value_of_another_type_is_refused_with_the_type_it_should_have(
    name: str, value: Any, kind: str
) -> None:
    with pytest.raises(TypeError, match=f"{name} must be {kind}, got "):
        override(Config(), {name: value})


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("csc.weight", "0.2", 0.2),
        ("csc.weight", "1", 1.0),
        ("csc.epsilon", "inf", math.inf),
        ("train.iterations", "800", 800),
        ("train.iterations", "1e4", 10_000),
        ("raw.enabled", "False", False),
        ("raw.enabled", "yes", True),
        ("cam.scales", "1.0, 0.5", (1.0, 0.5)),
        ("evaluation.coexistence", "train,boat", ("train", "boat")),
        ("evaluation.coexistence", "", ()),
        ("threshold.mode", "fixed", "fixed"),
        ("data.root", " a folder ", "a folder"),
    ],
)
def test_text_is_read_by_the_type_of_the_setting(name: str, text: str, value: Any) -> None:
    changed = flatten(override(Config(), {"train.warmup": 0} | {name: text}))[name]

    assert changed == value
    assert type(changed) is type(value)


def test_a_whole_number_becomes_a_float_where_a_float_is_meant() -> None:
    assert type(override(Config(), {"csc.weight": 1}).csc.weight) is float


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("csc.weigth", "csc.weight"),
        ("thresold.mode", "threshold.mode"),
        ("max_anchor", "csc.max_anchors"),
        ("train.iteration", "train.iterations"),
    ],
)
def test_an_unknown_setting_names_the_nearest_one(name: str, meant: str) -> None:
    with pytest.raises(ValueError, match=f"got '{name}'; did you mean '{meant}'"):
        override(Config(), {name: 1})


def test_a_name_near_to_nothing_gets_no_suggestion() -> None:
    with pytest.raises(ValueError, match=r"got 'zzzzzz'$"):
        override(Config(), {"zzzzzz": 1})


def test_an_unknown_choice_lists_the_choices_and_names_the_nearest() -> None:
    with pytest.raises(ValueError, match=r"dynamic, fixed, got 'fixd'; did you mean 'fixed'"):
        override(Config(), {"threshold.mode": "fixd"})


def test_override_changes_what_it_names_and_nothing_else() -> None:
    changed = override(Config(), {"csc.weight": 0.2, "raw.enabled": False})

    assert list(difference(Config(), changed)) == [
        ("raw.enabled", True, False),
        ("csc.weight", 0.1, 0.2),
    ]


def test_relative_paths_are_made_absolute_and_nothing_else(tmp_path: Path) -> None:
    changes = {"data.root": "images", "data.cache": "/cache", "data.archive": "s3://bucket/a.tar"}
    config = override(Config(), {**changes, "network.weights": "", "network.pretrained": True})

    found = configs.absolute_paths(config, tmp_path)

    assert found == override(config, {"data.root": str(tmp_path / "images")})


def test_settings_whose_laws_speak_of_each_other_change_together() -> None:
    changed = override(Config(), {"train.iterations": 10, "train.warmup": 4})

    assert (changed.train.iterations, changed.train.warmup) == (10, 4)


def test_a_config_cannot_be_changed_in_place() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        Config().csc.weight = 0.2


@pytest.mark.parametrize("name", CHANGEABLE)
def test_a_setting_makes_another_experiment_unless_it_belongs_to_the_machine(name: str) -> None:
    changed = override(Config(), {name: OTHER[name]})

    assert (identity(changed) == identity(Config())) == (name in MACHINE_FIELDS)


@pytest.mark.parametrize("name", CHANGEABLE)
def test_a_warm_up_is_shared_unless_it_reads_the_setting(name: str) -> None:
    changed = override(Config(), {name: OTHER[name]})
    section = name.partition(".")[0]
    unread = name in {*MACHINE_FIELDS, "data.val_split"} or section in {
        "cam",
        "threshold",
        "raw",
        "c2s",
        "s2c",
        "csc",
        "evaluation",
        "ema",
    }

    assert (warmup_identity(changed) == warmup_identity(Config())) == unread


def test_a_weights_file_is_the_same_experiment_in_any_folder() -> None:
    def starting_from(path: str) -> str:
        return identity(override(Config(), {"network.pretrained": False, "network.weights": path}))

    assert starting_from("a/deit.safetensors") == starting_from("b/deit.safetensors")
    assert starting_from("a/deit.safetensors") != starting_from("a/vit.safetensors")


def test_a_file_with_a_known_hash_is_the_same_experiment_under_any_name() -> None:
    def starting_from(path: str, sha256: str) -> str:
        start = {"network.pretrained": False, "network.weights": path, "network.weights_sha256": sha256}
        return identity(override(Config(), start))

    assert starting_from("deit.safetensors", "0" * 64) == starting_from("vit.safetensors", "0" * 64)
    assert starting_from("deit.safetensors", "0" * 64) != starting_from("deit.safetensors", "1" * 64)


@pytest.mark.parametrize(
    "change",
    [
        {"network.encoder": "vit_tiny_patch16_224"},
        {"network.pretrained": False},
        {"network.pretrained": False, "network.weights": "other.pth"},
    ],
)
def test_mean_deviation_and_hash_go_with_the_weights_that_they_belong_to(change: dict[str, Any]) -> None:
    own = {"data.mean": (0.1, 0.2, 0.3), "data.std": (0.4, 0.5, 0.6), "network.weights_sha256": "0" * 64}
    base = override(Config(), own)

    changed, given = override(base, change), override(base, {**change, **own})

    assert (changed.data.mean, changed.data.std, changed.network.weights_sha256) == ((), (), "")
    assert (given.data.mean, given.network.weights_sha256) == ((0.1, 0.2, 0.3), "0" * 64)


def test_a_weights_file_that_is_named_by_another_path_keeps_its_hash(tmp_path: Path) -> None:
    start = {"network.pretrained": False, "network.weights": "w.pth", "network.weights_sha256": "0" * 64}
    config = override(Config(), start)

    found = configs.absolute_paths(config, tmp_path)

    assert (found.network.weights, found.network.weights_sha256) == (str(tmp_path / "w.pth"), "0" * 64)


def test_a_run_of_before_a_setting_was_is_read_as_it_was_trained() -> None:
    whole = json.loads(to_json(Config()))
    old = {name: value for name, value in whole.items() if name not in configs.EARLIER}

    found = from_json(json.dumps(old))

    assert {name: configs.flatten(found)[name] for name in configs.EARLIER} == configs.EARLIER
    assert from_json(json.dumps({"csc.weight": 0.2})) == override(Config(), {"csc.weight": 0.2})


def test_a_band_needs_a_fixed_threshold_within_it() -> None:
    fixed = {"threshold.mode": "fixed", "threshold.xi": 0.45, "threshold.band": "0.2,0.7"}

    assert override(Config(), fixed).threshold.band == (0.2, 0.7)
    for change, law in (
        ({"threshold.mode": "dynamic"}, "threshold.mode must be fixed where threshold.band is given"),
        ({"threshold.xi": 0.1}, r"threshold.xi must lie in threshold.band = \[0.2, 0.7\], got 0.1"),
        ({"threshold.aux_band": "0.5,0.7"}, "threshold.xi must lie in threshold.aux_band"),
        ({"threshold.band": "0.7,0.2"}, "threshold.band must be empty or hold low, high"),
        ({"threshold.band": "0.2"}, "threshold.band must be empty or hold low, high"),
    ):
        with pytest.raises(ValueError, match=law):
            override(Config(), {**fixed, **change})


def test_csc_needs_m_dagger_and_a_base_does_not() -> None:
    without = {"network.aux_head": False}

    with pytest.raises(ValueError, match=r"network.aux_head must be true where csc.weight is not 0"):
        override(Config(), without)

    base = override(Config(), {**without, "csc.weight": 0.0})
    assert warmup_identity(base) != warmup_identity(override(base, {"network.aux_head": True}))


def test_identities_are_the_same_in_every_process() -> None:
    program = "from cosa.config import *; print(identity(Config()), warmup_identity(Config()))"
    other = subprocess.run(
        [sys.executable, "-c", program],
        env=os.environ | {"PYTHONHASHSEED": "1"},
        capture_output=True,
        text=True,
        check=True,
    )

    assert other.stdout.split() == [identity(Config()), warmup_identity(Config())]


def _changes() -> st.SearchStrategy[dict[str, Any]]:
    """Valid changes of many settings at once."""
    share = st.floats(0, 1)
    positive = st.floats(1e-6, 1e6)
    scales = st.lists(st.floats(0.01, 4), min_size=1, max_size=4).map(tuple)
    return st.fixed_dictionaries(
        {},
        optional={
            "data.layout": st.sampled_from(["shapes", "voc"]),
            "data.root": st.text(min_size=1).filter(lambda text: text == text.strip()),
            "data.crop_size": st.integers(1, 10_000),
            "data.scale_min": st.floats(0.01, 2),
            "data.scale_max": st.floats(2, 8),
            "data.flip_prob": share,
            "data.strong_appearance": st.booleans(),
            "network.aux_block": st.integers(-24, -2),
            "cam.scales": scales,
            "threshold.mode": st.sampled_from(["dynamic", "fixed"]),
            "threshold.xi": st.floats(0.001, 0.999),
            "threshold.min_activation": st.floats(-1, 0.999),
            "threshold.min_std": st.floats(0.01, 0.5),
            "csc.epsilon": positive | st.just(math.inf),
            "csc.tau": positive,
            "s2c.tau": positive,
            "ema.momentum": share,
            "optim.lr": st.floats(1e-12, 1),
            "train.seed": st.integers(0, 2**32 - 1),
            "train.warmup": st.integers(0, 20_000),
            "train.iterations": st.integers(20_000, 10**9),
            "evaluation.scales": scales,
            "evaluation.coexistence": st.lists(st.sampled_from(["bird", "train", "boat"])).map(tuple),
        },
    )


@given(_changes())
def test_json_gives_back_the_same_config(changes: dict[str, Any]) -> None:
    config = override(Config(), changes)

    assert from_json(to_json(config)) == config


@given(_changes())
def test_every_setting_written_as_text_is_read_back_as_it_was(changes: dict[str, Any]) -> None:
    config = override(Config(), changes)
    written = {
        name: ",".join(map(repr, value)).replace("'", "") if isinstance(value, tuple) else str(value)
        for name, value in flatten(config).items()
    }

    assert override(Config(), written) == config


@pytest.mark.parametrize(
    ("text", "error", "message"),
    [
        ("{", ValueError, "config must be JSON"),
        ("[]", TypeError, "config must be a JSON object"),
        ('{"csc.wait": 1}', ValueError, "did you mean 'csc.weight'"),
        ('{"train.seed": -1}', ValueError, "train.seed must lie in"),
    ],
)
def test_a_file_that_is_no_config_says_why(text: str, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        from_json(text)


def test_a_file_of_a_few_settings_leaves_the_others_at_their_defaults() -> None:
    assert from_json(json.dumps({"csc.weight": 0.2})) == override(Config(), {"csc.weight": 0.2})


def test_cotraining_sections_are_sections() -> None:
    assert set(Config.model_fields) >= configs.COTRAINING_SECTIONS
