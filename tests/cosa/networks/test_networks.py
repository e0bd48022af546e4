"""The networks: what the heads compute, which blocks are read, and which encoders and weights are refused."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub.errors import LocalEntryNotFoundError
from safetensors.torch import load_file, save_file

from cosa.config import NetworkConfig
from cosa.networks.encoder import Encoder, build_encoder
from cosa.networks.heads import CamHead, LargeFov
from cosa.networks.network import CosaNetwork, build_network
from cosa.storage.model_files import read_tensors

TINY = NetworkConfig(
    encoder="vit_tiny_patch16_224",
    pretrained=False,
    patch_size=4,
    width=16,
    depth=4,
    heads=2,
    decoder_channels=4,
    decoder_dilation=1,
)
IMAGE = 16
PATCHES = IMAGE // 4


def tiny(**changes: Any) -> NetworkConfig:
    return TINY.replace(**changes)


def encoder(**changes: Any) -> Encoder:
    return build_encoder(tiny(**changes), IMAGE)


@pytest.fixture(scope="module")
def network() -> CosaNetwork:
    torch.manual_seed(0)
    return build_network(TINY, classes=3, image_size=IMAGE).eval()


@pytest.fixture(scope="module")
def images() -> torch.Tensor:
    return torch.randn(2, 3, IMAGE, IMAGE, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def weights_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights of the tiny encoder as timm publishes them: with a classifier."""
    torch.manual_seed(5)
    state = dict(encoder().vit.state_dict())
    state |= {"head.weight": torch.ones(7, 16), "head.bias": torch.ones(7)}
    path = tmp_path_factory.mktemp("weights") / "tiny.safetensors"
    save_file(state, path)
    return path


# Heads


def test_class_logits_pool_first_then_classify() -> None:
    head = CamHead(2, 1)
    with torch.no_grad():
        head.weight.copy_(torch.tensor([[1.0, -1.0]]))
    features = torch.tensor([[[[5.0, 0.0]], [[3.0, 9.0]]]])  # two channels over two patches

    logits, cam = head(features)

    assert logits.tolist() == [[5.0 - 9.0]]  # where classifying first and pooling the map would say 2
    assert cam.tolist() == [[[[2.0, -9.0]]]]


def test_the_map_is_the_classifier_on_each_patch() -> None:
    head = CamHead(5, 3)
    features = torch.randn(2, 5, 4, 6)

    _, cam = head(features)

    for p in range(4):
        for q in range(6):
            torch.testing.assert_close(cam[:, :, p, q], features[:, :, p, q] @ head.weight.T)


def test_a_map_of_one_patch_says_what_the_class_logits_say() -> None:
    head = CamHead(5, 3)

    logits, cam = head(torch.randn(2, 5, 1, 1))

    torch.testing.assert_close(cam[:, :, 0, 0], logits)


@pytest.mark.parametrize("dilation", [1, 2, 5])
def test_the_decoder_looks_at_patches_a_dilation_apart(dilation: int) -> None:
    decoder = LargeFov(channels=1, hidden=2, dilation=dilation, classes=2)
    with torch.no_grad():
        for parameter in decoder.parameters():
            parameter.fill_(1.0)
    middle, side = 2 * dilation, 4 * dilation + 1
    impulse = torch.zeros(1, 1, side, side)
    impulse[0, 0, middle, middle] = 1.0

    seen = decoder(impulse)[0, 0]

    expected = torch.zeros(side, side)  # two 3x3 boxes after one another: 1 2 3 2 1 along each axis
    line = torch.tensor([1.0, 2.0, 3.0, 2.0, 1.0])
    expected[::dilation, ::dilation] = 4 * line[:, None] * line  # 2 hidden channels, twice
    assert torch.equal(seen, expected)


def test_the_decoder_says_nothing_of_nothing_having_no_biases() -> None:
    decoder = LargeFov(channels=3, hidden=4, dilation=1, classes=2)

    assert decoder(torch.zeros(1, 3, 5, 5)).abs().max() == 0


