"""A run that starts from published weights says which, and keeps to their mean and deviation."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from cosa.config import IMAGENET_MEAN, Config, from_json, identity, override
from cosa.model import build_model, resolve_model
from cosa.networks.encoder import build_encoder
from tests.cosa.runs import Recorder, train

CPU = torch.device("cpu")


def write_weights(path: Path, config: Config, seed: int = 0) -> Path:
    """Weights of the config's encoder, published for images of 96 pixels."""
    torch.manual_seed(seed)
    save_file(build_encoder(config.network, 96).vit.state_dict(), path)
    return path


@pytest.fixture(scope="module")
def weights(tiny_config: Config, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_weights(tmp_path_factory.mktemp("weights") / "tiny.safetensors", tiny_config)


@pytest.fixture(scope="module")
def config(tiny_config: Config, weights: Path) -> Config:
    return override(tiny_config, {"network.weights": str(weights)})


class Told(Recorder):
    """Also remembers the tags."""

    def start(self, config: Any, *, out: Path, tags: Any = None, resume_step: int | None = None) -> None:
        super().start(config, out=out, tags=tags, resume_step=resume_step)
        self.config, self.tags = config, tags


@pytest.fixture(scope="module")
def tracker() -> Told:
    return Told()


@pytest.fixture(scope="module")
def run(config: Config, tracker: Told, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished run; treat it as read-only."""
    out = tmp_path_factory.mktemp("runs") / "run"
    train(config, out=out, tracker=tracker)
    return out


def test_the_folder_and_the_tracker_are_told_what_the_run_began_from(
    run: Path, tracker: Told, config: Config, weights: Path
) -> None:
    sha256 = hashlib.sha256(weights.read_bytes()).hexdigest()
    known = json.loads((run / "encoder.json").read_text())

    assert known == {
        "name": config.network.encoder,
        "source": f"tiny.safetensors of SHA-256 {sha256}",
        "sha256": build_encoder(config.network, 32).digest(),
        "mean": "0.5, 0.5, 0.5",
        "std": "0.5, 0.5, 0.5",
    }
    assert {f"cosa.encoder.{name}": text for name, text in known.items()}.items() <= tracker.tags.items()
    assert tracker.config.network.weights_sha256 == sha256
    assert tracker.config.data.mean == (0.5, 0.5, 0.5)


def test_the_identity_of_the_result_is_that_of_the_pinned_settings(run: Path, config: Config) -> None:
    kept = from_json((run / "config.json").read_text())
    result = json.loads((run / "result.json").read_text())

    assert identity(kept) == result["identity"] != identity(config)
    assert kept.network.weights_sha256


def test_frozen_positions_stay_what_was_published(run: Path, config: Config) -> None:
    published = build_encoder(config.network, 32).vit.pos_embed
    model = build_model(resolve_model(run), device=CPU)

    assert published is not None
    assert published.shape[1] == 1 + (96 // 4) ** 2
    assert torch.equal(model.network.encoder.vit.pos_embed, published)


def test_trained_positions_move(config: Config, tmp_path: Path) -> None:
    changed = override(config, {"network.train_pos_embed": True})
    before = build_encoder(changed.network, 32).vit.pos_embed

    train(changed, out=tmp_path / "run")

    after = build_model(resolve_model(tmp_path / "run"), device=CPU).network.encoder.vit.pos_embed
    assert before is not None
    assert after.shape == before.shape
    assert not torch.equal(after, before)


def test_a_model_is_loaded_where_its_weights_file_is_gone(tiny_config: Config, tmp_path: Path) -> None:
    path = write_weights(tmp_path / "gone.safetensors", tiny_config)
    train(override(tiny_config, {"network.weights": str(path)}), out=tmp_path / "run")
    path.unlink()

    model = build_model(resolve_model(tmp_path / "run"), device=CPU)

    assert model.config.data.mean == (0.5, 0.5, 0.5)


def test_a_model_sees_images_as_its_run_did(run: Path) -> None:
    model = build_model(resolve_model(run), device=CPU)
    seen = []
    model.network.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))

    model.predict(torch.full((32, 32, 3), 255, dtype=torch.uint8).numpy())

    assert all(torch.equal(images, torch.ones_like(images)) for images in seen)


def test_another_file_of_the_same_name_is_another_run(tiny_config: Config, tmp_path: Path) -> None:
    path = write_weights(tmp_path / "tiny.safetensors", tiny_config)
    config = override(tiny_config, {"network.weights": str(path)})
    train(config, out=tmp_path / "run")
    write_weights(path, tiny_config, seed=1)

    with pytest.raises(
        ValueError, match=r"out must be a new folder .+ network.weights_sha256 '[0-9a-f]{64}'"
    ):
        train(config, out=tmp_path / "run")


def test_a_run_that_goes_on_with_other_tensors_says_so(
    config: Config, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    train(config, out=tmp_path / "run", stop_at=1)
    record = tmp_path / "run/encoder.json"
    record.write_text(json.dumps(json.loads(record.read_text()) | {"sha256": "0" * 64}))

    train(config, out=tmp_path / "run")

    assert ["no longer what this run began from" in r.getMessage() for r in caplog.records] == [True]


def test_a_run_from_scratch_records_no_weights(tiny_config: Config, tmp_path: Path) -> None:
    tracker = Told()

    train(tiny_config, out=tmp_path / "run", tracker=tracker)

    assert not (tmp_path / "run/encoder.json").exists()
    assert not [name for name in tracker.tags if name.startswith("cosa.encoder")]
    assert tracker.config.data.mean == IMAGENET_MEAN
