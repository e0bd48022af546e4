"""cosa-evaluate, cosa-predict and cosa-export as a user meets them."""

from __future__ import annotations

import importlib.util
import json
import re
import shutil
import tarfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

import mlflow.pyfunc
import numpy as np
import pytest
from mlflow import MlflowClient
from PIL import Image

from cosa import cli
from cosa.config import Config
from cosa.data.open import open_dataset
from cosa.model import build_model, load_model, resolve_model
from cosa.storage.model_files import save_model
from cosa.tracking import TrackingSpec, initialise_store, read_run_id
from sweeps import report
from sweeps.running.driver import main as sweep
from tests.cosa.runs import train


@pytest.fixture(scope="module")
def trained(tiny_config: Config, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a tiny run, finished; treat it as read-only."""
    out = tmp_path_factory.mktemp("trained") / "run"
    train(tiny_config, out=out)
    return out


@pytest.fixture(autouse=True)
def run(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the run in the folder that commands work in."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    return shutil.copytree(trained, tmp_path / "run")


FILE_AS_FOLDER = [
    (cli.train, ["shapes", "--tracking-uri=none", "--out"], ""),
    (cli.train, ["shapes", "--dry-run", "--out"], ""),
    (partial(sweep, "ablation", "", ("3b",)), ["--dry-run", "--out"], ""),
    (report.main, ["--out"], ""),
    (cli.predict, ["run", "voc/JPEGImages", "--out"], ""),
    (cli.data, ["pack", "voc", "--out"], "/a.tar"),
    (cli.data, ["show", "voc", "--out"], "/a.png"),
    (cli.export, ["run", "--out"], "/model"),
    (cli.import_, ["a.pth", "--out"], "/model"),
]


@pytest.mark.parametrize("place", ["/dev/null", "/dev/null/x", "notes.txt"])
@pytest.mark.parametrize(("command", "arguments", "below"), FILE_AS_FOLDER)
def test_a_file_is_refused_as_a_folder_to_write_to(
    command: Callable[..., int],
    arguments: list[str],
    below: str,
    place: str,
    shapes_root: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    Path("notes.txt").write_text("mine")
    Path("voc").symlink_to(shapes_root)
    file = "/dev/null" if place.startswith("/dev") else str(Path.cwd() / place)

    assert command([*arguments, f"{place}{below}"]) == cli.MISTAKE

    told = capsys.readouterr().err
    assert "must be a folder, got" in told
    assert "which is a file" in told or f"where {file!r} is a file" in told
    assert told.count("\n") == 1
    assert Path("notes.txt").read_text() == "mine"


def _refused(capsys: pytest.CaptureFixture[str], command: str, *arguments: str) -> str:
    """The one line that a mistake ends in."""
    assert getattr(cli, command)(arguments) == cli.MISTAKE
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert err.startswith(f"cosa-{command}: error: ")
    return err


def test_evaluating_a_run_leaves_its_results_beside_it(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.evaluate(["run"]) == 0

    expected = json.loads((run / "result.json").read_text())
    found = json.loads((run / "evaluation" / "val" / "evaluation.json").read_text())
    assert found["metrics"]["seg_miou"] == expected["metrics"]["val/assignment/seg_miou"]
    assert found["per_class"]["seg_iou"] == expected["assignment"]["per_class"]["seg_iou"]
    assert (found["step"], found["split"], found["images"], found["oracle"]) == (2, "val", 6, False)
    assert found["judged_on"] != found["trained_on"]
    shown = capsys.readouterr().out
    assert "AN after 2 steps on 6 of 6 images of val; input 32 px, scales 1\n" in shown


def test_the_table_of_classes_starts_with_the_background_and_ends_with_the_mean(run: Path) -> None:
    assert cli.evaluate(["run", "--out", "here"]) == 0

    text = Path("here/evaluation.md").read_text()
    rows = [line.split("|")[1:-1] for line in text.splitlines() if line.startswith("|")]
    names = [row[0].strip() for row in rows]
    assert names[0] == "IoU, percent"
    assert names[2:] == ["background", *resolve_model(run).classes, "mIoU"]
    metrics = json.loads(Path("here/evaluation.json").read_text())["metrics"]
    assert float(rows[-1][1]) == pytest.approx(100 * metrics["seg_miou"], abs=0.005)
    assert float(rows[-1][2]) == pytest.approx(100 * metrics["seg_miou_labelled"], abs=0.005)


def test_splits_and_networks_do_not_overwrite_each_other(run: Path) -> None:
    for flags in ([], ["--split", "train_aug"], ["--network", "online"]):
        assert cli.evaluate(["run", "--evaluation.max_images", "2", *flags]) == 0

    folders = sorted(path.name for path in (run / "evaluation").iterdir())
    assert folders == ["train_aug", "val", "val-online"]
    online = json.loads((run / "evaluation" / "val-online" / "evaluation.json").read_text())
    assert online["network"] == "online"


def test_an_exported_model_is_judged_as_its_run(run: Path) -> None:
    assert cli.export(["run", "--out", "model"]) == 0
    for source, out in (("run", "a"), ("model", "b"), ("run/checkpoints/step_00000002.pt", "c")):
        assert cli.evaluate([source, "--out", out]) == 0

    first, *others = (json.loads(Path(out, "evaluation.json").read_text()) for out in "abc")
    assert all(other == first for other in others)


def test_a_tracked_run_is_judged_by_its_id(run: Path, tmp_path: Path) -> None:
    uri = f"sqlite:///{tmp_path}/runs/mlflow.db"
    client, experiment = MlflowClient(uri), initialise_store(uri, "cosa")
    run_id = client.create_run(experiment).info.run_id
    assert cli.export(["run", "--out", "model"]) == 0
    client.log_artifacts(run_id, "model", "model")

    assert cli.evaluate([run_id]) == 0

    expected = json.loads((run / "result.json").read_text())["metrics"]["val/assignment/seg_miou"]
    found = json.loads(Path("evaluation", run_id, "val", "evaluation.json").read_text())
    assert found["metrics"]["seg_miou"] == expected


def test_a_split_without_masks_is_judged_by_its_labels(
    run: Path, tiny_config: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = shutil.copytree(tiny_config.data.root, tmp_path / "data")
    dataset = open_dataset(tiny_config.data, "val")
    shutil.rmtree(data / "SegmentationClassAug")
    (data / "Annotations").mkdir()
    for name, labels in zip(dataset.names, dataset.labels, strict=True):
        objects = [dataset.classes[i] for i in labels.nonzero().flatten()]
        text = "".join(f"<object><name>{o}</name></object>" for o in objects)
        (data / "Annotations" / f"{name}.xml").write_text(f"<annotation>{text}</annotation>")

    assert cli.evaluate(["run", "--data.root", str(data), "--out", "here"]) == 0

    assert "split 'val' has no masks: classification alone can be judged" in capsys.readouterr().err
    found = json.loads(Path("here/evaluation.json").read_text())
    assert "cls_map" in found["metrics"]
    assert "seg_miou" not in found["metrics"]


@pytest.mark.skipif(
    importlib.util.find_spec("pydensecrf") is None,
    reason='needs the optional extra: pip install "cosa-wsss[crf]"',
)
def test_the_crf_is_set_beside_what_there_is_without(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.evaluate(["run", "--crf"]) == 0

    rows = [line.split("|") for line in capsys.readouterr().out.splitlines() if line.startswith("| with")]
    metrics = json.loads(Path("run/evaluation/val/evaluation.json").read_text())["metrics"]
    assert [row[1].strip() for row in rows] == ["without", "with"]
    assert float(rows[1][2]) == pytest.approx(100 * metrics["seg_miou_crf"], abs=0.005)
    assert float(rows[1][4]) > 0


def test_a_missing_crf_is_said_before_anything_is_computed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("cosa.evaluation.crf.importlib.util.find_spec", lambda _: None)

    assert 'pip install "cosa-wsss[crf]"' in _refused(capsys, "evaluate", "run", "--crf")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["nowhere"], "got 'nowhere'; there is no such file or folder"),
        (["a" * 32], "tracking store must exist"),
        (["a" * 32, "--tracking-uri", "mlruns"], "tracking URI must start with"),
        (["run", "--network", "both"], "invalid choice: 'both'"),
        (["run", "--split", "vla"], "got 'vla'"),
        (["run", "--out", "file/there"], "--out must be a folder"),
        (["run", "--data.layout", "voc", "--data.root", "nowhere"], "'nowhere'"),
        (["run", "--csc.weight", "1"], "argument must be one that exists, got '--csc.weight'"),
        (["run", "--submission", "out.tar.gz"], "data.layout must be voc for a submission, got 'shapes'"),
        (["run", "--data.layout", "voc", "--submission", "out.zip"], "must be called *.tar.gz"),
    ],
)
def test_a_mistake_of_an_evaluation_ends_in_one_line(
    arguments: list[str], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("file").touch()

    assert says in _refused(capsys, "evaluate", *arguments)


def test_a_model_of_other_classes_is_refused(
    run: Path, shapes_root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = shutil.copytree(shapes_root, tmp_path / "data")
    names = (data / "classes.txt").read_text().replace("train", "tram")
    (data / "classes.txt").write_text(names)
    shutil.rmtree(data / "Annotations", ignore_errors=True)

    line = _refused(capsys, "evaluate", "run", "--data.root", str(data))

    assert re.search(r"model must be of the data set's 6 classes \(.*\), got 6 \(", line)


def test_a_submission_holds_every_image_of_a_list_without_masks(
    run: Path,
    shapes_root: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("cosa.evaluation.crf.require_crf", lambda: pytest.fail("no CRF was asked for"))
    data = shutil.copytree(shapes_root, tmp_path / "data")
    lists = data / "ImageSets" / "Segmentation"
    (lists / "test.txt").write_text((lists / "val.txt").read_text())
    for folder in ("SegmentationClassAug", "Annotations"):
        shutil.rmtree(data / folder, ignore_errors=True)
    flags = ["--data.layout", "voc", "--data.root", str(data), "--evaluation.max_images", "2"]

    assert cli.evaluate(["run", "--submission", "sub/out.tar.gz", *flags]) == 0

    assert "6 class maps of test, read back, in" in capsys.readouterr().out
    model, names = load_model(run), (lists / "test.txt").read_text().split()
    with tarfile.open("sub/out.tar.gz", "r:gz") as archive:
        assert [Path(name).stem for name in archive.getnames()] == names
        stored = archive.extractfile(archive.getnames()[0])
        assert stored is not None
        with Image.open(stored) as picture:
            expected = model.predict(next((data / "JPEGImages").glob(f"{names[0]}.*")))
            assert (np.array(picture) == expected).mean() > 0.99  # batches round differently


@pytest.fixture
def pictures(shapes_root: Path) -> list[str]:
    """Three images of the data set."""
    return [str(path) for path in sorted((shapes_root / "JPEGImages").iterdir())[:3]]


def _names(folder: str) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in Path(folder).rglob("*.png"))


def test_each_image_gets_a_class_map_and_an_overlay(
    pictures: list[str], run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.predict(["run", *pictures]) == 0

    stems = [Path(path).stem for path in pictures]
    assert _names("predictions") == sorted(f"{s}{e}.png" for s in stems for e in ("", "_overlay"))
    with Image.open(f"predictions/{stems[0]}.png") as picture:
        expected = load_model(run).predict(pictures[0])
        assert (np.array(picture) == expected).mean() > 0.99  # batches round differently
    assert "3 class maps with their overlays in" in capsys.readouterr().out


def test_heat_maps_are_drawn_of_the_classes_that_are_named(pictures: list[str], run: Path) -> None:
    first, second = resolve_model(run).classes[:2]

    assert cli.predict(["run", pictures[0], "--cams", f"{first},{second}"]) == 0

    stem = Path(pictures[0]).stem
    cams = [name for name in _names("predictions") if "_cam_" in name]
    assert cams == sorted(f"{stem}_cam_{name}.png" for name in (first, second))


def test_heat_maps_without_names_are_of_the_likely_classes(pictures: list[str], run: Path) -> None:
    assert cli.predict(["run", pictures[0], "--cams"]) == 0

    model = load_model(run)
    probs = model.outputs([pictures[0]])[0].cls_probs
    likely = [model.classes[i] for i in np.flatnonzero(probs >= 0.5)] or [model.classes[probs.argmax()]]
    cams = [name for name in _names("predictions") if "_cam_" in name]
    assert cams == sorted(f"{Path(pictures[0]).stem}_cam_{name}.png" for name in likely)


def test_labels_are_the_only_classes_that_are_predicted(pictures: list[str], run: Path) -> None:
    name = resolve_model(run).classes[3]

    assert cli.predict(["run", *pictures, "--labels", name]) == 0

    for path in pictures:
        with Image.open(f"predictions/{Path(path).stem}.png") as picture:
            assert set(np.unique(np.array(picture))) <= {0, 4}


def test_images_of_one_name_are_kept_apart(pictures: list[str]) -> None:
    for folder in ("a", "b"):
        Path(folder).mkdir()
        shutil.copy(pictures[0], f"{folder}/x.png")

    assert cli.predict(["run", "a", "b/*"]) == 0

    assert _names("predictions") == ["a/x.png", "a/x_overlay.png", "b/x.png", "b/x_overlay.png"]


def test_unreadable_images_are_listed_and_change_the_exit_code(
    pictures: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    Path("bad.jpg").write_bytes(b"no image")

    assert cli.predict(["run", pictures[0], "bad.jpg", pictures[1]]) == cli.FAILED

    captured = capsys.readouterr()
    assert "2 class maps" in captured.out
    lines = captured.err.splitlines()
    assert lines[0] == "skipped 1 of 3 images:"
    assert lines[1].startswith("  bad.jpg: image must be a readable JPEG or PNG")
    assert len(lines) == 2


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["run"], "the following arguments are required: IMAGES"),
        (["nowhere", "image.png"], "got 'nowhere'"),
        (["run", "none.png"], "images must be files, folders or patterns that match some, got 'none.png'"),
        (["run", "image.png", "--cams", "unicorn"], "labels must be classes of the model, got 'unicorn'"),
        (["run", "image.png", "--labels", ","], "must name classes with commas between"),
        (["run", "image.png", "--out", "."], "'image.png' would be overwritten"),
        (["run", "image.png", "--out", "image.png"], "--out must be a folder"),
        (["run", "image.png", "--evaluation.scales", "9"], "evaluation.scales must hold"),
    ],
)
def test_a_mistake_of_a_prediction_ends_in_one_line(
    arguments: list[str], says: str, pictures: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copy(pictures[0], "image.png")

    assert says in _refused(capsys, "predict", *arguments)


def test_an_export_loads_in_python_and_in_mlflow(pictures: list[str], run: Path) -> None:
    assert cli.export(["run", "--out", "plain"]) == 0
    assert cli.export(["plain", "--out", "served", "--mlflow"]) == 0

    expected = load_model(run).predict(pictures[0])
    np.testing.assert_array_equal(load_model("plain").predict(pictures[0]), expected)
    np.testing.assert_array_equal(mlflow.pyfunc.load_model("served").predict([pictures[0]])[0], expected)


def test_a_registered_model_is_a_version_with_signature_and_example_that_predicts(
    tiny_config: Config, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    out = tmp_path / "tracked"
    spec = TrackingSpec(uri=uri, experiment="mine", system_metrics=False)
    train(tiny_config, out=out, tracking=spec)
    for version in ("1", "2"):
        assert cli.export([str(out), "--register", "cosa", "--tracking-uri", uri]) == 0
        assert f"models:/cosa/{version}" in capsys.readouterr().out

    found = mlflow.pyfunc.load_model("models:/cosa/2")
    pictures = np.arange(2 * 40 * 30 * 3, dtype=np.uint8).reshape(2, 40, 30, 3)
    expected = [load_model(out).predict(picture) for picture in pictures]
    np.testing.assert_array_equal(found.predict(pictures), expected)
    assert found.metadata.run_id == read_run_id(out)
    assert [one.type.name for one in found.metadata.signature.inputs] == ["uint8"]
    assert found.input_example.shape == (1, 32, 32, 3)


def test_an_export_needs_a_place_and_a_name_that_registries_take(capsys: pytest.CaptureFixture[str]) -> None:
    assert "--out DIR or --register NAME is missing" in _refused(capsys, "export", "run")
    assert "--register must be a name without / and :, got 'a/b'" in _refused(
        capsys, "export", "run", "--register", "a/b"
    )


def test_an_export_does_not_overwrite(capsys: pytest.CaptureFixture[str]) -> None:
    assert "out must not exist yet, got 'run'" in _refused(capsys, "export", "run", "--out", "run")


def test_an_export_of_weights_that_do_not_fit_is_refused(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = build_model(resolve_model(run))
    save_model(Path("model"), model.network, model.config, model.classes[:-1], facts=model.facts)

    assert "weights must be of the model's 5 classes, got 6" in _refused(
        capsys, "export", "model", "--out", "x"
    )
