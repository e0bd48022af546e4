from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import mlflow.pyfunc
import numpy as np
import pandas as pd
import pytest
import torch
from mlflow import MlflowClient
from PIL import Image

from cosa import model as models
from cosa.config import Config, from_json, override, to_json
from cosa.data.loader import evaluation_batches
from cosa.data.open import open_dataset
from cosa.model import Model, build_model, load_model, resolve_model
from cosa.networks.multiscale import multiscale, resize
from cosa.networks.network import build_network
from cosa.storage import checkpoint
from cosa.storage.model_files import Facts, StoredModel, save_model
from cosa.tracking import TrackingError, initialise_store, save_pyfunc
from tests.cosa.runs import train

CLASSES = ("cat", "dog", "bird")
FACTS = Facts(step=7, xi=0.3, aux_xi=0.4, data_fingerprint="0123456789abcdef", metrics={"a": 0.5})
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def config(tiny_config: Config) -> Config:
    return override(tiny_config, {"evaluation.scales": (1.0, 0.5), "evaluation.flip": True})


@pytest.fixture(scope="module")
def folder(config: Config, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model's folder, of an untrained network; treat it as read-only."""
    torch.manual_seed(0)
    network = build_network(config.network, len(CLASSES), config.data.crop_size)
    place = tmp_path_factory.mktemp("models") / "model"
    save_model(place, network, config, CLASSES, facts=FACTS)
    return place


@pytest.fixture(scope="module")
def model(folder: Path) -> Model:
    return load_model(folder, device=CPU)


@pytest.fixture(scope="module")
def run_folder(tiny_config: Config, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a tiny run, finished; treat it as read-only."""
    out = tmp_path_factory.mktemp("runs") / "tiny"
    train(tiny_config, out=out)
    return out


@pytest.fixture
def copy(folder: Path, tmp_path: Path) -> Path:
    """A model's folder to damage."""
    return shutil.copytree(folder, tmp_path / "model")


def picture(height: int = 40, width: int = 56, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


def test_a_saved_model_comes_back_with_the_same_weights_and_facts(config: Config, folder: Path) -> None:
    torch.manual_seed(0)
    network = build_network(config.network, len(CLASSES), config.data.crop_size)

    loaded = load_model(folder, device=CPU)

    assert (loaded.classes, loaded.facts, loaded.config) == (CLASSES, FACTS, config)
    own = loaded.network.state_dict()
    assert all(torch.equal(tensor, own[name]) for name, tensor in network.state_dict().items())


def test_the_model_says_in_plain_json_what_it_is(folder: Path) -> None:
    about = json.loads((folder / "model.json").read_text())

    assert about["classes"] == list(CLASSES)
    assert about["patch_size"] == 4
    assert about["evaluation"] == {"size": 32, "scales": [1.0, 0.5], "flip": True}
    assert about["oracle"] is False
    assert about["metrics"] == {"a": 0.5}


def test_a_metric_that_is_not_a_number_survives_as_strict_json(
    config: Config, model: Model, tmp_path: Path
) -> None:
    facts = Facts(step=1, xi=0.3, aux_xi=0.4, data_fingerprint="", metrics={"odd": float("nan")})
    save_model(tmp_path / "m", model.network, config, CLASSES, facts=facts)

    assert "NaN" not in (tmp_path / "m" / "model.json").read_text()
    assert np.isnan(load_model(tmp_path / "m").facts.metrics["odd"])


def test_nothing_in_a_models_folder_is_pickled(folder: Path) -> None:
    assert sorted(path.name for path in folder.iterdir()) == [
        "config.json",
        "model.json",
        "model.safetensors",
    ]


def test_a_prediction_has_the_size_of_its_image(model: Model) -> None:
    classes = model.predict(picture(40, 56))

    assert (classes.shape, classes.dtype) == ((40, 56), np.uint8)
    assert classes.max() <= len(CLASSES)


def test_a_prediction_is_the_argmax_of_the_fused_logits_in_the_images_own_size(model: Model) -> None:
    image = picture(40, 56)
    batch = model.outputs([image])[0]

    logits = resize(batch.fused.seg_logits, (40, 56))
    np.testing.assert_array_equal(model.predict(image), logits.argmax(1)[0].numpy())


def test_a_prediction_agrees_with_what_evaluation_sees(config: Config, run_folder: Path) -> None:
    dataset = open_dataset(config.data, config.data.val_split)
    trained = load_model(run_folder, device=CPU)
    settings = trained.config.evaluation
    batch = next(evaluation_batches(dataset, trained.config))
    with torch.no_grad():
        fused = multiscale(
            trained.network, batch.images, scales=settings.scales, flip=settings.flip, size=(32, 32)
        )
    size = dataset.image(0).shape[:2]

    expected = resize(fused.seg_logits[:1], (size[0], size[1])).argmax(1)[0].numpy()
    assert (trained.predict(dataset.image_paths[0]) == expected).mean() > 0.999  # batches round differently


def test_a_file_a_pillow_image_and_an_array_say_the_same(model: Model, tmp_path: Path) -> None:
    pixels = picture()
    Image.fromarray(pixels).save(tmp_path / "image.png")

    expected = model.predict(pixels)

    for image in (str(tmp_path / "image.png"), tmp_path / "image.png", Image.fromarray(pixels)):
        np.testing.assert_array_equal(model.predict(image), expected)


def test_a_batch_of_many_sizes_is_predicted_as_each_alone(model: Model) -> None:
    images = [picture(40, 56), picture(20, 33, seed=1)]

    together = model.predict_batch(images)

    assert [m.shape for m in together] == [(40, 56), (20, 33)]
    for image, classes in zip(images, together, strict=True):
        assert (classes == model.predict(image)).mean() > 0.999  # batches round differently


def test_labels_rule_out_all_other_classes(model: Model) -> None:
    images = [picture(seed=seed) for seed in range(3)]

    found = model.predict_batch(images, labels=[["dog"], [], ["cat", "bird"]])

    for classes, allowed in zip(found, ({0, 2}, {0}, {0, 1, 3}), strict=True):
        assert set(np.unique(classes)) <= allowed


def test_probabilities_sum_to_one_and_labels_set_the_others_to_zero(model: Model) -> None:
    output = model.outputs([picture()])[0]

    free, labelled = output.seg_probs(), output.seg_probs(model.label_vector(["dog"]))

    np.testing.assert_allclose(free.sum(0), 1, atol=1e-5)
    np.testing.assert_allclose(labelled.sum(0), 1, atol=1e-5)
    assert (free > 0).all()
    assert (labelled[[1, 3]] == 0).all()


def test_probabilities_of_a_sum_of_views_are_those_of_the_mean_to_its_power(model: Model) -> None:
    output = model.outputs([picture()])[0]

    mean, total = output.seg_probs(), output.seg_probs(views=3)

    np.testing.assert_allclose(total, mean**3 / (mean**3).sum(0), atol=1e-5)


def test_an_activation_reaches_from_zero_to_one(model: Model) -> None:
    output = model.outputs([picture()])[0]
    output.fused.cam[:, 1] = torch.linspace(-1, 2, 32)

    activation = output.activation(1)

    assert activation.shape == (40, 56)
    assert (activation.min(), activation.max()) == (0, 1)
    assert (activation[:, :10] == 0).all()


def test_a_huge_image_is_compared_in_parts_with_the_same_result(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = model.outputs([picture()])[0]
    labels = model.label_vector(["dog", "bird"])
    whole, whole_labelled = output.classes(), output.classes(labels)

    monkeypatch.setattr(models, "_MAX_ELEMENTS", 40 * 56)

    np.testing.assert_array_equal(output.classes(), whole)
    np.testing.assert_array_equal(output.classes(labels), whole_labelled)


@pytest.mark.parametrize(
    "image", [np.zeros((4, 4), np.uint8), np.zeros((4, 4, 3)), np.zeros((0, 4, 3), np.uint8)]
)
def test_an_array_that_is_no_rgb_is_refused(model: Model, image: np.ndarray) -> None:
    with pytest.raises(ValueError, match="image must be uint8 RGB"):
        model.predict(image)


def test_an_unknown_label_is_answered_with_the_nearest_class(model: Model) -> None:
    with pytest.raises(ValueError, match=r"got 'dgo'; did you mean 'dog'\?"):
        model.predict(picture(), labels=["dgo"])


def test_a_run_a_checkpoint_and_an_export_of_it_are_the_same_network(
    run_folder: Path, tmp_path: Path
) -> None:
    stored = resolve_model(run_folder)
    built = build_model(stored, device=CPU)
    save_model(tmp_path / "export", built.network, built.config, built.classes, facts=built.facts)
    last = run_folder / "checkpoints" / "step_00000002.pt"

    for source in (run_folder, str(last), tmp_path / "export", tmp_path / "export" / "model.safetensors"):
        found = resolve_model(source)
        assert (found.facts.step, found.classes) == (2, stored.classes)
        assert all(torch.equal(tensor, stored.weights[name]) for name, tensor in found.weights.items())


def test_an_older_checkpoint_and_the_online_network_are_told_apart(run_folder: Path) -> None:
    first = run_folder / "checkpoints" / "step_00000001.pt"
    online, assignment = (resolve_model(first, network=name) for name in ("online", "assignment"))

    assert online.facts.step == 1
    assert not torch.equal(online.weights["cam_head.weight"], assignment.weights["cam_head.weight"])


def test_a_run_that_is_still_going_on_is_its_newest_checkpoint(run_folder: Path, tmp_path: Path) -> None:
    going = tmp_path / "run"
    shutil.copytree(run_folder / "checkpoints", going / "checkpoints")
    (going / "checkpoints" / "step_00000002.pt").write_bytes(b"torn")

    found = resolve_model(going)

    assert (found.facts.step, found.folder) == (1, going)


def test_a_finished_run_is_its_final_model_and_one_that_goes_on_is_not(
    run_folder: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    shutil.copytree(run_folder, run)
    built = build_model(resolve_model(run), device=CPU)
    final = replace(built.facts, step=99)
    save_model(run / "model", built.network, built.config, built.classes, facts=final)

    assert resolve_model(run).facts.step == 99
    assert resolve_model(run / "model").folder == run
    assert resolve_model(run, network="online").facts.step == 2
    (run / "result.json").unlink()
    assert resolve_model(run).facts.step == 2


def test_a_checkpoint_that_names_its_classes_needs_no_data_set(run_folder: Path, tmp_path: Path) -> None:
    state = checkpoint.load(run_folder / "checkpoints" / "step_00000002.pt")
    moved = override(from_json(state["config"]), {"data.layout": "voc", "data.root": "nowhere"})
    classes = ("a", "b", "c", "d", "e", "f")
    checkpoint.save(tmp_path, {**state, "config": to_json(moved), "classes": classes}, keep=1)

    assert resolve_model(tmp_path / "step_00000002.pt").classes == classes


def test_a_checkpoint_names_the_folder_of_its_run(run_folder: Path) -> None:
    assert resolve_model(run_folder / "checkpoints" / "step_00000002.pt").folder == run_folder


def test_what_is_no_model_is_refused_with_what_would_be_one(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("hello")

    with pytest.raises(FileNotFoundError, match=r"an MLflow run id of 32 hex digits, got 'nowhere'"):
        resolve_model("nowhere")
    with pytest.raises(FileNotFoundError, match=r"no model\.json but notes\.txt"):
        resolve_model(tmp_path)
    with pytest.raises(ValueError, match="checkpoint must be whole"):
        resolve_model(tmp_path / "notes.txt")


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_a_missing_file_is_named(copy: Path, name: str) -> None:
    (copy / name).unlink()

    with pytest.raises(FileNotFoundError, match=f"must hold {name}, got .*; export it again"):
        load_model(copy)


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"format": 2}', '{"format": 1}'])
def test_a_model_json_of_something_else_is_refused(copy: Path, text: str) -> None:
    (copy / "model.json").write_text(text)

    with pytest.raises(ValueError, match=r"model\.json must be one that cosa wrote in format 1"):
        load_model(copy)


def test_weights_that_are_no_weights_are_refused(copy: Path) -> None:
    (copy / "model.safetensors").write_bytes(b"nothing")

    with pytest.raises(ValueError, match="weights file must hold nothing but tensors"):
        load_model(copy)


def _told_wrong(stored: StoredModel, **changes: object) -> StoredModel:
    return StoredModel(**{**vars(stored), **changes})  # type: ignore[arg-type]


def test_weights_of_other_classes_are_refused(folder: Path) -> None:
    stored = _told_wrong(resolve_model(folder), classes=("cat", "dog"))

    with pytest.raises(ValueError, match=r"weights must be of the model's 2 classes, got 3 classes"):
        build_model(stored)


def test_weights_of_another_architecture_are_refused_with_the_first_difference(
    folder: Path, config: Config
) -> None:
    stored = _told_wrong(resolve_model(folder), config=override(config, {"network.decoder_channels": 8}))

    with pytest.raises(
        ValueError, match=r"got \(16, 32, 3, 3\) for decoder\.0\.weight instead of \(8, 32, 3, 3\) \(3 diff"
    ):
        build_model(stored)


def test_a_model_holds_one_network_and_says_which(folder: Path) -> None:
    with pytest.raises(ValueError, match=r"network must be assignment, .* name a checkpoint"):
        resolve_model(folder, network="online")


def test_a_half_written_model_is_none(copy: Path, model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(path: Path, write: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr("cosa.storage.model_files.write_atomically", full)

    with pytest.raises(OSError, match="disk full"):
        save_model(copy, model.network, model.config, CLASSES, facts=FACTS)
    assert not (copy / "model.json").exists()


@pytest.fixture(scope="module")
def tracked(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str, str]:
    """A store's URI, and the ids of a run with a model and of one without."""
    uri = f"sqlite:///{tmp_path_factory.mktemp('store')}/mlflow.db"
    experiment = initialise_store(uri, "cosa")
    client = MlflowClient(uri)
    ids = [client.create_run(experiment).info.run_id for _ in range(2)]
    client.log_artifacts(ids[0], str(folder), "model")
    return uri, ids[0], ids[1]


def test_a_tracked_run_gives_its_model_by_its_id(folder: Path, tracked: tuple[str, str, str]) -> None:
    uri, run_id, _ = tracked

    found = resolve_model(run_id, tracking_uri=uri)

    expected = resolve_model(folder)
    assert (found.facts, found.classes, found.folder) == (expected.facts, expected.classes, None)
    assert torch.equal(found.weights["cam_head.weight"], expected.weights["cam_head.weight"])


def test_a_tracked_run_without_a_model_is_refused(tracked: tuple[str, str, str]) -> None:
    uri, _, empty = tracked

    with pytest.raises(TrackingError, match="must hold the artifact folder `model`, got none"):
        resolve_model(empty, tracking_uri=uri)


def test_a_run_that_the_store_does_not_know_is_refused(tracked: tuple[str, str, str]) -> None:
    with pytest.raises(TrackingError, match=f"run id must be one of .*, got '{'a' * 32}'"):
        resolve_model("a" * 32, tracking_uri=tracked[0])


def test_a_store_that_is_not_there_is_not_made(tmp_path: Path) -> None:
    with pytest.raises(TrackingError, match="tracking store must exist"):
        resolve_model("a" * 32, tracking_uri=f"sqlite:///{tmp_path}/none.db")
    assert not (tmp_path / "none.db").exists()


def test_mlflow_loads_the_model_and_says_the_same(folder: Path, model: Model, tmp_path: Path) -> None:
    save_pyfunc(folder, tmp_path / "mlflow")
    images = [picture(seed=seed) for seed in range(2)]
    files = []
    for i, image in enumerate(images):
        files.append(str(tmp_path / f"{i}.png"))
        Image.fromarray(image).save(files[-1])

    served = mlflow.pyfunc.load_model(str(tmp_path / "mlflow"))

    expected = [model.predict(image) for image in images]
    for model_input in (np.stack(images), files, pd.DataFrame({"image": files})):
        for found, classes in zip(served.predict(model_input), expected, strict=True):
            np.testing.assert_array_equal(found, classes)


def test_an_mlflow_model_holds_no_pickle(folder: Path, tmp_path: Path) -> None:
    save_pyfunc(folder, tmp_path / "mlflow")

    suffixes = {path.suffix for path in (tmp_path / "mlflow").rglob("*") if path.is_file()}
    assert suffixes <= {"", ".yaml", ".yml", ".txt", ".json", ".safetensors"}