# Network


def slow_maps(vit: Any, images: torch.Tensor, *, norm: bool) -> list[torch.Tensor]:
    """The patch tokens after every block, one block after the other, as maps."""
    tokens = vit.norm_pre(vit._pos_embed(vit.patch_embed(images)))
    maps = []
    for block in vit.blocks:
        tokens = block(tokens)
        patches = (vit.norm(tokens) if norm else tokens)[:, vit.num_prefix_tokens :]
        maps.append(patches.transpose(1, 2).reshape(len(images), -1, PATCHES, PATCHES))
    return maps


@pytest.mark.parametrize("aux_block", [-2, -3, -4])
@pytest.mark.parametrize("aux_norm", [False, True])
def test_the_encoder_reads_the_named_block_and_the_last_which_alone_need_be_normed(
    aux_block: int, aux_norm: bool, images: torch.Tensor
) -> None:
    read = encoder(aux_block=aux_block, aux_norm=aux_norm).eval()
    with torch.no_grad():
        read.vit.norm.weight.uniform_(0.5, 2)

    aux, last = read(images)

    torch.testing.assert_close(last, slow_maps(read.vit, images, norm=True)[-1])
    torch.testing.assert_close(aux, slow_maps(read.vit, images, norm=aux_norm)[aux_block])


def test_both_cams_have_heads_of_their_own_on_maps_of_their_own(
    network: CosaNetwork, images: torch.Tensor
) -> None:
    output = network(images)

    aux_map, last_map = network.encoder(images)
    torch.testing.assert_close(output.cam, network.cam_head(last_map)[1])
    torch.testing.assert_close(output.aux_cam, network.aux_cam_head(aux_map)[1])
    torch.testing.assert_close(output.cls_logits, network.cam_head(last_map)[0])
    torch.testing.assert_close(output.aux_cls_logits, network.aux_cam_head(aux_map)[0])
    torch.testing.assert_close(output.seg_logits, network.decoder(last_map))


def test_the_heads_do_not_start_with_the_same_weights(network: CosaNetwork) -> None:
    assert not torch.equal(network.cam_head.weight, network.aux_cam_head.weight)


def test_segmentation_is_left_out_where_nobody_asks_for_it(
    network: CosaNetwork, images: torch.Tensor
) -> None:
    whole, short = network(images), network(images, segment=False)

    assert short.seg_logits is None
    assert torch.equal(short.cam, whole.cam)


def test_images_of_other_sizes_are_seen_too(network: CosaNetwork) -> None:
    output = network(torch.randn(1, 3, 24, 8))

    assert output.cam.shape == (1, 3, 6, 2)
    assert output.seg_logits is not None
    assert output.seg_logits.shape == (1, 4, 6, 2)
    assert torch.isfinite(output.seg_logits).all()


def test_outputs_are_fp32_and_close_under_autocast(network: CosaNetwork, images: torch.Tensor) -> None:
    with torch.autocast("cpu", torch.bfloat16):
        half = network(images)
    whole = network(images)

    assert not torch.equal(half.cam, whole.cam)  # it was computed in bfloat16
    for name, value in vars(half).items():
        if value is None:
            continue
        assert value.dtype == torch.float32, name
        torch.testing.assert_close(value, getattr(whole, name), rtol=0.1, atol=0.05)


def test_stochastic_depth_acts_in_training_alone(images: torch.Tensor) -> None:
    network = build_network(tiny(drop_path=0.9), classes=3, image_size=IMAGE)

    network.eval()
    assert torch.equal(network(images).cam, network(images).cam)
    network.train()
    assert not torch.equal(network(images).cam, network(images).cam)


def test_the_encoder_s_own_sizes_stay_where_nothing_else_is_asked_for() -> None:
    own = build_encoder(NetworkConfig(encoder="vit_tiny_patch16_224", pretrained=False), 32)

    assert (own.patch_size, own.channels, len(own.vit.blocks)) == (16, 192, 12)
    assert own.vit.blocks[0].attn.num_heads == 3


