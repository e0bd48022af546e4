"""What an encoder's name stands for: pinned before a run is planned, loaded tensor by tensor, or refused."""

from __future__ import annotations

import hashlib
import importlib
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from cosa.config import IMAGENET_MEAN, IMAGENET_STD, PAPER_ENCODER, Config, NetworkConfig, identity, override
from cosa.networks.encoder import Encoder, build_encoder
from cosa.networks.published import pinned, published

timm: Any = importlib.import_module("timm")  # after cosa.networks, which mends torchvision for it
NAMES = [*timm.list_models(module="vision_transformer"), *timm.list_models(module="deit")]
HEADS = ("head.", "head_dist.", "attn_pool.")


def config(**network: Any) -> Config:
    return Config(network=NetworkConfig(**network))


def as_encoder(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A published state as our encoder holds it: no head, the norm behind a pooling as the final norm."""
    kept = {name: tensor for name, tensor in state.items() if not name.startswith(HEADS)}
    return {name.replace("fc_norm.", "norm."): tensor for name, tensor in kept.items()}


def random_state(vit: torch.nn.Module, seed: int = 0) -> dict[str, torch.Tensor]:
    """Random numbers everywhere: a norm that stayed at 1 and 0 is seen."""
    generator = torch.Generator().manual_seed(seed)
    return {k: 0.02 * torch.randn(v.shape, generator=generator) for k, v in vit.state_dict().items()}


# What is pinned


def test_a_name_without_a_tag_gets_the_tag_that_timm_takes_today() -> None:
    found = pinned(config(encoder="vit_tiny_patch16_224"))

    cfg = timm.get_pretrained_cfg("vit_tiny_patch16_224")
    assert cfg is not None
    assert found.network.encoder == f"vit_tiny_patch16_224.{cfg.tag}"
    assert (found.data.mean, found.data.std) == (cfg.mean, cfg.std) == ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))


def test_another_default_of_timm_is_another_experiment(monkeypatch: pytest.MonkeyPatch) -> None:
    before = identity(pinned(config(encoder="vit_small_patch16_224")))
    other = timm.get_pretrained_cfg("vit_small_patch16_224.augreg_in1k")
    monkeypatch.setattr("timm.get_pretrained_cfg", lambda *_, **__: other)

    assert identity(pinned(config(encoder="vit_small_patch16_224"))) != before


def test_the_encoder_of_the_paper_sees_images_as_the_authors_show_them() -> None:
    found = pinned(Config())

    assert found.network.encoder == PAPER_ENCODER
    assert identity(found) == identity(Config())
    assert (found.data.mean, found.data.std) == (IMAGENET_MEAN, IMAGENET_STD)


def test_what_is_given_stays() -> None:
    given = override(config(encoder="vit_tiny_patch16_224"), {"data.mean": (0.1, 0.2, 0.3)})

    found = pinned(given)

    assert (found.data.mean, found.data.std) == ((0.1, 0.2, 0.3), (0.5, 0.5, 0.5))
    assert pinned(found) == found


def test_another_encoder_brings_its_own_mean_and_deviation() -> None:
    base = pinned(config(encoder="vit_tiny_patch16_224"))

    found = pinned(override(base, {"network.encoder": "deit_tiny_patch16_224"}))

    assert (found.data.mean, found.data.std) == (IMAGENET_MEAN, IMAGENET_STD)


def test_from_scratch_nothing_is_open_and_the_identity_stays() -> None:
    scratch = config(encoder="vit_tiny_patch16_224", pretrained=False)

    found = pinned(scratch)

    assert found == override(scratch, {"data.mean": IMAGENET_MEAN, "data.std": IMAGENET_STD})
    assert identity(found) == identity(scratch)


def test_pinning_what_names_everything_or_starts_from_scratch_imports_nothing_heavy() -> None:
    program = """
import sys
from cosa.config import Config, NetworkConfig
from cosa.networks.published import pinned
pinned(Config())
pinned(Config(network=NetworkConfig(pretrained=False)))
print("torch" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)

    assert done.stdout.strip() == "False"


def test_a_local_file_counts_by_its_content(tmp_path: Path) -> None:
    for folder, content in (("a", b"one"), ("b", b"one"), ("c", b"other")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / f"{folder}.pth").write_bytes(content)

    def starting_from(folder: str) -> Config:
        path = str(tmp_path / folder / f"{folder}.pth")
        return pinned(config(encoder="deit_tiny_patch16_224", pretrained=False, weights=path))

    assert starting_from("a").network.weights_sha256 == hashlib.sha256(b"one").hexdigest()
    assert identity(starting_from("a")) == identity(starting_from("b"))
    assert identity(starting_from("a")) != identity(starting_from("c"))


def test_weights_that_nobody_published_are_refused() -> None:
    with pytest.raises(
        ValueError, match=r"network.encoder must have published weights, got 'vit_base_patch16_"
    ):
        pinned(config(encoder="vit_base_patch16_gap_224"))


# Every encoder of timm


@pytest.mark.parametrize("name", NAMES)
def test_an_encoder_has_all_that_was_published_before_its_head_or_is_refused(name: str) -> None:
    """Shallow, on the meta device: names and shapes do not depend on depth."""
    cfg = published(name)
    with torch.device("meta"):
        whole = timm.create_model(name, depth=2, weight_init="skip")
        own = build_encoder(
            NetworkConfig(encoder=name, pretrained=False, depth=2, aux_block=-2), cfg.input_size[1]
        )

    expected = {k: v.shape for k, v in as_encoder(whole.state_dict()).items()}
    assert {k: v.shape for k, v in own.vit.state_dict().items()} == expected
    if cfg.has_weights:  # timm loads strictly where it keeps the published head, and only there
        assert whole.num_classes == cfg.num_classes
        assert pinned(config(encoder=name)).network.encoder == f"{name}.{cfg.tag}"
    else:
        with pytest.raises(ValueError, match="must have published weights"):
            pinned(config(encoder=name))


PUBLISHED = [
    "test_vit",
    "test_vit2",  # one register, its norm behind the pooling
    "test_vit3",  # pooled by attention
    "vit_wee_patch16_reg1_gap_256",
    "deit_tiny_patch16_224",
    "deit_tiny_distilled_patch16_224",
]


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> dict[str, torch.Tensor]:
    """The state that the hub answers with; nothing asks the network."""
    state: dict[str, torch.Tensor] = {}
    monkeypatch.setattr("timm.models._hub.model_info", lambda *_, **__: None)
    monkeypatch.setattr("timm.models._builder.load_state_dict_from_hf", lambda *_, **__: dict(state))
    return state


@pytest.mark.parametrize("name", PUBLISHED)
def test_an_encoder_starts_exactly_from_its_published_weights(
    name: str, hub: dict[str, torch.Tensor]
) -> None:
    whole = timm.create_model(name)
    hub |= random_state(whole)

    own = build_encoder(NetworkConfig(encoder=name), 64)

    found, expected = own.vit.state_dict(), as_encoder(hub)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[k], expected[k]) for k in expected)


