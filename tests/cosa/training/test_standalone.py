"""Standalone networks from pseudo-labels or masks: what they learn, exact resume, what their runs leave."""

from __future__ import annotations

import json
import re
import shutil
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from mlflow import MlflowClient
from PIL import Image
from torch import multiprocessing
from torch.nn import functional

from cosa.cli import evaluate, export, predict, segment
from cosa.cli import train as train_command
from cosa.config import Config, fields, identity, override, to_json, warmup_identity
from cosa.config.recipes import STANDALONE
from cosa.data.open import open_dataset
from cosa.evaluation.pseudo_labels import LabelSettings, write_pseudo_labels
from cosa.model import load_model
from cosa.networks.published import pinned
from cosa.storage.label_files import SUMMARY, label_paths
from cosa.structures import IGNORE, Batch, Ranks, SegmentationOutput
from cosa.training.standalone import SegmentationState, build_state, learn, objective, segmentation_step, wrap
from tests.cosa.runs import Recorder, differences, saved_state, train, work

STEPS = 4
CPU = torch.device("cpu")
ALONE = Ranks(0, 1, CPU)


@pytest.fixture(scope="module")
def source(tiny_config: Config, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a tiny CoSA run, finished; treat it as read-only."""
    out = tmp_path_factory.mktemp("runs") / "cosa"
    train(tiny_config, out=out)
    return out


@pytest.fixture(scope="module")
def labels(source: Path, tiny_config: Config, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its pseudo-labels; treat them as read-only."""
    out = tmp_path_factory.mktemp("labels") / "labels"
    images = open_dataset(tiny_config.data, tiny_config.data.train_split)
    write_pseudo_labels(load_model(source, device=CPU), images, out, LabelSettings())
    return out


@pytest.fixture(scope="module")
def config(tiny_config: Config, labels: Path) -> Config:
    """A few steps of CoSA's ViT with its decoder alone."""
    return override(
        tiny_config,
        {
            "network.architecture": "largefov_vit",
            "network.aux_head": False,
            "network.drop_path": 0.2,
            "segmentation.labels": str(labels),
            "train.iterations": STEPS,
            "train.warmup": 0,
            "train.checkpoint_every": 2,
            "evaluation.every": STEPS,
        },
    )


@pytest.fixture(scope="module")
def normed(config: Config) -> Config:
    """The same of a network with BatchNorm and an auxiliary head."""
    return override(
        config,
        {
            "network.architecture": "upernet",
            "network.encoder": "resnet18",
            "network.patch_size": 0,
            "network.width": 0,
            "network.depth": 0,
            "network.heads": 0,
            "network.drop_path": 0.0,
            "network.aux_head": True,
            "optim.algorithm": "sgd",
            "optim.lr": 0.01,
        },
    )


@pytest.fixture(scope="module")
def finished(config: Config, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished standalone run; treat it as read-only."""
    out = tmp_path_factory.mktemp("runs") / "standalone"
    train(config, out=out)
    return out


def result_of(out: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((out / "result.json").read_text())
    return found


def test_the_loss_is_the_mean_cross_entropy_of_labelled_pixels_with_the_auxiliary_one_weighted(
    normed: Config,
) -> None:
    generator = torch.Generator().manual_seed(0)
    seg, aux = (torch.randn(2, 7, side, side, generator=generator) for side in (8, 4))
    targets = torch.randint(0, 7, (2, 8, 8), generator=generator)
    targets[0, :3] = IGNORE
    labelled = targets != IGNORE

    terms = learn(SegmentationOutput(seg, aux), targets, normed, labelled.sum().float())

    resized = functional.interpolate(aux, (8, 8), mode="bilinear", align_corners=False)
    for name, logits in (("seg", seg), ("aux_seg", resized)):
        by_hand = [-logits.log_softmax(1)[b, targets[b, y, x], y, x] for b, y, x in labelled.nonzero()]
        assert torch.isclose(terms[name], torch.stack(by_hand).mean())
    assert torch.isclose(objective(terms, normed), terms["seg"] + 0.4 * terms["aux_seg"])


def test_without_weight_the_auxiliary_head_is_left_out(normed: Config) -> None:
    targets = torch.zeros(1, 4, 4, dtype=torch.int64)
    maps = torch.zeros(1, 7, 4, 4)

    off = override(normed, {"segmentation.aux_weight": 0.0})

    assert set(learn(SegmentationOutput(maps, maps), targets, off, torch.tensor(16.0))) == {"seg"}


def batch_of(config: Config) -> Batch:
    generator = torch.Generator().manual_seed(1)
    side, count = config.data.crop_size, config.train.batch_size
    valid = torch.ones(count, side, side, dtype=torch.bool)
    valid[0, :, side // 2 :] = False
    return Batch(
        weak=torch.randn(count, 3, side, side, generator=generator),
        strong=torch.randn(count, 3, side, side, generator=generator),
        labels=torch.ones(count, 6),
        valid=valid,
        masks=torch.randint(0, 7, (count, side, side), generator=generator),
    )


def take(config: Config, batch: Batch) -> tuple[SegmentationState, dict[str, torch.Tensor]]:
    state = build_state(config, 6, CPU)
    return state, segmentation_step(state, wrap(state, config, ALONE), batch, config, ALONE)


def test_what_lies_on_padding_teaches_nothing(config: Config) -> None:
    batch = batch_of(config)
    assert batch.masks is not None
    changed = Batch(**{**vars(batch), "masks": torch.where(batch.valid, batch.masks, 3)})

    (one, _), (other, _) = take(config, batch), take(config, changed)

    for a, b in zip(one.network.parameters(), other.network.parameters(), strict=True):
        assert torch.equal(a, b)


def test_micro_batches_change_nothing_but_rounding_where_there_is_no_batch_norm(config: Config) -> None:
    still = override(config, {"network.drop_path": 0.0})
    halves = override(still, {"train.accumulate": 2})

    (_, whole), (_, parts) = take(still, batch_of(config)), take(halves, batch_of(config))

    assert torch.isclose(whole["seg"], parts["seg"], rtol=1e-5)


def test_batch_norm_refuses_one_image_at_a_time(normed: Config) -> None:
    with pytest.raises(ValueError, match=r"train.batch_size must leave each worker 2 or more images"):
        build_state(override(normed, {"train.accumulate": 4}), 6, CPU)


@pytest.mark.parametrize("kind", ["config", "normed"])
def test_a_resumed_run_is_bit_for_bit_the_uninterrupted_one(
    kind: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    chosen: Config = request.getfixturevalue(kind)
    train(chosen, out=tmp_path / "whole")
    train(chosen, out=tmp_path / "parts", stop_at=2)
    train(chosen, out=tmp_path / "parts")

    whole, parts = (saved_state(tmp_path / name, STEPS) for name in ("whole", "parts"))

    assert differences(whole, parts) == []
    if kind == "normed":
        assert any(name.endswith("running_mean") for name in whole)


def test_a_run_leaves_metrics_of_segmentation_alone_and_a_panel_without_cams(
    finished: Path, config: Config
) -> None:
    result = result_of(finished)

    names = {name.removeprefix("val/standalone/") for name in result["metrics"]}
    assert names == {"seg_miou", "seg_miou_labelled", "seg_cmiou", "seg_cmiou_labelled"}
    assert set(result["standalone"]["per_class"]) == {"seg_iou", "seg_iou_labelled"}
    assert not (finished / "analysis").exists()
    with np.load(next((finished / "panels").glob("*.npz"))) as content:
        assert content["columns"].tolist() == ["image", "ground truth", "labelled", "prediction"]
        assert content["tiles"].shape[:2] == (2, 4)
    assert result["identity"] == identity(pinned(config))


def test_the_commands_judge_export_and_predict_a_standalone_network(
    finished: Path, shapes_root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    image = next((shapes_root / "JPEGImages").iterdir())

    assert evaluate([str(finished), "--out", str(tmp_path / "judged")]) == 0
    assert export([str(finished), "--out", str(tmp_path / "model")]) == 0
    assert predict([str(tmp_path / "model"), str(image), "--out", str(tmp_path / "maps")]) == 0

    judged = json.loads((tmp_path / "judged/evaluation.json").read_text())
    assert judged["network"] == "standalone"
    assert judged["metrics"]["seg_miou"] == result_of(finished)["metrics"]["val/standalone/seg_miou"]
    predicted = np.array(Image.open(tmp_path / "maps" / f"{image.stem}.png"))
    assert (predicted == load_model(finished, device=CPU).predict(image)).all()
    assert "network after 4 steps" in capsys.readouterr().out


def test_what_needs_cams_is_refused_of_a_standalone_network(
    finished: Path, shapes_root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    image = str(next((shapes_root / "JPEGImages").iterdir()))

    assert predict([str(finished), image, "--cams", "--out", str(tmp_path / "maps")]) == 2
    assert predict([str(finished), "--pseudo-labels", str(tmp_path / "labels")]) == 2
    assert evaluate([str(finished), "--network", "online"]) == 2

    told = capsys.readouterr().err.splitlines()
    assert len(told) == 3
    assert "without CAMs" in told[0]
    assert "source must be a CoSA run" in told[1]
    assert "network must be standalone" in told[2]
    assert not (tmp_path / "labels").exists()


class Tags(Recorder):
    """A tracker that remembers the run's tags."""

    def start(self, config: Any, *, out: Path, tags: Any = None, resume_step: int | None = None) -> None:
        super().start(config, out=out, tags=tags, resume_step=resume_step)
        self.tags = dict(tags)


def test_a_run_is_tagged_with_what_supervises_it_and_one_from_masks_is_an_oracle(
    config: Config, labels: Path, tmp_path: Path
) -> None:
    bound = override(config, {"segmentation.supervision": "masks", "segmentation.labels": ""})
    weak, strong = Tags(), Tags()

    train(config, out=tmp_path / "weak", tracker=weak)
    train(bound, out=tmp_path / "strong", tracker=strong)

    fingerprint = json.loads((labels / SUMMARY).read_text())["fingerprint"]
    assert weak.tags["cosa.labels.fingerprint"] == fingerprint
    assert "cosa.oracle" not in weak.tags
    assert strong.tags["cosa.oracle"] == "masks"
    assert not any(name.startswith("cosa.labels") for name in strong.tags)
    assert json.loads((tmp_path / "strong/model/model.json").read_text())["oracle"] is True
    assert identity(pinned(bound)) != identity(pinned(config))


def test_the_identity_is_of_the_labels_themselves_wherever_they_lie(
    config: Config, labels: Path, tmp_path: Path
) -> None:
    moved = shutil.copytree(labels, tmp_path / "moved")
    other = shutil.copytree(labels, tmp_path / "other")
    summary = json.loads((other / SUMMARY).read_text())
    (other / SUMMARY).write_text(json.dumps({**summary, "fingerprint": "0" * 16}))

    here, there, others = (
        pinned(override(config, {"segmentation.labels": str(folder)})) for folder in (labels, moved, other)
    )

    assert here.segmentation.labels_fingerprint == summary["fingerprint"]
    assert identity(here) == identity(there) != identity(others)
    assert pinned(override(here, {"segmentation.labels": str(other)})) == others


def test_settings_that_only_cosa_reads_make_no_other_standalone_run(config: Config) -> None:
    changed = override(config, {"csc.weight": 0.0, "ema.momentum": 0.5, "evaluation.xi": 0.3})

    assert identity(changed) == identity(config)


def test_settings_of_segmentation_are_refused_of_cosa(tiny_config: Config) -> None:
    with pytest.raises(ValueError, match=r"network.architecture must be a standalone network where"):
        override(tiny_config, {"segmentation.supervision": "masks"})


def spoilt(labels: Path, tmp_path: Path, **changes: Any) -> Path:
    """A copy of pseudo-labels whose summary says something else."""
    copy = shutil.copytree(labels, tmp_path / "labels")
    summary = json.loads((copy / SUMMARY).read_text())
    (copy / SUMMARY).write_text(json.dumps({**summary, **changes}))
    return copy


def refusal(config: Config, labels: Path | str, out: Path) -> str:
    with pytest.raises((ValueError, FileNotFoundError)) as error:
        train(override(config, {"segmentation.labels": str(labels)}), out=out)
    assert not (out / "config.json").exists()
    text = str(error.value)
    assert "\n" not in text
    return text


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"classes": ["dog"]}, "1 other classes than the 6"),
        ({"data_fingerprint": "0" * 16}, "24 images, labels and masks other than those of data.root"),
        ({"oracle": True}, "of an oracle"),
        ({"fingerprint": "0" * 16}, "some label maps were changed"),
        ({"format": 0}, "format 1"),
    ],
)
def test_pseudo_labels_of_something_else_are_refused(
    changes: dict[str, Any], told: str, config: Config, labels: Path, tmp_path: Path
) -> None:
    assert told in refusal(config, spoilt(labels, tmp_path, **changes), tmp_path / "run")


