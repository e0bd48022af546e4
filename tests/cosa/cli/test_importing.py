"""cosa-import: the names and shapes of the authors' release, with random numbers in them."""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F  # noqa: N812 (torch's own convention)

from cosa import cli
from cosa.config import PAPER_ENCODER
from cosa.data import COCO_CLASSES, VOC_CLASSES
from cosa.model import load_model

WIDTH, DEPTH, HEADS, PATCH, GRID = 768, 12, 12, 16, 14


def released_state(classes: int = 20) -> dict[str, Tensor]:
    """A state of the released network's names and shapes."""
    shapes: dict[str, tuple[int, ...]] = {
        "encoder.cls_token": (1, 1, WIDTH),
        "encoder.pos_embed": (1, 1 + GRID * GRID, WIDTH),
        "encoder.patch_embed.proj.weight": (WIDTH, 3, PATCH, PATCH),
        "encoder.patch_embed.proj.bias": (WIDTH,),
        "encoder.norm.weight": (WIDTH,),
        "encoder.norm.bias": (WIDTH,),
        "encoder.head.weight": (1000, WIDTH),
        "encoder.head.bias": (1000,),
        "classifier.weight": (classes, WIDTH, 1, 1),
        "aux_classifier.weight": (classes, WIDTH, 1, 1),
        "decoder.conv6.weight": (512, WIDTH, 3, 3),
        "decoder.conv7.weight": (512, 512, 3, 3),
        "decoder.conv8.weight": (classes + 1, 512, 1, 1),
    }
    for i in range(DEPTH):
        block = f"encoder.blocks.{i}"
        linear = {"attn.qkv": (3 * WIDTH, WIDTH), "attn.proj": (WIDTH, WIDTH)}
        linear |= {"mlp.fc1": (4 * WIDTH, WIDTH), "mlp.fc2": (WIDTH, 4 * WIDTH)}
        for name, shape in linear.items():
            shapes[f"{block}.{name}.weight"], shapes[f"{block}.{name}.bias"] = shape, shape[:1]
        for name in ("norm1", "norm2"):
            shapes[f"{block}.{name}.weight"] = shapes[f"{block}.{name}.bias"] = (WIDTH,)
    generator = torch.Generator().manual_seed(0)
    return {name: 0.03 * torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def arguments(**changes: Any) -> argparse.Namespace:
    """Their arguments, as far as they matter here, with a folder as their code leaves it in them."""
    given = {
        "dataset": "VOC12",
        "backbone": "vit_base_patch16_224",
        "isgap": False,
        "aux_layer": -3,
        "crop_size": 448,
        "max_iters": 32_000,
        "warmup_iters": 6_000,
        "lr": 6e-5,
        "wt_dec": 0.01,
        "momentum": 0.9994,
        "bkg_thre": 0.5,
        "output_dir": Path("/where/they/trained"),
    }
    return argparse.Namespace(**given | changes)


def write(path: Path, state: dict[str, Tensor], **changes: Any) -> Path:
    kept = {"s_or_t": "t", "model": state, "epoch": 24_000, "result": np.float64(75.72)}
    torch.save({**kept, "args": arguments(**changes)}, path)
    return path


def layer_norm(x: Tensor, state: dict[str, Tensor], name: str) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    normed = centred / (centred.square().mean(-1, keepdim=True) + 1e-6).sqrt()
    return normed * state[f"{name}.weight"] + state[f"{name}.bias"]


def linear(x: Tensor, state: dict[str, Tensor], name: str) -> Tensor:
    return x @ state[f"{name}.weight"].T + state[f"{name}.bias"]


def attention(x: Tensor, state: dict[str, Tensor], name: str) -> Tensor:
    q, k, v = linear(x, state, f"{name}.qkv").split(WIDTH, -1)
    size, heads = WIDTH // HEADS, []
    for i in range(HEADS):
        mine = slice(i * size, (i + 1) * size)
        weights = (q[..., mine] @ k[..., mine].transpose(1, 2) / size**0.5).softmax(-1)
        heads.append(weights @ v[..., mine])
    return linear(torch.cat(heads, -1), state, f"{name}.proj")


def slow_outputs(state: dict[str, Tensor], images: Tensor, aux_layer: int) -> dict[str, Tensor]:
    """Z, Z-dagger, M, M-dagger and S, from what is known of the released network."""
    weight, bias = state["encoder.patch_embed.proj.weight"], state["encoder.patch_embed.proj.bias"]
    height, width = images.shape[2] // PATCH, images.shape[3] // PATCH
    rows = []
    for p in range(height):
        for q in range(width):
            patch = images[:, :, p * PATCH : (p + 1) * PATCH, q * PATCH : (q + 1) * PATCH]
            rows.append((patch[:, None] * weight).sum((2, 3, 4)) + bias)
    grid = state["encoder.pos_embed"][:, 1:].reshape(1, GRID, GRID, WIDTH).permute(0, 3, 1, 2)
    positions = F.interpolate(grid, size=(height, width), mode="bicubic", align_corners=False)
    patches = torch.stack(rows, 1) + positions.flatten(2).transpose(1, 2)
    first = (state["encoder.cls_token"] + state["encoder.pos_embed"][:, :1]).expand(len(images), -1, -1)
    x = torch.cat([first, patches], 1)
    blocks = []
    for i in range(DEPTH):
        name = f"encoder.blocks.{i}"
        x = x + attention(layer_norm(x, state, f"{name}.norm1"), state, f"{name}.attn")
        hidden = F.gelu(linear(layer_norm(x, state, f"{name}.norm2"), state, f"{name}.mlp.fc1"))
        x = x + linear(hidden, state, f"{name}.mlp.fc2")
        blocks.append(x)
    last = layer_norm(x, state, "encoder.norm")[:, 1:]  # M-dagger is read before this norm
    aux = blocks[aux_layer][:, 1:]
    head, aux_head = (state[f"{name}.weight"][:, :, 0, 0] for name in ("classifier", "aux_classifier"))

    def as_map(tokens: Tensor) -> Tensor:
        return tokens.transpose(1, 2).reshape(len(images), -1, height, width)

    seg = as_map(last)
    for conv in ("conv6", "conv7"):
        seg = F.conv2d(seg, state[f"decoder.{conv}.weight"], padding=5, dilation=5).relu()
    return {
        "cls_logits": last.amax(1) @ head.T,
        "aux_cls_logits": aux.amax(1) @ aux_head.T,
        "cam": as_map(last @ head.T),
        "aux_cam": as_map(aux @ aux_head.T),
        "seg_logits": F.conv2d(seg, state["decoder.conv8.weight"]),
    }


@pytest.fixture
def place(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder to work in that is gone at once: a checkpoint of this size, and its import, take 700 MB."""
    with tempfile.TemporaryDirectory() as folder:
        monkeypatch.chdir(folder)
        yield Path(folder)


@pytest.mark.parametrize("aux_layer", [-3, -4])
def test_the_imported_network_says_what_the_released_one_says(aux_layer: int, place: Path) -> None:
    state = released_state()
    source = write(place / "voc_weights.pth", state, aux_layer=aux_layer)

    assert cli.import_([str(source), "--out", str(place / "model")]) == 0

    network = load_model(place / "model", device=torch.device("cpu")).network
    images = torch.randn(1, 3, 48, 80, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        output = network(images)
    for name, expected in slow_outputs(state, images, aux_layer).items():
        torch.testing.assert_close(getattr(output, name), expected, rtol=1e-3, atol=1e-4, msg=name)


def test_an_import_is_a_model_like_any_other(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = write(place / "voc_weights.pth", released_state())
    Image.fromarray(np.zeros((20, 30, 3), np.uint8)).save(place / "image.png")

    assert cli.import_([str(source), "--out", "model"]) == 0
    predicted = cli.predict(
        ["model", "image.png", "--evaluation.size", "32", "--evaluation.scales", "1.0", "--out", "maps"]
    )

    assert predicted == 0, capsys.readouterr().err
    with Image.open(place / "maps/image.png") as image:
        assert image.size == (30, 20)
    model = load_model(place / "model", device=torch.device("cpu"))
    assert (model.classes, model.facts.step) == (VOC_CLASSES, 24_000)
    settings = model.config
    assert (settings.data.layout, settings.evaluation.size) == ("voc", 448)
    assert (settings.network.encoder, settings.network.aux_block) == (PAPER_ENCODER, -3)
    assert settings.data.mean == (0.485, 0.456, 0.406)


def test_the_coco_release_has_the_classes_of_coco(place: Path) -> None:
    source = write(place / "coco_weights.pth", released_state(classes=80), dataset="COCO")

    assert cli.import_([str(source), "--out", "model"]) == 0

    model = load_model(place / "model", device=torch.device("cpu"))
    assert (model.classes, model.config.data.layout) == (COCO_CLASSES, "coco")


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tensor]:
    """A state that is refused before its sizes matter."""
    return {"encoder.cls_token": torch.ones(1, 1, 4)}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dataset": "cityscapes"}, "dataset is VOC12 or COCO, got 'cityscapes'"),
        ({"backbone": "mit_b1"}, "backbone is vit_base_patch16_224, got 'mit_b1'"),
        ({"isgap": True}, "isgap is False, got True"),
        ({}, "weights must fit the network"),
    ],
)
def test_another_network_is_refused_in_one_line(
    changes: dict[str, Any],
    message: str,
    small: dict[str, Tensor],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    source = write(tmp_path / "w.pth", small, **changes)

    assert cli.import_([str(source), "--out", "model"]) == cli.MISTAKE

    (line,) = capsys.readouterr().err.splitlines()
    assert message in line
    assert not (tmp_path / "model").exists()


def test_an_unknown_tensor_is_named(
    small: dict[str, Tensor], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = write(tmp_path / "w.pth", small | {"decoder.blocks.0.weight": torch.ones(1)})

    assert cli.import_([str(source), "--out", "model"]) == cli.MISTAKE

    assert "got an unknown decoder.blocks.0.weight in" in capsys.readouterr().err


class Payload:
    """Writes a file when it is unpickled."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.target,)


def test_a_file_that_holds_code_is_refused_and_the_code_never_runs(
    small: dict[str, Tensor], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mark = tmp_path / "executed"
    source = write(tmp_path / "w.pth", small, output_dir=Payload(mark))

    assert cli.import_([str(source), "--out", "model"]) == cli.MISTAKE

    assert "released checkpoint must hold tensors and an argparse.Namespace" in capsys.readouterr().err
    assert not mark.exists()
    torch.load(source, weights_only=False)
    assert mark.exists()  # the payload was live


def test_a_file_that_is_not_there_or_is_no_release_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.import_(["none.pth", "--out", "model"]) == cli.MISTAKE
    assert "released checkpoint must exist" in capsys.readouterr().err

    torch.save({"weight": torch.ones(1)}, tmp_path / "bare.pth")
    assert cli.import_(["bare.pth", "--out", "model"]) == cli.MISTAKE
    assert "must hold a state by the name 'model'" in capsys.readouterr().err