def test_the_encoder_s_sizes_are_those_asked_for() -> None:
    found = encoder(patch_size=8, width=24, depth=3, heads=4)

    assert (found.patch_size, found.channels, len(found.vit.blocks)) == (8, 24, 3)
    assert found.vit.blocks[0].attn.num_heads == 4


# What is refused


def test_an_unknown_encoder_names_the_nearest_one() -> None:
    law = r"network.encoder must be a Vision Transformer of timm, got 'vit_bse_patch16_224'; did you mean "
    with pytest.raises(ValueError, match=law + "'vit_base_patch16_224'"):
        encoder(encoder="vit_bse_patch16_224")


def test_a_network_that_is_no_vision_transformer_is_refused() -> None:
    with pytest.raises(ValueError, match="must be a Vision Transformer of timm, got 'resnet50'"):
        encoder(encoder="resnet50")


def test_deit_is_a_vision_transformer() -> None:
    assert encoder(encoder="deit_tiny_patch16_224").channels == 16


def test_an_earlier_block_must_exist() -> None:
    with pytest.raises(
        ValueError, match=r"network.aux_block must name one of the encoder's 4 blocks, got -5"
    ):
        encoder(aux_block=-5)


def test_heads_that_do_not_share_the_width_equally_are_refused() -> None:
    with pytest.raises(ValueError, match=r"network must be .+'embed_dim': 16.+'num_heads': 3.+divisible"):
        encoder(heads=3)


def test_an_unknown_pretrained_tag_is_refused() -> None:
    law = r"network.encoder must name weights that timm has, got 'vit_tiny_patch16_224.augreg_in21'; did you "
    with pytest.raises(ValueError, match=law + "mean 'vit_tiny_patch16_224.augreg_in21k'"):
        encoder(encoder="vit_tiny_patch16_224.augreg_in21")


def test_the_crop_must_hold_whole_patches() -> None:
    with pytest.raises(ValueError, match=r"data.crop_size must be a multiple of the patch size 4, got 18"):
        build_network(TINY, classes=3, image_size=18)


# Weights from the hub