def test_pseudo_labels_that_are_not_whole_are_refused(config: Config, labels: Path, tmp_path: Path) -> None:
    copy = spoilt(labels, tmp_path)
    names = open_dataset(config.data, config.data.train_split).names
    label_paths(copy, names)[2].unlink()
    assert f"lacks {names[2]}.png and 0 more" in refusal(config, copy, tmp_path / "run")

    (copy / SUMMARY).unlink()
    assert f"has no {SUMMARY}" in refusal(config, copy, tmp_path / "run")
    assert "got ''" in refusal(config, "", tmp_path / "run")


def test_pseudo_labels_of_a_run_that_never_finished_are_refused(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    begun = shutil.copytree(source, tmp_path / "begun")
    (begun / "result.json").unlink()

    assert predict([str(begun), "--pseudo-labels", str(tmp_path / "labels")]) == 2

    assert "source must be a finished run" in capsys.readouterr().err
    assert not (tmp_path / "labels").exists()


def test_a_folder_holds_the_run_of_its_own_labels_alone(
    config: Config, labels: Path, finished: Path, tmp_path: Path
) -> None:
    out = shutil.copytree(finished, tmp_path / "run")
    other = spoilt(labels, tmp_path, fingerprint="0" * 16)

    with pytest.raises(ValueError, match=r"segmentation.labels_fingerprint"):
        train(override(config, {"segmentation.labels": str(other)}), out=out)


def test_weights_of_another_architecture_are_refused(finished: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(finished / "model", tmp_path / "model")
    settings = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**settings, "network.decoder_channels": 8}))

    with pytest.raises(ValueError, match=r"weights must fit the network"):
        load_model(folder, device=CPU)


