"""Standalone segmentation networks: strides, sizes, what is dilated, which weights they take and refuse."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from cosa.config import IMAGENET_MEAN, Config, NetworkConfig, identity
from cosa.networks.network import build_network
from cosa.networks.published import pinned, starting_point
from cosa.networks.segmentation import SegmentationNetwork, build_segmentation_network
from cosa.networks.wideresnet import WideResNet38

timm: Any = importlib.import_module("timm")  # after cosa.networks, which mends torchvision for it

CLASSES = 20
SWIN = {"patch_size": 2, "width": 16, "depth": 2, "heads": 1}
SMALL: dict[str, dict[str, Any]] = {
    "largefov_vit": {
        "encoder": "vit_tiny_patch16_224",
        "patch_size": 8,
        "width": 16,
        "depth": 3,
        "heads": 2,
        "aux_head": False,
    },
    "deeplabv3plus": {"encoder": "resnet18", "aux_head": False},
    "upernet": {"encoder": "swin_tiny_patch4_window7_224", **SWIN},
    "largefov_wideresnet38": {"encoder": "wideresnet38_thin", "aux_head": False, "decoder_dilation": 2},
}


def settings(architecture: str, **changes: Any) -> NetworkConfig:
    own = {"architecture": architecture, "pretrained": False, "decoder_channels": 8, **SMALL[architecture]}
    return NetworkConfig(**{**own, **changes})


def build(architecture: str, size: int = 64, **changes: Any) -> SegmentationNetwork:
    torch.manual_seed(0)
    return build_segmentation_network(settings(architecture, **changes), CLASSES, size)


def random_state(model: torch.nn.Module, seed: int = 0) -> dict[str, torch.Tensor]:
    """Random numbers everywhere: a norm that stayed at 1 and 0 is seen."""
    generator = torch.Generator().manual_seed(seed)
    return {
        k: 0.02 * torch.randn(v.shape, generator=generator) if v.is_floating_point() else v
        for k, v in model.state_dict().items()
    }


# What they are


@pytest.mark.parametrize(
    ("architecture", "stride", "logits_stride", "aux_stride"),
    [
        ("largefov_vit", 8, 8, None),
        ("deeplabv3plus", 16, 4, None),
        ("upernet", 16, 2, 8),
        ("largefov_wideresnet38", 8, 8, None),
    ],
)
def test_logits_have_all_classes_at_the_decoder_s_stride(
    architecture: str, stride: int, logits_stride: int, aux_stride: int | None
) -> None:
    network = build(architecture).eval()

    output = network(torch.randn(2, 3, 64, 96))

    assert network.patch_size == stride
    assert output.seg_logits.shape == (2, CLASSES + 1, 64 // logits_stride, 96 // logits_stride)
    if aux_stride is None:
        assert output.aux_logits is None
    else:
        assert output.aux_logits.shape == (2, CLASSES + 1, 64 // aux_stride, 96 // aux_stride)


@pytest.mark.parametrize("architecture", SMALL)
def test_every_parameter_learns_from_both_logits(architecture: str) -> None:
    network = build(architecture).train()

    output = network(torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(1)))
    loss = output.seg_logits.square().mean()
    if output.aux_logits is not None:
        loss = loss + output.aux_logits.square().mean()
    loss.backward()

    still = {name for name, p in network.named_parameters() if p.grad is None}
    assert not still - {"encoder.vit.cls_token"}


@pytest.mark.parametrize("architecture", SMALL)
def test_logits_are_in_fp32_under_autocast(architecture: str) -> None:
    network = build(architecture).eval()

    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = network(torch.randn(1, 3, 32, 32))

    assert output.seg_logits.dtype == torch.float32
    assert output.aux_logits is None or output.aux_logits.dtype == torch.float32


@pytest.mark.parametrize(
    ("architecture", "encoder", "source", "own"),
    [
        ("deeplabv3plus", "resnet101d", 91 / 2, 45.7),  # BECO in Table 7, which trains two of them
        ("largefov_wideresnet38", "wideresnet38", 124, 124.0),  # MCTformer's last step in Table 7
        ("upernet", "swin_base_patch4_window7_224", 121, 121.2),  # the Swin paper's Table 3
        ("largefov_vit", "vit_base_patch16_224", 92, 92.2),  # CoSA in Table 7: two CAM heads, 0.03 M, more
    ],
)
def test_a_full_size_network_has_the_parameters_of_its_source(
    architecture: str, encoder: str, source: float, own: float
) -> None:
    sizes = dict.fromkeys(SWIN, 0)
    channels = 256 if architecture == "deeplabv3plus" else 512
    config = settings(architecture, **sizes, encoder=encoder, decoder_channels=channels)
    with torch.device("meta"):
        network = build_segmentation_network(config, CLASSES, 448)

    found = sum(parameter.numel() for parameter in network.parameters()) / 1e6
    assert round(found, 1) == own
    assert abs(found - source) < 0.5


def test_the_last_stage_of_a_bottleneck_resnet_is_dilated_by_the_multi_grid() -> None:
    network = build("deeplabv3plus", encoder="resnet50d")

    assert [block.conv2.dilation for block in network.encoder.model.layer4] == [(2, 2), (4, 4), (8, 8)]
    assert [block.conv2.stride for block in network.encoder.model.layer4] == [(1, 1)] * 3


def test_an_image_may_have_another_size_than_the_crop_that_a_swin_was_built_for() -> None:
    images = torch.randn(1, 3, 96, 64, generator=torch.Generator().manual_seed(1))
    small, large = build("upernet", 32).eval(), build("upernet", 128).eval()
    large.load_state_dict(small.state_dict())

    torch.testing.assert_close(small(images).seg_logits, large(images).seg_logits)


def test_wideresnet_sees_as_far_as_its_strides_and_dilations_say() -> None:
    torch.manual_seed(0)
    network = WideResNet38(4, frozen_norms=False).eval()
    image = torch.randn(1, 3, 8, 1024, requires_grad=True)

    (features,) = network(image)
    features[0, :, 0, 64].sum().backward()

    assert image.grad is not None
    seen = image.grad.abs().sum(dim=(0, 1, 2)).nonzero().flatten()
    # By 3x3 convolutions, each its dilation times the stride it works at, a stage by its first block and the
    # others: conv1a, then 1 + 2 and 2 x (2 + 2), 2 + 4 and 2 x (4 + 4), 4 + 8 and 5 x (8 + 8), at stride 8
    # 8 x 1 + 8 x 2 and 2 x (8 x 2 + 8 x 2), and 8 x 4 in each bottleneck
    reach = 1 + (3 + 8) + (6 + 16) + (12 + 80) + (24 + 64) + (32 + 32)
    assert (int(seen.min()), int(seen.max())) == (64 * 8 - reach, 64 * 8 + reach)


# Which settings are refused


def test_a_standalone_network_leaves_no_trace_in_cosa_s_identity_and_has_its_own() -> None:
    assert identity(Config(network=NetworkConfig(architecture="cosa"))) == identity(Config())
    assert len({identity(Config(network=settings(name))) for name in SMALL}) == len(SMALL)


@pytest.mark.parametrize("architecture", ["largefov_vit", "deeplabv3plus", "largefov_wideresnet38"])
def test_a_network_without_an_auxiliary_head_is_not_asked_for_one(architecture: str) -> None:
    with pytest.raises(
        ValueError, match=rf"network\.aux_head must be false where network\.architecture is {architecture}, "
    ):
        settings(architecture, aux_head=True)


def test_an_auxiliary_head_that_is_not_wanted_is_not_there() -> None:
    assert build("upernet", aux_head=False).aux_head is None


def test_wideresnet_takes_no_weights_of_timm() -> None:
    with pytest.raises(ValueError, match=r"network\.pretrained must be false for a WideResNet38"):
        settings("largefov_wideresnet38", pretrained=True)


@pytest.mark.parametrize(
    ("architecture", "changes", "told"),
    [
        ("deeplabv3plus", {"encoder": "vit_tiny_patch16_224"}, "be a ResNet of timm"),
        ("deeplabv3plus", {"encoder": "resnet_18"}, "did you mean 'resnet18'"),
        ("upernet", {"encoder": "swim_tiny"}, "be a Swin Transformer or ResNet of timm"),
        ("upernet", {"encoder": "resnet18"}, r"network\.patch_size must be 0 for a ResNet"),
        ("largefov_vit", {"encoder": "resnet18"}, "be a Vision Transformer of timm"),
        ("largefov_wideresnet38", {"encoder": "resnet38"}, "did you mean 'wideresnet38'"),
    ],
)
def test_an_encoder_that_the_decoder_cannot_stand_on_is_refused(
    architecture: str, changes: dict[str, Any], told: str
) -> None:
    with pytest.raises(ValueError, match=told):
        build(architecture, **changes)


@pytest.mark.parametrize("architecture", SMALL)
def test_the_crop_must_be_a_multiple_of_the_stride(architecture: str) -> None:
    with pytest.raises(ValueError, match=r"data\.crop_size must be a multiple of .+ (8|16), got 36"):
        build(architecture, 36)


def test_each_command_s_network_is_refused_by_the_other() -> None:
    with pytest.raises(ValueError, match="must be cosa, got 'upernet'"):
        build_network(settings("upernet"), CLASSES, 64)
    with pytest.raises(ValueError, match="must be a standalone network, got 'cosa'"):
        build_segmentation_network(NetworkConfig(), CLASSES, 64)


# What they start from


@pytest.mark.parametrize("architecture", SMALL)
def test_a_trained_network_is_built_again_without_its_published_weights(architecture: str) -> None:
    kept = build(architecture).state_dict()
    begun = settings(architecture)
    if architecture == "largefov_wideresnet38":
        begun = begun.replace(weights="is-gone.safetensors")
    else:
        begun = begun.replace(encoder=f"{begun.encoder}.of_then")

    network = build_segmentation_network(begun, CLASSES, 64, state=kept)

    assert not any(network.load_state_dict(kept))


@pytest.mark.parametrize(
    ("architecture", "encoder"),
    [
        ("deeplabv3plus", "resnet18"),
        ("deeplabv3plus", "resnet18d"),
        ("upernet", "swin_tiny_patch4_window7_224"),
    ],
)
def test_published_weights_are_all_taken_and_recorded(
    architecture: str, encoder: str, tmp_path: Path
) -> None:
    state = random_state(timm.create_model(encoder))
    save_file(state, tmp_path / "w.safetensors")
    sizes = dict.fromkeys(SWIN, 0)
    config = settings(architecture, **sizes, encoder=encoder, weights=str(tmp_path / "w.safetensors"))
    whole = pinned(Config(network=config))

    network = build_segmentation_network(whole.network, CLASSES, 64)

    found = network.encoder.model.state_dict()
    assert found.keys() == {k for k in state if not k.startswith(("fc.", "head.", "norm."))}
    assert all(torch.equal(found[k], state[k]) for k in found)
    cfg = timm.get_pretrained_cfg(encoder)
    assert (whole.data.mean, whole.data.std) == (cfg.mean, cfg.std)
    assert starting_point(whole, network.encoder.digest())["sha256"] == network.encoder.digest()


def test_a_name_without_a_tag_gets_the_tag_that_timm_takes_today() -> None:
    config = Config(network=settings("deeplabv3plus", pretrained=True, encoder="resnet101"))

    assert pinned(config).network.encoder == f"resnet101.{timm.get_pretrained_cfg('resnet101').tag}"


@pytest.mark.parametrize(
    ("architecture", "encoder", "other"),
    [
        ("deeplabv3plus", "resnet18", "resnet34"),
        ("deeplabv3plus", "resnet18", "resnet18d"),
        ("upernet", "swin_tiny_patch4_window7_224", "swin_small_patch4_window7_224"),
        ("largefov_wideresnet38", "wideresnet38_thin", "resnet18"),
    ],
)
def test_weights_of_another_architecture_are_refused_in_one_line(
    architecture: str, encoder: str, other: str, tmp_path: Path
) -> None:
    save_file(timm.create_model(other).state_dict(), tmp_path / "w.safetensors")
    sizes = dict.fromkeys(SWIN, 0)

    with pytest.raises(
        ValueError, match=r"network\.weights must fit the encoder, got .+ differences"
    ) as told:
        build(architecture, **sizes, encoder=encoder, weights=str(tmp_path / "w.safetensors"))

    assert "\n" not in str(told.value)


# WideResNet38's published weights


def mxnet_names(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A state of ours as mxnet's file has it, with the classifier that it has."""
    kinds = {"weight": "gamma", "bias": "beta", "running_mean": "moving_mean", "running_var": "moving_var"}
    found = {"arg:linear1000_weight": torch.ones(3, 3), "arg:linear1000_bias": torch.ones(3)}
    for name, tensor in state.items():
        block, *inner, what = name.split(".")
        stage, _, repeat = block.removeprefix("b").partition("_")
        unit = f"{stage}b{repeat}" if repeat else f"{stage}a"
        if what == "num_batches_tracked":
            continue
        if block == "conv1a":
            found["arg:conv1a_weight"] = tensor
        elif block == "bn7" or inner[0].startswith("bn"):
            place = "aux" if what.startswith("running") else "arg"
            unit = "7" if block == "bn7" else f"{unit}_{inner[0].removeprefix('bn_')}"
            found[f"{place}:bn{unit}_{kinds[what]}"] = tensor
        else:
            found[f"arg:res{unit}_{inner[0].removeprefix('conv_')}_weight"] = tensor
    return found