@pytest.mark.parametrize("name", PUBLISHED)
def test_on_its_own_grid_an_encoder_says_what_timm_s_model_says(
    name: str, hub: dict[str, torch.Tensor]
) -> None:
    whole = timm.create_model(name).eval()
    hub |= random_state(whole)
    whole.load_state_dict(hub)
    size = published(name).input_size[1]
    own = build_encoder(NetworkConfig(encoder=name), size).eval()
    images = torch.randn(1, 3, size, size, generator=torch.Generator().manual_seed(1))

    _, last = own(images)

    tokens = whole.fc_norm(whole.forward_features(images))[:, whole.num_prefix_tokens :]
    torch.testing.assert_close(last.flatten(2).transpose(1, 2), tokens)


def test_published_weights_with_a_tensor_too_many_are_refused(hub: dict[str, torch.Tensor]) -> None:
    hub |= random_state(timm.create_model("test_vit")) | {"norm.scale": torch.ones(1)}

    with pytest.raises(
        ValueError, match=r"network must be one that timm can build, got 'test_vit'.+norm.scale"
    ):
        build_encoder(NetworkConfig(encoder="test_vit"), 64)


def test_published_weights_that_are_not_finite_are_refused(hub: dict[str, torch.Tensor]) -> None:
    hub |= random_state(timm.create_model("test_vit"))
    hub["blocks.1.mlp.fc1.bias"][3] = torch.nan

    law = r"weights must be finite, got NaN or infinity in blocks.1.mlp.fc1.bias of 'test_vit'"
    with pytest.raises(ValueError, match=law):
        build_encoder(NetworkConfig(encoder="test_vit"), 64)


@pytest.mark.parametrize("setting", ["width", "depth", "heads"])
def test_published_weights_need_the_encoder_s_own_sizes(setting: str) -> None:
    with pytest.raises(ValueError, match=rf"network.{setting} must be 0, the encoder's own, .+ got 6; set"):
        build_encoder(NetworkConfig(encoder="test_vit", **{setting: 6}), 64)


# Weights from a file


def from_file(path: Path, name: str = "test_vit", size: int = 64, **more: Any) -> Encoder:
    return build_encoder(NetworkConfig(encoder=name, pretrained=False, weights=str(path), **more), size)


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_file_in_the_published_layout_is_taken_as_it_is(name: str, tmp_path: Path) -> None:
    state = random_state(timm.create_model(name))
    save_file(state, tmp_path / "w.safetensors")

    own = from_file(tmp_path / "w.safetensors", name)

    found, expected = own.vit.state_dict(), as_encoder(state)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[k], expected[k]) for k in expected)
    assert "state_dict" not in own.vit.pretrained_cfg


@pytest.mark.parametrize("prefix", ["module.", "backbone.", "module.backbone."])
@pytest.mark.parametrize("inside", ["state_dict", "model", "teacher"])
def test_what_training_tools_wrap_around_the_names_is_taken_off(
    prefix: str, inside: str, tmp_path: Path
) -> None:
    state = random_state(timm.create_model("test_vit"))
    wrapped = {f"{prefix}{k}": v for k, v in state.items()} | {"head.mlp.0.weight": torch.ones(2, 2)}
    torch.save({inside: wrapped, "epoch": 3}, tmp_path / "w.pth")

    found = from_file(tmp_path / "w.pth").vit.state_dict()

    assert all(torch.equal(found[k], v) for k, v in as_encoder(state).items())


