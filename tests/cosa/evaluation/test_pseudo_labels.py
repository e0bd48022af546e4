from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from cosa.cli import predict
from cosa.config import Config
from cosa.data.dataset import SegmentationDataset
from cosa.data.open import open_dataset
from cosa.evaluation import pseudo_labels
from cosa.evaluation.pseudo_labels import LabelSettings, label_map, write_pseudo_labels
from cosa.model import ImageOutput, Model, load_model
from cosa.storage.label_files import label_paths
from cosa.structures import FusedOutput
from tests.cosa.runs import train


@pytest.fixture(scope="module")
def run_folder(tiny_config: Config, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a tiny run, finished; treat it as read-only."""
    out = tmp_path_factory.mktemp("runs") / "tiny"
    train(tiny_config, out=out)
    return out


@pytest.fixture(scope="module")
def model(run_folder: Path) -> Model:
    return load_model(run_folder, device=torch.device("cpu"))


@pytest.fixture(scope="module")
def images(tiny_config: Config) -> SegmentationDataset:
    return open_dataset(tiny_config.data, tiny_config.data.train_split)


def output(cam: list[list[float]], aux_cam: list[list[float]]) -> ImageOutput:
    """Maps of two classes over a row of pixels, in the image's own size."""
    maps, aux = (torch.tensor(rows)[None, :, None] for rows in (cam, aux_cam))
    nothing = torch.zeros(1, 2)
    fused = FusedOutput(
        cam=maps,
        aux_cam=aux,
        seg_logits=torch.zeros(1, 3, 1, maps.shape[3]),
        cls_logits=nothing,
        aux_cls_logits=nothing,
    )
    return ImageOutput(fused, (1, maps.shape[3]))


def test_the_strongest_class_of_the_image_is_taken_from_xi_on() -> None:
    said = output([[0.0, 5.0, 10.0, 4.0], [0.0, 2.0, 0.0, 2.0]], [[0.0] * 4] * 2)

    both = label_map(said, torch.tensor([1.0, 1.0]), LabelSettings(xi=0.5))
    second = label_map(said, torch.tensor([0.0, 1.0]), LabelSettings(xi=0.5))

    assert both.tolist() == [[0, 2, 1, 2]]  # scaled to 0, 0.5, 1, 0.4 and 0, 1, 0, 1
    assert second.tolist() == [[0, 2, 0, 2]]


def test_what_is_near_xi_is_ignored_in_a_band() -> None:
    said = output([[0.0, 4.0, 5.5, 10.0], [0.0] * 4], [[0.0] * 4] * 2)

    found = label_map(said, torch.tensor([1.0, 0.0]), LabelSettings(xi=0.5, ignore=0.2))

    assert found.tolist() == [[0, 255, 255, 1]]


def test_the_ensemble_averages_both_activations() -> None:
    said = output([[0.0, 10.0, 6.0], [0.0] * 3], [[10.0, 0.0, 6.0], [0.0] * 3])

    found = label_map(said, torch.tensor([1.0, 0.0]), LabelSettings(source="ensemble", xi=0.55))

    assert found.tolist() == [[0, 0, 1]]


def test_an_image_without_a_class_is_background() -> None:
    said = output([[3.0, 1.0], [9.0, 1.0]], [[0.0] * 2] * 2)

    assert label_map(said, torch.zeros(2), LabelSettings()).tolist() == [[0, 0]]


def test_each_image_gets_its_own_classes_in_its_own_size(
    model: Model, images: SegmentationDataset, tmp_path: Path
) -> None:
    summary = write_pseudo_labels(model, images, tmp_path / "cpl", LabelSettings())

    for index, path in enumerate(label_paths(tmp_path / "cpl", images.names)):
        with Image.open(path) as picture:
            assert picture.mode == "P"
            found = np.array(picture)
        assert found.shape == images.image(index).shape[:2]
        own = {0, *(images.labels[index].nonzero().flatten() + 1).tolist()}
        assert set(np.unique(found).tolist()) <= own
    assert json.loads((tmp_path / "cpl" / "pseudo_labels.json").read_text()) == summary
    assert summary["miou"] == pytest.approx(sum(summary["iou"].values()) / len(summary["iou"]))


def test_a_call_that_was_stopped_goes_on_and_ends_with_the_same_labels(
    model: Model, images: SegmentationDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = write_pseudo_labels(model, images, tmp_path / "whole", LabelSettings())
    seen: list[int] = []

    def stop(count: int) -> None:
        if sum(seen) >= 5:
            raise KeyboardInterrupt
        seen.append(count)

    with pytest.raises(KeyboardInterrupt):
        write_pseudo_labels(model, images, tmp_path / "cut", LabelSettings(), counted=stop)
    done = sorted((tmp_path / "cut").glob("*.png"))
    assert not (tmp_path / "cut" / "pseudo_labels.json").exists()
    done[0].write_bytes(done[0].read_bytes()[:40])  # torn, as a power cut leaves it
    asked: list[int] = []
    names = pseudo_labels.predict_files
    monkeypatch.setattr(
        pseudo_labels, "predict_files", lambda model, paths: asked.append(len(paths)) or names(model, paths)
    )

    again = write_pseudo_labels(model, images, tmp_path / "cut", LabelSettings())

    assert asked == [len(images) - len(done) + 1]
    assert again == whole


def test_other_pseudo_labels_are_not_mixed_in(
    model: Model, images: SegmentationDataset, tmp_path: Path
) -> None:
    write_pseudo_labels(model, images, tmp_path, LabelSettings())

    with pytest.raises(ValueError, match=r"made with xi 0\.5 instead of 0\.4; choose another folder"):
        write_pseudo_labels(model, images, tmp_path, LabelSettings(xi=0.4))


def test_a_folder_of_other_pictures_is_left_alone(
    model: Model, images: SegmentationDataset, tmp_path: Path
) -> None:
    (tmp_path / "mine.png").touch()

    with pytest.raises(ValueError, match="holds other pictures"):
        write_pseudo_labels(model, images, tmp_path, LabelSettings())


@pytest.mark.parametrize(("name", "value"), [("xi", 0.0), ("xi", 1.0), ("ignore", -0.1), ("ignore", 1.0)])
def test_a_setting_against_its_law_is_refused(name: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"{name} must lie in"):
        LabelSettings(**{name: value})


def test_the_command_writes_the_split_that_the_run_was_trained_on(
    run_folder: Path, images: SegmentationDataset, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code = predict([str(run_folder), "--pseudo-labels", "cpl", "--cam", "ensemble", "--xi", "own"])

    said = capsys.readouterr().out
    assert code == 0, said
    summary = json.loads((tmp_path / "cpl" / "pseudo_labels.json").read_text())
    assert summary["images"] == len(images)
    assert summary["xi"] == load_model(run_folder).facts.xi
    assert f"mIoU {100 * summary['miou']:.2f}" in said


@pytest.mark.parametrize(
    ("more", "reason"),
    [
        (["image.png"], "argument must be one that exists, got 'image.png'"),
        (["--crf"], "argument must be one that exists, got '--crf'"),
        (["--xi", "half"], "--xi must be a number in (0, 1) or own, got 'half'"),
        (["--split", "nowhere"], "nowhere"),
    ],
)
def test_a_mistaken_command_is_refused_in_one_line(
    more: list[str], reason: str, run_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert predict([str(run_folder), "--pseudo-labels", "cpl", *more]) == 2
    assert reason in capsys.readouterr().err


def test_images_of_other_classes_are_refused(
    model: Model, images: SegmentationDataset, tmp_path: Path
) -> None:
    other = SegmentationDataset(
        images.classes[:-1], images.names, images.labels[:, :-1], images.image_paths, images.mask_paths
    )

    with pytest.raises(ValueError, match="images must be of the model's"):
        write_pseudo_labels(model, other, tmp_path, LabelSettings())