@pytest.mark.parametrize("layout", ["mxnet", "psa"])
def test_wideresnet_takes_its_weights_under_mxnet_s_and_psa_s_names(layout: str, tmp_path: Path) -> None:
    state = random_state(WideResNet38(8, frozen_norms=False))
    kept = mxnet_names(state) if layout == "mxnet" else state | {"fc8.weight": torch.ones(2, 2)}
    save_file(kept, tmp_path / "w.safetensors")

    network = build("largefov_wideresnet38", weights=str(tmp_path / "w.safetensors"))

    found = network.encoder.state_dict()
    assert all(torch.equal(found[name], tensor) for name, tensor in state.items())
    assert "arg:res4b5_branch2b1_weight" in mxnet_names(state)
    assert "aux:bn6a_branch2b2_moving_var" in mxnet_names(state)


def test_wideresnet_s_published_norms_stay_as_they_are(tmp_path: Path) -> None:
    save_file(random_state(WideResNet38(8, frozen_norms=False)), tmp_path / "w.safetensors")
    network = build("largefov_wideresnet38", weights=str(tmp_path / "w.safetensors")).train()
    before = {k: v.clone() for k, v in network.state_dict().items() if "bn" in k}

    network(torch.randn(2, 3, 32, 32)).seg_logits.mean().backward()

    assert all(torch.equal(network.state_dict()[name], tensor) for name, tensor in before.items())
    assert all(p.requires_grad != ("bn" in name) for name, p in network.named_parameters())


def test_wideresnet_from_scratch_learns_its_norms() -> None:
    network = build("largefov_wideresnet38").train()
    before = network.encoder.bn7.running_mean.clone()

    network(torch.randn(2, 3, 32, 32))

    assert not torch.equal(network.encoder.bn7.running_mean, before)
    assert all(p.requires_grad for p in network.parameters())


@pytest.mark.parametrize(("name", "told"), [("b4_3.bn_branch2a.bias", "misses"), ("conv1a.weight", "finite")])
def test_weights_with_a_hole_are_refused(name: str, told: str, tmp_path: Path) -> None:
    state = random_state(WideResNet38(8, frozen_norms=False))
    if told == "misses":
        del state[name]
    else:
        state[name][0] = torch.nan
    save_file(state, tmp_path / "w.safetensors")

    with pytest.raises(ValueError, match=rf"weights must .*{told}.*{name}"):
        build("largefov_wideresnet38", weights=str(tmp_path / "w.safetensors"))


def test_wideresnet_sees_images_in_imagenet_s_colours() -> None:
    config = settings("largefov_wideresnet38", weights="w.safetensors", weights_sha256="0" * 64)

    assert pinned(Config(network=config)).data.mean == IMAGENET_MEAN