def test_each_command_trains_its_own_networks(
    config: Config, tiny_config: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own, cosa = tmp_path / "own.json", tmp_path / "cosa.json"
    own.write_text(to_json(config))
    cosa.write_text(to_json(tiny_config))

    assert train_command([str(own), "--dry-run"]) == 2
    assert segment([str(cosa), "--dry-run"]) == 2
    assert segment([str(own), "--dry-run"]) == 0

    said = capsys.readouterr()
    assert "cosa-segment trains that one" in said.err
    assert "cosa-train trains that one" in said.err
    assert "labels " in said.out


def test_the_command_trains_from_pseudo_labels_and_keeps_in_mlflow_what_it_did(
    config: Config,
    labels: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    extra = ModuleType("pydensecrf")
    extra.__spec__ = ModuleSpec("pydensecrf", None)
    monkeypatch.setitem(sys.modules, "pydensecrf", extra)
    monkeypatch.setattr("cosa.evaluation.crf.refine", lambda _, probs: probs[::-1])
    file, out, uri = tmp_path / "own.json", tmp_path / "run", f"sqlite:///{tmp_path}/mlflow.db"
    file.write_text(to_json(override(config, {"segmentation.labels": "", "train.iterations": 2})))

    arguments = [str(file), "--labels", str(labels), "--out", str(out), "--tracking-uri", uri]
    assert segment([*arguments, "--evaluation.crf", "true", "--no-system-metrics"]) == 0

    assert "2 of 2 steps" in capsys.readouterr().out
    assert result_of(out)["step"] == 2
    run = MlflowClient(uri).get_run(json.loads((out / "run.json").read_text())["run_id"])
    fingerprint = json.loads((labels / SUMMARY).read_text())["fingerprint"]
    assert run.info.status == "FINISHED"
    assert run.data.params["network.architecture"] == "largefov_vit"
    assert run.data.params["segmentation.labels_fingerprint"] == fingerprint
    assert run.data.tags["cosa.labels.fingerprint"] == fingerprint
    assert run.data.tags["mlflow.source.name"] == "cosa-segment"
    metrics = {name for name in run.data.metrics if not name.startswith("cost/")}
    judged = {name for name in metrics if name.startswith("val/")}
    assert {"train/loss/seg", "train/loss/total"} <= metrics - judged
    assert not any("cls" in name or "2" in name for name in metrics - judged)
    protocols = [
        f"seg_{mean}{protocol}{crf}"
        for mean in ("miou", "cmiou")
        for protocol in ("", "_labelled")
        for crf in ("", "_crf")
    ]
    speeds = ["images_per_second", "crf_images_per_second"]
    assert judged == {f"val/standalone/{name}" for name in (*protocols, *speeds)}
    assert run.data.metrics["val/standalone/seg_miou_crf"] != run.data.metrics["val/standalone/seg_miou"]


@pytest.mark.parametrize("name", STANDALONE)
def test_a_preset_is_a_standalone_network_with_its_lab_note(name: str) -> None:
    preset = STANDALONE[name]()

    assert preset.standalone
    assert not preset.oracle
    assert warmup_identity(preset)
    note = STANDALONE[name].__doc__ or ""
    assert "Hardware: " in note
    (command,) = re.findall(rf"^Command: cosa-segment {name} --labels LABELS(.*)$", note, re.MULTILINE)
    options = set(re.findall(r"--(\S+)", command))
    assert options <= fields().keys() | {"workers"}
    full = preset.network.encoder.startswith(("vit_base", "resnet101", "swin_base")) or (
        preset.network.encoder == "wideresnet38"
    )
    assert ("small" in note) != full


@pytest.mark.slow
def test_two_ranks_train_what_one_does_but_for_rounding(
    config: Config, normed: Config, tmp_path: Path
) -> None:
    still = override(config, {"network.drop_path": 0.0})
    jobs = {name: {"config": to_json(chosen)} for name, chosen in (("still", still), ("normed", normed))}
    multiprocessing.spawn(work, (2, tmp_path, jobs), nprocs=2)
    train(still, out=tmp_path / "alone")

    one, two = (saved_state(tmp_path / name, STEPS) for name in ("alone", "still"))
    weights = [name for name in one if name.startswith("/standalone/")]

    assert weights
    for name in weights:
        assert torch.allclose(one[name], two[name], atol=2e-4), name
    assert result_of(tmp_path / "normed")["metrics"].keys() == result_of(tmp_path / "still")["metrics"].keys()