def test_weights_that_cannot_be_fetched_end_in_one_line_with_the_way_out(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def unreachable(*_: object, **__: object) -> None:
        raise LocalEntryNotFoundError("cannot find\nthe files. Check your connection")

    monkeypatch.setattr("timm.models._hub.model_info", lambda *_, **__: None)
    monkeypatch.setattr("timm.models._hub.hf_hub_download", unreachable)

    with pytest.raises(
        OSError, match=r"network\.pretrained must find .*files\); set .*\.weights FILE"
    ) as told:
        build_encoder(NetworkConfig(encoder="deit_tiny_patch16_224"), 32)

    assert "\n" not in str(told.value)


def test_a_hub_that_does_not_answer_is_asked_once(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def silent(*_: object, **__: object) -> None:
        raise RuntimeError("name not known")

    def download(*_: object, **given: object) -> None:
        asked.append(given["local_files_only"])
        raise LocalEntryNotFoundError("not in the cache")

    monkeypatch.setattr("timm.models._hub.model_info", silent)
    monkeypatch.setattr("timm.models._hub.hf_hub_download", download)

    with pytest.raises(OSError, match=r"got neither \(name not known\)"):
        build_encoder(NetworkConfig(encoder="deit_tiny_patch16_224"), 32)

    assert all(asked)
    assert sys.modules["timm.models._hub"].hf_hub_download is download


# Weights from a file


def test_weights_are_those_of_the_file(weights_file: Path) -> None:
    loaded = encoder(weights=str(weights_file)).vit.state_dict()

    published = load_file(weights_file)
    assert loaded.keys() == published.keys() - {"head.weight", "head.bias"}
    assert all(torch.equal(loaded[name], published[name]) for name in loaded)


@pytest.mark.parametrize("wrapped_in", [None, "state_dict", "model"])
def test_a_pth_file_is_read_bare_or_as_the_part_of_a_checkpoint(
    weights_file: Path, tmp_path: Path, wrapped_in: str | None
) -> None:
    state = load_file(weights_file)
    path = tmp_path / "tiny.pth"
    torch.save({wrapped_in: state, "epoch": 3} if wrapped_in else state, path)

    loaded = encoder(weights=str(path)).vit.state_dict()

    assert all(torch.equal(loaded[name], state[name]) for name in loaded)


def test_trained_position_embeddings_are_resampled_to_another_image_size(weights_file: Path) -> None:
    published = load_file(weights_file)
    own = published["pos_embed"]  # a class token and 4 x 4 patches

    trained = build_encoder(tiny(weights=str(weights_file), train_pos_embed=True), 2 * IMAGE).vit

    assert trained.pos_embed.requires_grad
    found = trained.state_dict()

    resampled = found.pop("pos_embed")
    assert resampled.shape == (1, 1 + 8 * 8, 16)
    assert torch.equal(resampled[:, :1], own[:, :1])
    grid = own[:, 1:].reshape(4, 4, 16)
    finer = resampled[:, 1:].reshape(8, 8, 16)
    assert torch.corrcoef(torch.stack([finer[::2, ::2].flatten(), grid.flatten()]))[0, 1] > 0.8
    assert all(torch.equal(found[name], published[name]) for name in found)


@pytest.mark.parametrize(
    ("changes", "difference"),
    [
        ({"width": 32}, r"blocks.0.attn.proj.bias \(16,\) instead of \(32,\)"),
        ({"depth": 5}, "misses blocks.4.attn.proj.bias"),
        ({"depth": 3}, "has an unknown blocks.3.attn.proj.bias"),
    ],
)
def test_weights_of_another_architecture_are_refused_with_the_first_difference(
    weights_file: Path, changes: dict[str, int], difference: str
) -> None:
    with pytest.raises(
        ValueError, match=rf"network.weights must fit .+{difference} \(\d+ differences\); set"
    ):
        encoder(weights=str(weights_file), **changes)


def test_a_weights_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"weights file must exist, got '.*none.safetensors'"):
        encoder(weights=str(tmp_path / "none.safetensors"))


@pytest.mark.parametrize("suffix", ["safetensors", "pth"])
@pytest.mark.parametrize("content", [b"", b"not weights at all", b"PK\x03\x04 half an archive"])
def test_a_file_that_holds_no_weights_is_refused_in_one_line(
    tmp_path: Path, suffix: str, content: bytes
) -> None:
    path = tmp_path / f"broken.{suffix}"
    path.write_bytes(content)

    with pytest.raises(ValueError, match=rf"got '{re.escape(str(path))}'") as refused:
        read_tensors(path)

    assert "\n" not in str(refused.value)


class Payload:
    """Writes a file when it is unpickled."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.target,)


def test_a_pth_file_that_holds_code_is_refused_and_the_code_never_runs(tmp_path: Path) -> None:
    path, mark = tmp_path / "trojan.pth", tmp_path / "executed"
    torch.save({"weight": torch.ones(1), "extra": Payload(mark)}, path)

    with pytest.raises(ValueError, match="weights file must hold nothing but tensors"):
        encoder(weights=str(path))

    assert not mark.exists()
    torch.load(path, weights_only=False)
    assert mark.exists()  # the payload was live


def test_a_pth_file_of_other_plain_data_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "numbers.pth"
    torch.save({"accuracy": 0.9}, path)

    with pytest.raises(ValueError, match="weights file must hold tensors by name"):
        encoder(weights=str(path))


def test_real_deit_weights_load_at_any_image_size(real_data: Path) -> None:
    path = real_data / "weights/deit_tiny_patch16_224.safetensors"
    published = load_file(path)

    loaded = build_encoder(
        NetworkConfig(encoder="vit_tiny_patch16_224", pretrained=False, weights=str(path)), 96
    )

    found = loaded.vit.state_dict()
    assert all(torch.equal(found[name], published[name]) for name in found)