def test_positions_of_another_square_grid_stay_frozen_on_it(tmp_path: Path) -> None:
    state = random_state(timm.create_model("test_vit", img_size=96))  # 6 x 6 patches instead of 10 x 10
    save_file(state, tmp_path / "w.safetensors")

    own = from_file(tmp_path / "w.safetensors").vit

    assert own.pos_embed is not None
    assert torch.equal(own.pos_embed, state["pos_embed"])
    assert not own.pos_embed.requires_grad


def test_positions_to_train_are_resampled_once_as_timm_does_it(tmp_path: Path) -> None:
    state = random_state(timm.create_model("test_vit", img_size=96))
    save_file(state, tmp_path / "w.safetensors")

    own = from_file(tmp_path / "w.safetensors", size=64, train_pos_embed=True).vit

    expected = timm.layers.resample_abs_pos_embed(state["pos_embed"], [4, 4], num_prefix_tokens=1)
    assert own.pos_embed is not None
    assert torch.equal(own.pos_embed, expected)
    assert own.pos_embed.requires_grad


@pytest.mark.parametrize("train_pos_embed", [False, True])
def test_positions_of_no_square_grid_are_refused_by_name(tmp_path: Path, train_pos_embed: bool) -> None:
    state = random_state(timm.create_model("test_vit"))
    state["pos_embed"] = state["pos_embed"][:, : 1 + 6 * 7]
    save_file(state, tmp_path / "w.safetensors")

    with pytest.raises(ValueError, match="has 43 position embeddings, which are no square grid; set"):
        from_file(tmp_path / "w.safetensors", train_pos_embed=train_pos_embed)


def test_distilled_weights_do_not_pass_for_plain_ones(tmp_path: Path) -> None:
    save_file(random_state(timm.create_model("deit_tiny_distilled_patch16_224")), tmp_path / "w.safetensors")

    with pytest.raises(ValueError, match=r"has an unknown dist_token \(1 differences\)"):
        from_file(tmp_path / "w.safetensors", "deit_tiny_patch16_224")


def test_a_file_with_other_content_than_was_planned_is_refused(tmp_path: Path) -> None:
    save_file(random_state(timm.create_model("test_vit")), tmp_path / "w.safetensors")

    with pytest.raises(
        ValueError, match=r"network.weights must have the SHA-256 0{64}, got '.+' with another"
    ):
        from_file(tmp_path / "w.safetensors", weights_sha256="0" * 64)


# Frozen position embeddings


@pytest.mark.parametrize(
    "name", ["test_vit", "vit_wee_patch16_reg1_gap_256", "deit_tiny_distilled_patch16_224"]
)
def test_frozen_positions_are_resampled_bicubically_in_each_pass(name: str, tmp_path: Path) -> None:
    save_file(random_state(timm.create_model(name)), tmp_path / "w.safetensors")
    own = from_file(tmp_path / "w.safetensors", name).eval()
    vit, images = own.vit, torch.randn(2, 3, 48, 80, generator=torch.Generator().manual_seed(2))

    _, last = own(images)

    prefix = [t for t in (vit.cls_token, getattr(vit, "dist_token", None), vit.reg_token) if t is not None]
    placed = 0 if vit.no_embed_class else len(prefix)
    side = published(name).input_size[1] // 16
    assert vit.pos_embed is not None
    grid = vit.pos_embed[:, placed:].reshape(1, side, side, -1).permute(0, 3, 1, 2)
    positions = torch.nn.functional.interpolate(grid, size=(3, 5), mode="bicubic", align_corners=False)
    patches = vit.patch_embed.proj(images) + positions
    tokens = [t + (vit.pos_embed[:, i : i + 1] if placed else 0) for i, t in enumerate(prefix)]
    x = torch.cat([*(t.expand(2, -1, -1) for t in tokens), patches.flatten(2).transpose(1, 2)], 1)
    for block in vit.blocks:
        x = block(vit.norm_pre(x) if block is vit.blocks[0] else x)
    expected = vit.norm(x)[:, len(prefix) :].transpose(1, 2).reshape(2, -1, 3, 5)
    torch.testing.assert_close(last, expected)


def test_only_published_positions_are_frozen() -> None:
    scratch = build_encoder(NetworkConfig(encoder="test_vit", pretrained=False), 64)

    assert scratch.vit.pos_embed is not None
    assert scratch.vit.pos_embed.requires_grad
    assert scratch.vit.pos_embed.shape[1] == 1 + 4 * 4


def test_a_trained_encoder_is_built_also_where_timm_has_lost_its_tag() -> None:
    state = {k: v for k, v in random_state(timm.create_model("test_vit")).items() if not k.startswith(HEADS)}

    own = build_encoder(NetworkConfig(encoder="test_vit.of_then"), 64, state=state).vit

    assert {k: v.shape for k, v in own.state_dict().items()} == {k: v.shape for k, v in state.items()}
